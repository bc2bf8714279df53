"""Commands that lead a process group of their own, and how they are ended."""

import os
import signal
import subprocess
from contextlib import suppress

INTERRUPT_SECONDS = 20
"""How long an interrupted command may take, to write its checkpoint say, before it is killed."""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Interrupts the command as Ctrl-C would, then kills what is left of its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPT_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
