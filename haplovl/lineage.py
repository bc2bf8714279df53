"""The record of the machines that made a version.

The candidate is a function of its inputs, so it cannot hold what depends on a machine. That is in `lineage.json`, which
`haplovl publish` writes for a new version and commits together with dvc.lock: every clone has it.
"""

import json
from pathlib import Path
from typing import Any

from haplovl.files import CANDIDATE, REPORTS, RUN_FILE, RUNS, STAGE1, STAGE2, read_json, sha256_of_folder, write_json
from haplovl.machine import environment, machine
from haplovl.revisions import git, hashes, lock_of
from haplovl.settings import Params
from haplovl.tracking import wandb_mode, wandb_project

RECORD = Path("lineage.json")
UNKNOWN = "unknown: no run in runs/ ended in this model, which was trained elsewhere or before runs were told apart"
TRAINED = {"stage1": STAGE1, "stage2": STAGE2}


def write_record(params: Params, candidate: str, uncommitted: list[str]) -> None:
    """Writes lineage.json for the candidate of this hash; `uncommitted` files are named in it."""
    record = {
        "candidate": candidate,
        "uncommitted": uncommitted,
        "environment": environment(),
        "machine": machine(),
        "training": {name: _training(params, name) for name in TRAINED},
        "evaluation": _evaluation(params),
        "publish": {} if wandb_mode() == "disabled" else {"wandb": _publishing(params, candidate)},
    }
    write_json(RECORD, record)


def _training(params: Params, name: str) -> dict[str, Any]:
    """What the run noted whose result is the model that lies here now; never a guess."""
    if name not in params.training:
        return {"note": "nothing to train in this recipe"}
    if not TRAINED[name].is_dir():
        return {"note": f"unknown: {TRAINED[name]} is not here"}
    digest = sha256_of_folder(TRAINED[name])
    marks = (RUNS / "training").glob(f"{name}-*/finished.json")
    found = [mark for mark in marks if read_json(mark).get("result_sha256") == digest]
    # Other code may come to the same bytes; then the last run is the one that DVC knows.
    newest = max(found, key=lambda mark: mark.stat().st_mtime, default=None)
    if newest is None:
        return {"note": UNKNOWN}
    told = read_json(newest.with_name(RUN_FILE))
    return {"run": newest.parent.name, **{key: told[key] for key in ("code", "places", "wandb") if key in told}}


def _evaluation(params: Params) -> dict[str, Any]:
    from haplovl.evaluate.tracked import EVALUATIONS, evaluation_key

    if not (REPORTS / "evaluation" / "predictions.jsonl").is_file():
        return {"note": "unknown: its predictions are not here"}
    found = EVALUATIONS / f"{evaluation_key(params)}.json"
    return read_json(found) if found.is_file() else {"note": f"unknown: it did not run here, or {EVALUATIONS} is gone"}


def _publishing(params: Params, candidate: str) -> dict[str, str]:
    """The run that `publish` will start, which needs the commit that this record is part of."""
    return {"project": wandb_project(params.register_.name), "id": wandb_id(candidate), "path": ""}


def wandb_id(candidate: str) -> str:
    """The id of the W&B run that publishes a candidate."""
    return f"publish-{candidate[:16]}"


def recorded(commit: str) -> dict[str, Any]:
    """The record of a version's commit; empty where it has none of its own, as before there were records."""
    found: dict[str, Any] = json.loads(git("show", f"{commit}:./{RECORD}") or "{}")
    candidate = hashes(lock_of(commit).get("register", {}).get("outs")).get(CANDIDATE.as_posix())
    return found if found.get("candidate") == candidate else {}


def machine_of(record: dict[str, Any], stage: str) -> dict[str, Any]:
    """The machine that a stage ran on, as well as the record knows it: where it was published, if nowhere else."""
    places = record.get("training", {}).get(stage, {}).get("places") or [{}]
    own = record.get("evaluation", {}) if stage == "evaluate" else places[-1]
    return own.get("machine") or record.get("machine") or {}
