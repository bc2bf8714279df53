"""A run as `haplovl compare` sees it, read from whatever a training or an evaluation leaves on disk."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from haplovl.errors import UserError
from haplovl.evaluate.compare.wandb_files import read_offline_run
from haplovl.evaluate.predictions import Side, as_object, predictions_of, read_predictions
from haplovl.files import HEADS, REPORTS, RUN_FILE, RUNS, STAGE1, STAGE2, read_json, sha256_of_folder
from haplovl.settings import Params

STATE_LOG, MODEL_LOG, PREDICTIONS = "log.jsonl", "training_log.jsonl", "predictions.jsonl"
EVALUATION = REPORTS / "evaluation"
MODELS = (STAGE1, STAGE2)
UNNAMED_STAGE = "training"
"""What a log is called that does not say which stage it is of."""
NO_RESULT = ("register", "compare", "probe")
"""Sections of the settings that decide nothing of a run; descriptions of older versions hold some of them."""
UNCHECKED = (
    "Some evaluations, of an older version, do not name the models that they asked: whether the losses are of these "
    "very models is not checked."
)
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
    notes: tuple[str, ...] = ()
    """What a reader must know of what its files hold."""
    places: frozenset[Path] = frozenset()
    """All folders that it was read from."""


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
    runs = [read_run(path) for path in paths]
    for first, second in combinations(runs, 2):
        if first.places & second.places:
            raise UserError(f"{first.path} and {second.path} are the same run")
    return runs


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
            run = reader(folder)
            return replace(run, places=frozenset(place.resolve() for place in {folder, *run.places}))
    raise UserError(f"{path} holds no run: give the folder of {KINDS}")


def _folder(path: Path) -> Path:
    """The run's folder where a file in it is given."""
    known = path.name in (STATE_LOG, MODEL_LOG, PREDICTIONS, "params.yaml") or path.suffix == ".wandb"
    return path.parent if known and path.is_file() else path


# --- the kinds -------------------------------------------------------------------------------------------------------
def _read_project(folder: Path) -> ComparedRun:
    told = _description(folder / EVALUATION)
    said = folder / EVALUATION / PREDICTIONS
    answers = read_predictions(said) if said.is_file() else None
    about, logs, notes = _about_of_project(folder), {}, []
    places = {folder / EVALUATION} if answers else set()
    for model in MODELS:
        stage, rows = model.name, _log(folder / model / MODEL_LOG)
        asked = _was_asked(told, folder / model) if rows and answers else True
        if asked is None:
            notes.append(UNCHECKED)
        if asked is False:
            notes.append(
                f"{folder / model} is another model than the one that {folder / EVALUATION} is of, so that its losses "
                "are left out; 'haplovl evaluate' brings both together."
            )
        elif rows:
            # The run's own log also holds what the clock said, which no out may.
            own = _own_folder(rows, folder / RUNS / "training", stage)
            logs[stage] = _log(own / STATE_LOG) if own else rows
            about = _with_code(about, _description(own).get("code", {})) if own else about
            places |= {folder / model, *([own] if own else [])}
    if not logs and answers is None:
        raise UserError(f"{folder} has nothing to compare yet: it holds no trained model and no evaluation")
    notes = tuple(dict.fromkeys(notes))
    return ComparedRun(folder, about, logs, answers, notes=notes, places=frozenset(places))


def _read_evaluation(folder: Path) -> ComparedRun:
    told = _description(folder)
    project = _project_around(folder, EVALUATION)
    about = _about(told) if told or project is None else _about_of_project(project)
    return ComparedRun(folder, about, {}, read_predictions(folder / PREDICTIONS))


def _read_state(folder: Path) -> ComparedRun:
    told = _description(folder)
    stage = told.get("stage") or folder.name.split("-")[0]
    return ComparedRun(folder, _about(told), {stage: _require_log(folder / STATE_LOG)}, None)


def _read_model(folder: Path) -> ComparedRun:
    rows = _require_log(folder / MODEL_LOG)
    stage = _stage_of(folder, rows)
    project = _project_around(folder, *MODELS)
    own = _own_folder(rows, project / RUNS / "training", stage) if project else None
    return ComparedRun(folder, _about_of_model(folder, own), {stage: rows}, None, places=frozenset({own} - {None}))


