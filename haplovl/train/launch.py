"""Starts one training process per rank on this machine and passes signals and exit codes on."""

import atexit
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any, NoReturn

import psutil

EXIT_PREEMPTED = 85
"""Exit status after a checkpoint on a stop signal: run the same command again to go on."""
STORE = "HAPLOVL_STORE"
"""Variable with the file over which the ranks of one machine find each other: torch's own way, a port, would be open
to the whole network."""
PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C, so that what is in progress can end in order."""

    def __init__(self) -> None:
        self.asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True


def launch(arguments: list[str], processes: int) -> NoReturn:
    """Runs `haplovl` with these arguments as ranks 0 … processes − 1 and exits as they do.

    When one rank fails the others are ended; the exit status is that of the first that failed.
    """
    rendezvous = {**on_this_machine(), STORE: meeting_place(), "WORLD_SIZE": str(processes)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "haplovl", *arguments],
            env={**os.environ, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=_end_with_launcher,
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, _: Any) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    while None in [rank.poll() for rank in ranks]:  # all of them: any() would ask no further than the first that runs
        failed = [rank.returncode for rank in ranks if rank.returncode not in (None, 0, EXIT_PREEMPTED)]
        if failed:
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    codes = [rank.wait() for rank in ranks]
    # Without this, a rank that died of a signal would end the command in silence.
    dead = {number: signal.Signals(-code).name for number, code in enumerate(codes) if code < 0}
    if dead:
        print(f"ranks that a signal ended: {dead}", file=sys.stderr, flush=True)
    # A rank that was killed here has a negative code; the reason is the rank that failed by itself.
    sys.exit(max(codes) if max(codes) > 0 else int(min(codes) != 0))


def _end_with_launcher() -> None:
    """Has the kernel send SIGTERM to a rank whose launcher was killed: nobody else would end it."""
    with suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def on_this_machine() -> dict[str, str]:
    """The environment in which gloo and NCCL talk over the loopback interface alone."""
    own = [name for name, found in psutil.net_if_addrs().items() if "127.0.0.1" in {at.address for at in found}]
    interface = {f"{library}_SOCKET_IFNAME": name for name in own[:1] for library in ("GLOO", "NCCL")}
    # DeepSpeed looks for MPI where nothing names an address; nobody listens on this one.
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **interface}


def meeting_place() -> str:
    """The path of a file that only this user may read; its folder is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="haplovl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.path.join(folder, "ranks")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def adopt_slurm() -> None:
    """Takes rank and rendezvous from Slurm, where `srun` started this process and nobody else has set them."""
    own = os.environ
    if "RANK" in own or int(own.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    own["RANK"], own["LOCAL_RANK"] = own["SLURM_PROCID"], own["SLURM_LOCALID"]
    own["WORLD_SIZE"] = own["SLURM_STEP_NUM_TASKS"]
    if "MASTER_ADDR" not in own:
        first = _scontrol("hostnames", own["SLURM_STEP_NODELIST"]).split()[0]
        # The address by which Slurm itself reaches the node, as its name need not be known to the others.
        own["MASTER_ADDR"] = re.search(r"NodeAddr=(\S+)", _scontrol("node", first))[1]
    # Equal on all nodes, and another one for every job and step.
    job = 100 * int(own["SLURM_JOB_ID"]) + int(own["SLURM_STEP_ID"])
    own.setdefault("MASTER_PORT", str(20000 + job % 20000))


def _scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", "show", *words], capture_output=True, text=True, check=True).stdout
