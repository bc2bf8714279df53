"""Faults, injected into a small project while stage 2 trains, and whether the final outs are those of a quiet run.

    python benchmarks/drill.py [--json FILE] [--folder FOLDER] [--only NAME ...]

Every drill starts before stage 1, meets its fault, is mended as docs/pipeline.md says, and is judged by the hashes of
all outs in dvc.lock: they must be those of the run that nothing disturbed. A drill that cannot run here (no root, no
Slurm) is not counted and says why.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml
from drill_project import Project, Server, end, kill, make_project, until
from rich.console import Console
from rich.table import Table

KILLED_AT = 40
PORT = 4311


@dataclass
class Outcome:
    """What became of a drill."""

    fault: str
    survived: bool | None
    """None: it could not run here."""
    seconds_to_resume: float | None = None
    """From the fault to the first step of training after it, the command that goes on included."""
    note: str = ""


class Unavailable(Exception):
    """What the drill needs is not here."""


def machine_dies(project: Project) -> float:
    """Flow, DVC and training are killed at once; `make pipeline` again."""
    flow = project.flow()
    until(lambda: project.steps() >= KILLED_AT, flow)
    began = time.monotonic()
    kill(psutil.Process(flow.pid))
    return _go_on(project, began)


def corrupt_checkpoint(project: Project) -> float:
    """As before, and the newest checkpoint has lost its end."""
    flow = project.flow()
    until(lambda: project.steps() >= KILLED_AT, flow)
    began = time.monotonic()
    kill(psutil.Process(flow.pid))
    newest = max(project.folder.glob("runs/training/stage2-*/step-*/rank-*.safetensors"), key=os.path.getmtime)
    os.truncate(newest, newest.stat().st_size // 2)
    resumed = _go_on(project, began)
    assert "is damaged" in project.said(), "the damaged checkpoint was not named"
    return resumed


def disk_full(project: Project) -> float:
    """The file system of the training state is filled up while stage 2 writes checkpoints; then space is made."""
    runs = project.folder / "runs"
    (runs / "training").mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "drill", str(runs / "training")],
                      capture_output=True).returncode:  # fmt: skip
        raise Unavailable("needs the right to mount a file system (root)")
    try:
        flow = project.flow()
        until(lambda: project.steps() >= KILLED_AT, flow)
        filler = runs / "training/filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1M"], capture_output=True)
        began = time.monotonic()
        assert flow.wait(600) != 0, "the flow did not notice"
        assert "No space left on device" in project.said(), "the error does not say that the disk is full"
        filler.unlink()
        resumed = _go_on(project, began)
    finally:
        subprocess.run(["umount", str(runs / "training")], check=False)
    return resumed


def no_network_to_wandb(project: Project) -> None:
    """W&B is asked for online, at an address where nobody answers."""
    flow = project.flow(WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert flow.wait(900) == 0, "the flow failed"


def worker_dies(project: Project) -> float:
    """The worker of `make serve` and the run that it started are killed; `make serve` and the deployment again."""
    return _serve_and_kill(project, "worker")


def server_dies(project: Project) -> float:
    """The Prefect server of `make serve` is killed while a deployment runs; `make serve` and the deployment again."""
    return _serve_and_kill(project, "server")


def _serve_and_kill(project: Project, part: str) -> float:
    server = Server(project, PORT)
    server.prefect("deployment", "run", "haplovl-full/haplovl-full", "-p", "compute=one-core")
    until(lambda: project.steps() >= KILLED_AT, server.process)
    began = time.monotonic()
    victim = server.part(part)
    kill(victim) if part == "worker" else victim.kill()
    assert server.process.wait(120) != 0, "make serve did not end"
    server = Server(project, PORT)
    try:
        server.prefect("deployment", "run", "haplovl-full/haplovl-full", "-p", "compute=one-core")
        resumed = until(lambda: "continuing after step" in _log(project), server.process)
        until(lambda: "COMPLETED" in server.states(), server.process)
    finally:
        end(server.process)
    return resumed - began


def _log(project: Project) -> str:
    worker = project.folder / "runs/prefect-server/worker.log"
    return worker.read_text(errors="replace") if worker.exists() else ""


def two_retrains_at_once(project: Project) -> None:
    """The deployment is run twice at the same moment; one waits for the other."""
    server = Server(project, PORT)
    try:
        for _ in range(2):
            server.prefect("deployment", "run", "haplovl-full/haplovl-full", "-p", "compute=one-core")
        most = 0

        def both_done() -> bool:
            nonlocal most
            states = server.states()
            most = max(most, states.count("RUNNING"))
            return states == ["COMPLETED"] * 2

        until(both_done, server.process, seconds=900)
    finally:
        end(server.process)
    assert most == 1, f"{most} runs at once"


def node_dies(project: Project) -> float:
    """A node of a real two-node Slurm cluster is killed under the job of stage 2, and comes back."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/helpers"))
    from local_slurm import LocalSlurm, missing

    if reason := missing():
        raise Unavailable(reason)
    profile = {"name": "job", "launcher": "slurm", "device": "cpu", "processes": 1, "threads": 1, "zero_stage": 0,
               "micro_batch_rows": 64, "loader_workers": 1, "attention": "eager",
               "slurm": {"nodes": 1, "options": ["--nodelist=gpu2"]}}  # fmt: skip
    (project.folder / "infra/compute/job.yaml").write_text(yaml.safe_dump(profile))
    cluster = LocalSlurm()
    try:
        command = cluster.command(sys.executable, "-m", "flows.pipeline", "--compute", "job", folder=project.folder)
        flow = project.start(*command, SLURM_CONF=cluster.environment["SLURM_CONF"])
        until(lambda: project.steps() >= KILLED_AT, flow)
        began = time.monotonic()
        cluster.kill_node("gpu2")
        until(lambda: cluster.run("sinfo", "-h", "-n", "gpu2", "-o", "%t").stdout.strip().startswith("down"), flow)
        cluster.revive("gpu2")
        resumed = until(lambda: "continuing after step" in project.said(), flow)
        assert flow.wait(900) == 0, "the flow failed"
    finally:
        cluster.end()
    return resumed - began


