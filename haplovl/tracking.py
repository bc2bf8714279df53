"""Weights & Biases, as training and `haplovl publish` use it: nothing is uploaded unless asked, nothing strays."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from haplovl.files import RUNS

WANDB_FOLDER = RUNS / "wandb"
START_TIMEOUT = 30.0
"""Seconds that a start may take: online without a network it would block for much longer."""
FINISH_TIMEOUT = 30.0
"""Seconds that a training run may wait for its last uploads when it ends."""


def wandb_mode() -> str:
    """`WANDB_MODE`, else `online` where WANDB_API_KEY is set, else `offline`."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def start_wandb(project: str, mode: str, finish_timeout: float = 0.0, **options: Any) -> Any:
    """Starts a run whose files all lie in runs/wandb; raises what W&B raises.

    The project's name gives way to WANDB_PROJECT. `finish_timeout` limits the last uploads, in seconds (0: no limit);
    `options` are those of `wandb.init`.
    """
    folder = WANDB_FOLDER.absolute()
    for part in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        (folder / part.lower()).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(f"WANDB_{part}_DIR", str(folder / part.lower()))
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=START_TIMEOUT, finish_timeout=finish_timeout, disable_git=True
    )
    project = os.environ.get("WANDB_PROJECT") or project
    return wandb.init(project=project, dir=str(RUNS), mode=mode, settings=settings, **options)


class TrainingRun:
    """The curves of one training run in W&B; whatever fails is told once and never reaches the training.

    `key` is the run's W&B id: a training that was killed and goes on is the same run there. Without W&B, or with
    WANDB_MODE=disabled, nothing happens. A start online that fails is tried offline.
    """

    def __init__(self, project: str, key: str, config: dict[str, Any]) -> None:
        self._run: Any = None
        mode = wandb_mode()
        if mode == "disabled" or not find_spec("wandb"):
            return
        options = {"id": key, "name": key, "job_type": "train", "config": config, "resume": "allow"}
        self._run = self._safely(f"start ({mode})", lambda: start_wandb(project, mode, FINISH_TIMEOUT, **options))
        if self._run is None and mode == "online":
            self._run = self._safely("start (offline)", lambda: _start_again(project, options))

    def log(self, row: dict[str, Any]) -> None:
        """Adds one row; its `step` is the position on every curve."""
        if self._run is not None and self._safely("log", lambda: self._run.log(row, step=row["step"]) or True) is None:
            self._run = None

    def finish(self) -> None:
        """Ends the run, waiting for its uploads no longer than FINISH_TIMEOUT."""
        if self._run is not None:
            self._safely("finish", self._run.finish)
            self._run = None

    def _safely(self, what: str, action: Callable[[], Any]) -> Any:
        """The action's result, or None where it failed."""
        try:
            return action()
        except Exception as error:  # W&B raises many kinds
            print(f"W&B could not {what}; training goes on: {' '.join(str(error).split())}", flush=True)
            return None


def _start_again(project: str, options: dict[str, Any]) -> Any:
    """Starts offline after a failed start online, which still holds the run's id."""
    import wandb

    wandb.teardown()
    return start_wandb(project, "offline", FINISH_TIMEOUT, **options)
