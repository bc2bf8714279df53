"""The project that faults are injected into: the committed code with a small recipe, run once undisturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.request import Request, urlopen
from uuid import uuid4

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPE = {
    "collect.sources.0": {"train_records": 400, "validation_records": 20, "test_records": 60},
    "teachers.vision": {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "steps": 4, "batch": 16},
    "teachers.language": {"vocabulary": 400, "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2,
                          "steps": 4, "batch": 8},
    "stage1": {"steps": 10, "checkpoint_every": 5},
    "stage2": {"steps": 150, "checkpoint_every": 10, "curriculum": [{"share": 0.6, "epochs": 1}]},
    "probe": {"records": 20, "zero_shot_pictures": 60, "fit_pictures": 60},
    "evaluate": {"questions_per_type": 10},
    "register": {"min_accuracy": 0.0, "min_margin": -1.0},
}  # fmt: skip
"""Large enough to be killed in the middle of stage 2, small enough to be run a dozen times."""
ONE_CORE = {"OMP_NUM_THREADS": "1", "HAPLOVL_COMPUTE": "one-core"}
TRAINED = ("stage1", "probe", "stage2", "evaluate", "register")
"""Stages that every drill runs again."""
OUTS = ("models/stage1", "models/stage2", "reports/stage1", "reports/evaluation", "metrics/stage1.json",
        "metrics/evaluation.json", "candidate", "runs/training", "runs/slurm", ".dvc/cache/runs")  # fmt: skip


class Project:
    """A folder with the project; `log` is what its flows and servers printed, `machine` what they may use of it."""

    def __init__(self, folder: Path, machine: dict[str, str] = ONE_CORE) -> None:
        self.folder, self.machine = folder, machine
        self.log = folder.parent / f"{folder.name}.log"

    @property
    def environment(self) -> dict[str, str]:
        """What a new user has: no W&B key, no Prefect server; one database for all drills, which takes long to make."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "WANDB_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"PATH": path, "WANDB_MODE": "offline", "DVC_NO_ANALYTICS": "1",
               "PREFECT_HOME": str(self.folder.parent / "prefect")}  # fmt: skip
        return kept | own | self.machine

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """A command in a process group of its own, its output in the log."""
        with self.log.open("ab") as output:
            return subprocess.Popen(
                list(command), cwd=self.folder, env=self.environment | environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def flow(self, **environment: str) -> subprocess.Popen:
        """`make pipeline`."""
        return self.start(sys.executable, "-m", "flows.pipeline", **environment)

    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps(self) -> int:
        """Steps of stage 2 in its newest complete checkpoint."""
        found = [int(path.name.partition("-")[2]) for path in self.folder.glob("runs/training/stage2-*/step-*")
                 if list(path.glob("rank-*.json"))]  # fmt: skip
        return max(found, default=0)

    def outs(self) -> dict[str, str]:
        """Hash of every out of every stage, as dvc.lock has it."""
        lock = yaml.safe_load((self.folder / "dvc.lock").read_text())
        return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", [])}

    def copy(self, name: str) -> "Project":
        """The project as it is before stage 1, whatever its cache holds."""
        target = self.folder.parent / name
        shutil.copytree(self.folder, target, symlinks=True)
        for out in OUTS:
            path = target / out
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        lock = yaml.safe_load((target / "dvc.lock").read_text())
        lock["stages"] = {name: stage for name, stage in lock["stages"].items() if name not in TRAINED}
        (target / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
        return Project(target, self.machine)


def make_project(folder: Path, recipe: dict = RECIPE, machine: dict[str, str] = ONE_CORE) -> Project:
    """A clone of the working tree with a recipe (places of params.yaml and their values) committed, not run yet."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for place, values in recipe.items():
        section = params
        for part in place.split("."):
            section = section[int(part) if part.isdigit() else part]
        section.update(values)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    who = ["-c", "user.name=drill", "-c", "user.email=drill@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "recipe"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return Project(folder, machine)


def until(happened: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 600.0) -> float:
    """Waits; returns the time at which it happened.

    Raises:
        TimeoutError: it did not.
        RuntimeError: the process ended first.
    """
    end = time.monotonic() + seconds
    while not happened():
        if process is not None and process.poll() is not None and not happened():
            raise RuntimeError(f"the command ended (exit status {process.returncode}) before it happened")
        if time.monotonic() > end:
            raise TimeoutError(f"it did not happen within {seconds:.0f} s")
        time.sleep(0.05)
    return time.monotonic()


def kill(*processes: psutil.Process) -> None:
    """SIGKILL to processes and all that they started, as when a machine dies."""
    family = [one for process in processes for one in (process, *process.children(recursive=True))]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)


def end(process: subprocess.Popen) -> None:
    """Ends a command as Ctrl-C does."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(120)


class Server:
    """`make serve` of a project, on a port of its own."""

    def __init__(self, project: Project, port: int) -> None:
        self.project, self.port = project, port
        self.url = f"http://127.0.0.1:{port}/api"
        before = project.said().count("Ctrl-C ends")
        self.process = project.start(sys.executable, "-m", "flows.serve", "--port", str(port))
        until(lambda: project.said().count("Ctrl-C ends") > before, self.process)

    def part(self, name: str) -> psutil.Process:
        """Its `server` or `worker`."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if f"prefect {name} start" in " ".join(child.cmdline()))

    def prefect(self, *words: str) -> None:
        """A command of Prefect's."""
        environment = self.project.environment | {"PREFECT_API_URL": self.url}
        subprocess.run([sys.executable, "-m", "prefect", *words], cwd=self.project.folder, env=environment, check=True,
                       capture_output=True)  # fmt: skip

    def emit(self, name: str, resource: str) -> None:
        """Sends an event, which `prefect event emit` does only after some seconds of starting."""
        event = {"occurred": datetime.now(UTC).isoformat(), "event": name, "id": str(uuid4()),
                 "resource": {"prefect.resource.id": resource}}  # fmt: skip
        headers = {"Content-Type": "application/json"}
        urlopen(Request(f"{self.url}/events", data=json.dumps([event]).encode(), headers=headers), timeout=10).close()

    def runs(self) -> list[dict]:
        """All flow runs but those inside others, as the server describes them."""
        request = Request(f"{self.url}/flow_runs/filter", data=b"{}", headers={"Content-Type": "application/json"})
        with urlopen(request, timeout=10) as answer:
            return [run for run in json.load(answer) if run["parent_task_run_id"] is None]

    def states(self) -> list[str]:
        """The types of the flow runs' states."""
        return sorted(run["state_type"] for run in self.runs())
