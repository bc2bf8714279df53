"""A run as `haplovl compare` sees it, read from whatever a training or an evaluation leaves on disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from haplovl.errors import UserError
from haplovl.evaluate.compare.wandb_files import read_offline_run
from haplovl.evaluate.predictions import Side, predictions_of, read_predictions
from haplovl.files import RUN_FILE, STAGE1, STAGE2, read_json
from haplovl.settings import Params

STATE_LOG, MODEL_LOG, PREDICTIONS = "log.jsonl", "training_log.jsonl", "predictions.jsonl"
STAGES = ("stage1", "stage2")
KINDS = (
    f"a project (params.yaml), an evaluation ({PREDICTIONS}), a training run ({STATE_LOG}), a model ({MODEL_LOG}) or "
    "an offline W&B run (*.wandb)"
)


@dataclass(frozen=True)
class About:
    """What a run is made of, as far as its files tell."""

    recipe: str = ""
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """By dotted name, without recipe and seed."""
    data: str = ""
    """sha256 of the manifest of its training data."""
    code: str = ""
    """Hash of the code that trained it."""
    commit: str = ""
    """Git commit, with `+` where files were changed since."""


@dataclass(frozen=True)
class ComparedRun:
    """One run: what it is made of, the log of every stage, and its answers, as far as there are any."""

    path: Path
    about: About
    logs: dict[str, list[dict[str, Any]]]
    answers: Side | None
    name: str = ""
    """How tables call it."""


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Reads every run.

    Raises:
        UserError: fewer than two, the same one twice, a path that holds no run, or a damaged file.
    """
    if len(paths) < 2:
        raise UserError("a comparison needs two runs or more, and there is one")
    places: dict[Path, Path] = {}
    for path in paths:
        place = _folder(path).resolve()
        if place in places:
            twice = (
                f"{path} is given twice" if path == places[place] else f"{places[place]} and {path} are the same run"
            )
            raise UserError(twice)
        places[place] = path
    return [read_run(path) for path in paths]


def read_run(path: Path) -> ComparedRun:
    """Reads one run from its folder, or from the file in it that tells its kind.

    Raises:
        UserError: there is no run, or a file is damaged.
    """
    folder = _folder(path)
    if not folder.is_dir():
        raise UserError(f"there is no run at {path}" if not path.exists() else f"{path} is no run: give {KINDS}")
    readers = {
        "*.wandb": _read_wandb,
        "params.yaml": _read_project,
        PREDICTIONS: _read_evaluation,
        STATE_LOG: _read_state,
        MODEL_LOG: _read_model,
    }
    for pattern, reader in readers.items():
        if any(folder.glob(pattern)):
            return reader(folder)
    raise UserError(f"{path} holds no run: give the folder of {KINDS}")


def _folder(path: Path) -> Path:
    """The run's folder where a file in it is given."""
    known = path.name in (STATE_LOG, MODEL_LOG, PREDICTIONS, "params.yaml") or path.suffix == ".wandb"
    return path.parent if known and path.is_file() else path


# --- the kinds -------------------------------------------------------------------------------------------------------
def _read_project(folder: Path) -> ComparedRun:
    about, logs = _about_of_project(folder), {}
    for stage, model in zip(STAGES, (STAGE1, STAGE2), strict=True):
        logs[stage] = _log(folder / model / MODEL_LOG)
        # The run's own log also holds what the clock said, which no out may.
        own = _own_folder(logs[stage], folder / "runs" / "training", stage) if logs[stage] else None
        if own:
            logs[stage] = _log(own / STATE_LOG)
            about = _with_code(about, _description(own).get("code", {}))
    logs = {stage: rows for stage, rows in logs.items() if rows}
    evaluation = folder / "reports" / "evaluation"
    answers = read_predictions(evaluation / PREDICTIONS) if (evaluation / PREDICTIONS).is_file() else None
    if not logs and answers is None:
        raise UserError(f"{folder} has nothing to compare yet: it holds no trained model and no evaluation")
    return ComparedRun(folder, about, logs, answers)


