"""What one rented node does for a training stage: fetch its inputs, train, keep checkpoints, send the results home.

`python -m flows.node STAGE` runs on every node of a job, in a clone at the job's commit. Rank 0 runs under DVC, so that
the stage's outs get their entries in dvc.lock and the run cache; the other ranks run the stage's command alone. The
status is 85 after a checkpoint on a stop signal: the same job goes on when it is started again.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.travel import LOCK_VARIABLE, inputs_of, open_repo, restore, unpack_lock
from haplovl.errors import UserError
from haplovl.files import RUNS
from haplovl.settings import ComputeProfile, load_compute
from haplovl.train.launch import EXIT_PREEMPTED, STOP_SIGNALS, free_port

STATE_VARIABLE = "HAPLOVL_STATE"
"""A folder that outlives the node and that all nodes of the job share: a mounted bucket or a network file system."""
PORT = "29400"
"""Where rank 0 waits for the others, unless HAPLOVL_PORT or the launcher says otherwise."""


@dataclass(frozen=True)
class Place:
    """Which of a job's nodes this is, and where rank 0 waits."""

    node: int
    nodes: int
    address: str
    port: str

    @classmethod
    def here(cls) -> "Place":
        """As SkyPilot or Kubeflow Trainer say; without either, the only node."""
        own = os.environ
        if "SKYPILOT_NODE_RANK" in own:
            addresses = own["SKYPILOT_NODE_IPS"].split()
            return cls(int(own["SKYPILOT_NODE_RANK"]), len(addresses), addresses[0], own.get("HAPLOVL_PORT", PORT))
        if "PET_NNODES" in own:
            nodes = own["PET_NNODES"].split(":")[-1]
            return cls(int(own["PET_NODE_RANK"]), int(nodes), own["PET_MASTER_ADDR"], own.get("PET_MASTER_PORT", PORT))
        return cls(0, 1, "127.0.0.1", str(free_port()))

    def ranks(self, compute: ComputeProfile) -> list[dict[str, str]]:
        """The environment of each rank of this node.

        Raises:
            UserError: the nodes cannot share the profile's processes evenly.
        """
        if compute.processes % self.nodes:
            raise UserError(
                f"compute profile '{compute.name}' has {compute.processes} processes, which {self.nodes} nodes cannot "
                "share evenly; change 'processes' or the number of nodes"
            )
        each = compute.processes // self.nodes
        shared = {"MASTER_ADDR": self.address, "MASTER_PORT": self.port, "WORLD_SIZE": str(compute.processes)}
        return [{**shared, "RANK": str(self.node * each + own), "LOCAL_RANK": str(own)} for own in range(each)]


def run(stage: str, compute: ComputeProfile, place: Place) -> int:
    """Runs this node's share of a stage; returns the exit status of the job here.

    Raises:
        UserError: inputs, state or profile do not fit.
    """
    if word := os.environ.get(LOCK_VARIABLE):
        unpack_lock(word)
    keep_state()
    fetch_inputs(stage)
    if restore(stage):
        print(f"{stage} was run before with these inputs; its results are in the DVC remote", flush=True)
        dvc("repro", "--single-item", "--quiet", stage)  # runs nothing, but writes dvc.lock
    else:
        code = Ranks(stage, compute, place).wait()
        if code or place.node:
            return code
    return send_results(stage) if place.node == 0 else 0


def keep_state() -> None:
    """Makes runs/training a link to the folder that outlives this node, where the job has one."""
    if not (store := os.environ.get(STATE_VARIABLE)):
        return
    target, link = Path(store).absolute() / "training", RUNS / "training"
    target.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(exist_ok=True)
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise UserError(f"{link} is a folder of this machine; move it away, as {STATE_VARIABLE} takes its place")
    link.symlink_to(target, target_is_directory=True)


def fetch_inputs(stage: str) -> None:
    """Pulls what the stage reads from the DVC remote, and nothing else."""
    repo = open_repo()
    data, _ = inputs_of(repo, stage)
    repo.close()
    if data and dvc("pull", "--quiet", *data):
        raise UserError(f"the inputs of '{stage}' are not in the DVC remote; 'dvc push {' '.join(data)}' sends them")


def send_results(stage: str) -> int:
    """Pushes the stage's outs and its entry in the run cache, by which `dvc repro --pull` finds them elsewhere."""
    code = dvc("push", "--run-cache", stage)
    print(f"{stage}: results are in the DVC remote" if code == 0 else f"error: {stage}: dvc push failed", flush=True)
    return code


def dvc(*words: str) -> int:
    """Runs DVC in this environment."""
    return subprocess.run([sys.executable, "-m", "dvc", *words], env=environment()).returncode


def environment(**more: str) -> dict[str, str]:
    """For commands of a stage: this Python's programs are found first, and output comes at once."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1", **more}


class Ranks:
    """The training processes of this node."""

    def __init__(self, stage: str, compute: ComputeProfile, place: Place) -> None:
        under_dvc = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
        alone = [sys.executable, "-m", "haplovl", "train", stage]
        self.processes: list[subprocess.Popen[str]] = []
        for rank in place.ranks(compute):
            first = rank["RANK"] == "0"
            self.processes.append(
                subprocess.Popen(
                    under_dvc if first else alone,
                    env=environment(HAPLOVL_COMPUTE=compute.name, **rank),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if first else None,
                    stderr=subprocess.STDOUT if first else None,
                    text=True,
                    start_new_session=True,
                )
            )
        self._head = _Head(self.processes[0]) if place.node == 0 else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        """Asks every rank for a checkpoint, as Ctrl-C would: DVC waits for its command then, but dies of SIGTERM."""
        self._send(signal.SIGINT)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def wait(self) -> int:
        """Waits for all ranks; when one fails the others are ended. Returns the status of the first that failed."""
        while any(process.poll() is None for process in self.processes):
            if any(code not in (None, 0, EXIT_PREEMPTED) for code in self._codes()):
                self._send(signal.SIGKILL)
            time.sleep(0.1)
        codes = self._codes()
        failed = [code for code in codes if code > 0 and code != EXIT_PREEMPTED]
        # A rank that was killed here has a negative code; the reason is the rank that failed by itself.
        return failed[0] if failed else EXIT_PREEMPTED if EXIT_PREEMPTED in codes else int(min(codes) != 0)

    def _codes(self) -> list[int | None]:
        codes = [process.poll() for process in self.processes]
        if self._head is not None and codes[0] is not None:
            codes[0] = self._head.status(codes[0])
        return codes


class _Head:
    """Passes on what DVC prints, and reads from it the status of the stage's command, which DVC's own status hides."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._found: int | None = None
        self._reader = threading.Thread(target=self._pass_on, args=(process,), daemon=True)
        self._reader.start()

    def _pass_on(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if match := re.search(r"failed to run: .*exited with (-?\d+)", line):
                self._found = int(match[1])

    def status(self, of_dvc: int) -> int:
        """The command's own exit status once DVC has ended; 128 + n after signal n, as shells have it."""
        self._reader.join(5)
        if of_dvc == 0 or self._found is None:
            return of_dvc
        return self._found if self._found >= 0 else 128 - self._found


def main() -> None:
    """Runs this node's share and exits with its status."""
    parser = argparse.ArgumentParser(prog="python -m flows.node", description="One node's share of a training stage.")
    parser.add_argument("stage", choices=["stage1", "stage2"])
    parser.add_argument("--compute", metavar="PROFILE", help="default: $HAPLOVL_COMPUTE")
    arguments = parser.parse_args()
    try:
        sys.exit(run(arguments.stage, load_compute(arguments.compute), Place.here()))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
