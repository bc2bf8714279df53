"""Commands that lead a process group of their own, and how they are ended."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

INTERRUPT_SECONDS = 300
"""How long an interrupted command may take before it is killed: a checkpoint of a large model takes minutes."""
PATIENCE_SECONDS = 5
"""After that, people are told what is being waited for."""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Interrupts the command as Ctrl-C would, then kills what is left of its process group; at once on a new Ctrl-C."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(KeyboardInterrupt):
        _wait(process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_SECONDS)
        return
    print("waiting for the stage to write a checkpoint and end; Ctrl-C again kills it", file=sys.stderr, flush=True)
    with suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPT_SECONDS - PATIENCE_SECONDS)