def _read_evaluation(folder: Path) -> ComparedRun:
    told = _description(folder)
    about = _about(told) if told else _about_of_project(folder.parent.parent)
    return ComparedRun(folder, about, {}, read_predictions(folder / PREDICTIONS))


def _read_state(folder: Path) -> ComparedRun:
    told = _description(folder)
    stage = told.get("stage") or folder.name.split("-")[0]
    return ComparedRun(folder, _about(told), {stage: _require_log(folder / STATE_LOG)}, None)


def _read_model(folder: Path) -> ComparedRun:
    logs = {folder.name: _require_log(folder / MODEL_LOG)}
    return ComparedRun(folder, _about_of_project(folder.parent.parent), logs, None)


def _read_wandb(folder: Path) -> ComparedRun:
    run = read_offline_run(folder)
    stage = run.config.get("stage", "training")
    answers = predictions_of(dict(enumerate(run.predictions, 1)), str(folder)) if run.predictions else None
    if not run.rows and answers is None:
        raise UserError(f"{folder} has nothing to compare: W&B holds neither a training step nor predictions of it")
    return ComparedRun(folder, _about(run.config), {stage: run.rows} if run.rows else {}, answers)


# --- what they are made of -------------------------------------------------------------------------------------------
def _description(folder: Path) -> dict[str, Any]:
    """The file in which a run says what it is made of; nothing where there is none."""
    return read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}


def _about(told: dict[str, Any]) -> About:
    """From a description as `haplovl.tracking` writes it."""
    settings = {name: value for name, value in told.get("params", {}).items() if name not in ("recipe", "seed")}
    data = told.get("data", {}).get("manifest_sha256", "")
    return _with_code(About(told.get("recipe", ""), told.get("seed"), flat(settings), data), told.get("code", {}))


def _with_code(about: About, code: dict[str, Any]) -> About:
    commit = code.get("git_commit", "")[:10] + ("+" if code.get("git_dirty") else "")
    return replace(about, code=code.get("sha256", ""), commit=commit)


def _about_of_project(folder: Path) -> About:
    """From the evaluation of a project, which says what it was made of, else from its params.yaml as it is now."""
    told, params = _description(folder / "reports" / "evaluation"), folder / "params.yaml"
    if told:
        return _about(told)
    if not params.is_file():
        return About()
    try:
        settings = yaml.safe_load(params.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{params} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{params} does not hold settings by name")
    try:
        whole = Params.model_validate(settings).model_dump(mode="json", by_alias=True)
    except ValueError:  # of another version of the code: as they stand
        whole = settings
    whole = {name: value for name, value in whole.items() if name not in ("register", "compare")}
    return _about({"recipe": whole.get("recipe", ""), "seed": whole.get("seed"), "params": whole})


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; entries of lists that have a name, such as sources, by it."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
            value = {entry["name"]: {key: v for key, v in entry.items() if key != "name"} for entry in value}
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


# --- logs ------------------------------------------------------------------------------------------------------------
def _require_log(path: Path) -> list[dict[str, Any]]:
    rows = _log(path)
    if not rows:
        raise UserError(f"{path} holds no training step yet")
    return rows


def _log(path: Path) -> list[dict[str, Any]]:
    """The rows of a training log; none where it is missing. A last line that is still being written is left out."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"]), "loss": float(row["loss"])})
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and rows:
                break
            raise UserError(f"{path}, line {number}: no row of a training log") from None
    return rows


def _own_folder(rows: list[dict[str, Any]], state: Path, stage: str) -> Path | None:
    """The folder of training state below `state` that a model's log came from, if it still lies there."""
    taken = [(row["step"], row["loss"]) for row in rows]
    for folder in sorted(state.glob(f"{stage}-*")):
        if [(row["step"], row["loss"]) for row in _log(folder / STATE_LOG)] == taken:
            return folder
    return None