def _go_on(project: Project, began: float) -> float:
    """The same command again, to its end; seconds from the fault to the first step after it."""
    before = project.said().count("continuing after step")
    flow = project.flow()
    resumed = until(lambda: project.said().count("continuing after step") > before, flow)
    assert flow.wait(900) == 0, "the flow that goes on failed"
    return resumed - began


DRILLS: dict[str, Callable[[Project], float | None]] = {
    function.__name__: function
    for function in (
        machine_dies, corrupt_checkpoint, disk_full, no_network_to_wandb, worker_dies, server_dies, node_dies,
        two_retrains_at_once,
    )
}  # fmt: skip


def drill(base: Project, name: str) -> Outcome:
    """One fault on a copy of the project."""
    project = base.copy(name)
    try:
        seconds = DRILLS[name](project)
    except Unavailable as reason:
        return Outcome(name, None, note=str(reason))
    except (AssertionError, RuntimeError, TimeoutError, OSError, subprocess.SubprocessError) as error:
        return Outcome(name, False, note=f"{error}; see {project.log}")
    wrong = [path for path, digest in base.outs().items() if project.outs().get(path) != digest]
    return Outcome(name, not wrong, seconds, f"other outs: {', '.join(wrong)}" if wrong else "same outs")


def undisturbed(folder: Path) -> Project:
    """The project after a run that nothing disturbed.

    Raises:
        SystemExit: that run failed.
    """
    project = make_project(folder / "undisturbed")
    if project.flow().wait(1200):
        raise SystemExit(f"error: the undisturbed run failed; see {project.log}")
    return project


def main() -> None:
    """Runs the drills, prints a table, exits with 1 when one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, help="where the projects are made; default: a new temporary folder")
    parser.add_argument("--only", nargs="+", choices=DRILLS, default=list(DRILLS), metavar="NAME")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="drill-"))
    base, outcomes = undisturbed(folder), []
    for name in options.only:
        print(f"{name} ...", flush=True)
        outcomes.append(drill(base, name))
        print(f"    {outcomes[-1]}", flush=True)
    show(outcomes)
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    sys.exit(any(outcome.survived is False for outcome in outcomes))


def show(outcomes: list[Outcome]) -> None:
    """Prints the table."""
    table = Table(title="Faults, judged by the hashes of all final outs", title_justify="left")
    for column in ("fault", "survived", "s to resume", "note"):
        table.add_column(column)
    for outcome in outcomes:
        survived = {None: "not run", True: "yes", False: "NO"}[outcome.survived]
        resumed = "" if outcome.seconds_to_resume is None else f"{outcome.seconds_to_resume:.1f}"
        table.add_row(outcome.fault, survived, resumed, outcome.note)
    Console().print(table)


if __name__ == "__main__":
    main()
