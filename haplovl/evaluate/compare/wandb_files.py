"""Offline W&B runs, read back from their files without an account and without a network."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from haplovl.errors import UserError
from haplovl.files import read_json

PREDICTIONS = "predictions"
LISTS = ("images", "image_sha256")
TIMEOUT = 300
"""Seconds that reading one run may take."""


@dataclass(frozen=True)
class OfflineRun:
    """What was logged: the configuration, one row per step, and the rows of the table of predictions."""

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


def read_offline_run(folder: Path) -> OfflineRun:
    """Reads a folder `offline-run-…` or `run-…`, and those before it that hold earlier parts of the same run.

    A training that was killed and went on leaves one folder for every start; all of them bear its id.

    Raises:
        UserError: W&B is not installed, or cannot read a file.
    """
    config: dict[str, Any] = {}
    rows: dict[int, dict[str, Any]] = {}
    predictions: list[dict[str, Any]] = []
    for part in _parts(folder):
        for record in _records(next(part.glob("*.wandb"))):
            kind = record.get("type")
            if kind == "run":
                config |= record["run"].get("config", {}).get("update", {})
            elif kind == "config":
                config |= record["config"].get("update", {})
            elif kind == "history":
                item = record["history"]["item"]
                if "loss" in item and "step" in item:
                    rows[item["step"]] = {name: value for name, value in item.items() if not name.startswith("_")}
                if f"{PREDICTIONS}.path" in item:
                    predictions = _table(part / "files" / item[f"{PREDICTIONS}.path"])
    return OfflineRun(config, [rows[step] for step in sorted(rows)], predictions)


def _parts(folder: Path) -> list[Path]:
    """The folders of one run up to this one, oldest first.

    They are named offline-run-<time>-<id>, run-<time>-<id> where that start was online, and a second start in the same
    second has -1 at its end; the file inside, run-<id>.wandb, tells the id.
    """
    file = next(folder.glob("run-*.wandb"), None)
    if file is None:
        return [folder]
    id_ = file.stem.removeprefix("run-")

    def start(path: Path) -> tuple[str, int]:
        time, _, rest = path.name.removeprefix("offline-").removeprefix("run-").partition("-")
        number = rest.removeprefix(f"{id_}-")
        return time, int(number) if number.isdigit() else 0

    starts = [path for pattern in ("offline-run-*", "run-*") for path in folder.parent.glob(pattern)]
    same = [path for path in starts if (path / file.name).exists()]
    return sorted((path for path in same if start(path) <= start(folder)), key=start) or [folder]


def _records(path: Path) -> list[dict[str, Any]]:
    """All records of a .wandb file, as W&B's own reader tells them."""
    if not find_spec("wandb"):
        raise UserError(f"{path} can be read only where wandb is installed")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    with tempfile.TemporaryDirectory() as scratch:
        quiet = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_CONFIG_DIR": scratch}
        places = {"WANDB_DIR": scratch, "WANDB_CACHE_DIR": scratch, "WANDB_DATA_DIR": scratch}
        try:
            done = subprocess.run(
                command, env={**os.environ, **quiet, **places}, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"W&B did not read {path} within {TIMEOUT} seconds") from None
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"W&B cannot read {path}: {told[-1] if told else f'exit code {done.returncode}'}")
    try:
        return [json.loads(line) for line in done.stdout.split("\n") if line]
    except ValueError:
        raise UserError(f"W&B cannot read {path}: it says something that is no JSON") from None


def _table(path: Path) -> list[dict[str, Any]]:
    """The rows of a logged table, by the names of its columns; lists are logged as JSON."""
    content = read_json(path)
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    return [{name: json.loads(cell) if name in LISTS else cell for name, cell in row.items()} for row in rows]
