"""Starts one training process per rank on this machine and passes signals and exit codes on."""

import os
import signal
import subprocess
import sys
import time
from typing import Any, NoReturn

from haplovl.train.engine import free_port

EXIT_PREEMPTED = 85
"""Exit status after a checkpoint on a stop signal: run the same command again to go on."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def launch(arguments: list[str], processes: int) -> NoReturn:
    """Runs `haplovl` with these arguments as ranks 0 … processes − 1 and exits as they do.

    When one rank fails the others are ended; the exit status is that of the first that failed.
    """
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "haplovl", *arguments],
            env={**os.environ, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, _: Any) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    while any(rank.poll() is None for rank in ranks):
        failed = [rank.returncode for rank in ranks if rank.returncode not in (None, 0, EXIT_PREEMPTED)]
        if failed:
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    codes = [rank.wait() for rank in ranks]
    # A rank that was killed here has a negative code; the reason is the rank that failed by itself.
    sys.exit(max(codes) if max(codes) > 0 else int(min(codes) != 0))
