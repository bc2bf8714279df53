"""Weights & Biases, as training, evaluation and `haplovl publish` use it: nothing is uploaded unless asked, nothing
strays, and nothing depends on it."""

import os
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from haplovl.files import PREPARED, RUNS, read_json, sha256_of
from haplovl.redaction import without_secrets
from haplovl.settings import Params

WANDB_FOLDER = RUNS / "wandb"
PROJECT = "haplovl"
START_TIMEOUT = 30.0
"""Seconds that a start may take: online without a network it would block for much longer."""
FINISH_TIMEOUT = 30.0
"""Seconds that a run may wait for its last uploads when it ends."""


# --- what a run is described by --------------------------------------------------------------------------------------
def description(params: Params, root: Path = Path(".")) -> dict[str, Any]:
    """What decides a result, for people and for `haplovl compare`: recipe, seed, settings and training data.

    It depends on params and data alone, so it may be part of an out. The gate (`register`) and the probe judge results
    and do not make them; they are left out, with the plan of `make compare`.
    """
    manifest = root / PREPARED / "manifest.json"
    data = {}
    if manifest.is_file():
        data = {"manifest_sha256": sha256_of(manifest), "sources": read_json(manifest).get("sources", {})}
    settings = params.model_dump(mode="json", by_alias=True, exclude={"register_", "compare", "probe"})
    return {"recipe": params.recipe, "seed": params.seed, "params": settings, "data": data}


def code_version(sha256: str = "") -> dict[str, Any]:
    """The code that runs: the hash that its caller knows it by, and the git commit of the project with its state.

    Outside a git repository, or without git, the commit is left out.
    """
    found: dict[str, Any] = {"sha256": sha256} if sha256 else {}
    commit = _git("rev-parse", "HEAD")
    if commit:
        found |= {"git_commit": commit, "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    return found


def grouping(params: Params, job: str) -> dict[str, Any]:
    """Where W&B shows a run: among those of its recipe, named and tagged by what it does and its seed."""
    return {
        "group": f"recipe-{params.recipe}"[:128],  # W&B's limit
        "name": f"{params.recipe}-{job}-seed-{params.seed}"[:128],
        "job_type": job,
        "tags": [job[:64], f"seed-{params.seed}"],
    }


def _git(*arguments: str) -> str:
    """What a git command says; nothing where it fails or takes long."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


# --- runs ------------------------------------------------------------------------------------------------------------
def wandb_mode() -> str:
    """`WANDB_MODE`, else `online` where WANDB_API_KEY is set, else `offline`."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def wandb_project(project: str) -> str:
    """WANDB_PROJECT, else the given name."""
    return os.environ.get("WANDB_PROJECT") or project


def keep_wandb_here() -> None:
    """Has W&B, which must not be imported yet, write into runs/wandb and not into the home folder."""
    folder = WANDB_FOLDER.absolute()
    for part in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        (folder / part.lower()).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(f"WANDB_{part}_DIR", str(folder / part.lower()))


def start_wandb(project: str, mode: str, finish_timeout: float = 0.0, **options: Any) -> Any:
    """Starts a run whose files all lie in runs/wandb; raises what W&B raises.

    The project's name gives way to WANDB_PROJECT. `finish_timeout` limits the last uploads, in seconds (0: no limit);
    `options` are those of `wandb.init`. Credentials in `config` are hidden.
    """
    keep_wandb_here()
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=START_TIMEOUT, finish_timeout=finish_timeout, disable_git=True
    )
    project = wandb_project(project)
    options = {**options, "config": without_secrets(options.get("config") or {})}
    return wandb.init(project=project, dir=str(RUNS), mode=mode, settings=settings, **options)


def wandb_place(run: Any) -> dict[str, str]:
    """Project and id of a run, and its address or, offline, its folder."""
    where = os.path.relpath(Path(run.dir).parent) if run.offline else run.url
    return {"project": str(run.project), "id": str(run.id), "path": str(where)}


class TrackedRun:
    """A run in W&B; whatever fails is told once and never reaches the caller, whose work `goes_on`.

    `key` is the run's W&B id: a training that was killed and goes on is the same run there. `grouping` names its
    place. Without W&B, or with WANDB_MODE=disabled, nothing happens. A start online that fails is tried offline.
    """

    def __init__(
        self,
        project: str,
        key: str,
        config: dict[str, Any],
        grouping: dict[str, Any] | None = None,
        goes_on: str = "training goes on",
    ) -> None:
        self._run: Any = None
        self._goes_on = goes_on
        mode = wandb_mode()
        if mode == "disabled" or not find_spec("wandb"):
            return
        options = {"id": key, "name": key, "config": config, "resume": "allow", **(grouping or {})}
        self._run = self._safely(f"start ({mode})", lambda: start_wandb(project, mode, FINISH_TIMEOUT, **options))
        if self._run is None and mode == "online":
            self._run = self._safely("start (offline)", lambda: _start_again(project, options))

    @property
    def alive(self) -> bool:
        """Whether anything that is logged arrives somewhere."""
        return self._run is not None

    @property
    def place(self) -> dict[str, str]:
        """Where W&B has the run; empty where it has none."""
        if not self.alive:
            return {}
        return self._safely("tell where the run is", lambda: wandb_place(self._run)) or {}

    def log(self, row: dict[str, Any]) -> None:
        """Adds one row; its `step` is the position on every curve."""
        self._do("log", lambda run: run.log(row, step=row["step"]))

    def summarise(self, figures: dict[str, float]) -> None:
        """Figures of the whole run, which tables of runs show."""
        self._do("log", lambda run: run.summary.update(figures))

    def table(self, name: str, columns: list[str], rows: Callable[[Any], list[list[Any]]]) -> None:
        """Adds a table; `rows` makes its rows and is given the wandb module, whose `Image` wraps pictures."""

        def add(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=columns, data=rows(wandb))})

        self._do(f"log the table '{name}'", add)

    def finish(self) -> None:
        """Ends the run, waiting for its uploads no longer than FINISH_TIMEOUT."""
        self._do("finish", lambda run: run.finish())
        self._run = None

    def _do(self, what: str, action: Callable[[Any], Any]) -> None:
        """Does something with the run, and gives it up where that fails."""
        if self._run is not None and self._safely(what, lambda: (action(self._run),)) is None:
            self._run = None

    def _safely(self, what: str, action: Callable[[], Any]) -> Any:
        """The action's result, or None where it failed."""
        try:
            return action()
        except Exception as error:  # W&B raises many kinds
            print(f"W&B could not {what}; {self._goes_on}: {_told(error)}", flush=True)
            return None


def _told(error: Exception) -> str:
    """An error in one line; W&B's may name a server with its credentials."""
    return without_secrets(" ".join(str(error).split()))


def _start_again(project: str, options: dict[str, Any]) -> Any:
    """Starts offline after a failed start online, which still holds the run's id."""
    import wandb

    wandb.teardown()
    return start_wandb(project, "offline", FINISH_TIMEOUT, **options)