def _stage_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    """What a model's own files tell of its stage, else its folder's name."""
    if (folder / HEADS).is_file() or "loss_vision" in rows[0]:
        return STAGE1.name
    name = Path(os.path.abspath(folder)).name
    return name if name in (STAGE1.name, STAGE2.name) else UNNAMED_STAGE


def _read_wandb(folder: Path) -> ComparedRun:
    run = read_offline_run(folder)
    stage = run.config.get("stage", UNNAMED_STAGE)
    answers = predictions_of(dict(enumerate(run.predictions, 1)), str(folder)) if run.predictions else None
    if not run.rows and answers is None:
        raise UserError(f"{folder} has nothing to compare: W&B holds neither a training step nor predictions of it")
    asked = run.config.get("questions", {}).get("asked", 0)
    if answers and len(answers.answers) < asked:
        raise UserError(
            f"{folder} holds {len(answers.answers)} of {asked} answers, as W&B's table of them ends there, and these "
            "are not drawn by chance; give the project or its reports/evaluation"
        )
    return ComparedRun(folder, _about(run.config), {stage: run.rows} if run.rows else {}, answers)


# --- what they are made of -------------------------------------------------------------------------------------------
def _description(folder: Path) -> dict[str, Any]:
    """The file in which a run says what it is made of; nothing where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return {}
    told = as_object(read_json(path), str(path))
    for name in ("params", "data", "code", "models"):
        as_object(told.get(name, {}), f"{path}, '{name}'")
    for name, kind in (("recipe", str), ("stage", str), ("seed", int | None)):
        if not isinstance(told.get(name, "" if kind is str else None), kind):
            raise UserError(f"{path}: '{name}' is {told[name]!r:.60}")
    return told


def _about(told: dict[str, Any]) -> About:
    """From a description as `haplovl.tracking` writes it."""
    left_out = ("recipe", "seed", *NO_RESULT)
    settings = {name: value for name, value in told.get("params", {}).items() if name not in left_out}
    data = told.get("data", {}).get("manifest_sha256", "")
    return _with_code(About(told.get("recipe", ""), told.get("seed"), flat(settings), data), told.get("code", {}))


def _with_code(about: About, code: dict[str, Any]) -> About:
    commit = code.get("git_commit", "")[:10] + ("+" if code.get("git_dirty") else "")
    return replace(about, code=code.get("sha256", ""), commit=commit)


def _project_around(folder: Path, *places: Path) -> Path | None:
    """The project that a folder belongs to, if it is where a project has it; anything may lie around other folders."""
    whole = Path(os.path.abspath(folder))
    return whole.parents[1] if any(whole.parts[-2:] == place.parts for place in places) else None


def _was_asked(told: dict[str, Any], model: Path) -> bool | None:
    """Whether an evaluation, by its description, is of the model that lies here now; None where it does not tell."""
    return told["models"].get(model.name) == sha256_of_folder(model) if "models" in told else None


def _about_of_model(folder: Path, own: Path | None) -> About:
    """From the training that its log came from, else from its evaluation, else from the project's settings of now."""
    project = _project_around(folder, *MODELS)
    if project is None:
        return About()
    if own and (told := _description(own)):
        return _about(told)
    told = _description(project / EVALUATION)
    return _about(told) if told and _was_asked(told, folder) is not False else _about_of_params(project)


def _about_of_project(folder: Path) -> About:
    """From the evaluation of a project, which says what it was made of, else from its params.yaml as it is now."""
    told = _description(folder / EVALUATION)
    return _about(told) if told else _about_of_params(folder)


def _about_of_params(folder: Path) -> About:
    params = folder / "params.yaml"
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
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            held_out = {name: float(row[name]) for name in ("validation_loss",) if name in row}
            rows.append({**row, **held_out, "step": int(row["step"]), "loss": float(row["loss"])})
        except (ValueError, TypeError, KeyError, OverflowError):
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
