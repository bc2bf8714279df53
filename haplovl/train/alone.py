"""One training at a time in a folder of training state."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from haplovl.errors import UserError
from haplovl.files import RUNS
from haplovl.train.checkpoint import is_main

LOCKS = RUNS / "locks"
OTHERS_SECONDS = 60.0
"""How long another one is waited for: a training whose launcher was killed writes a checkpoint and ends."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder of training state while the block runs; the main rank holds the lock.

    Raises:
        UserError: another one goes on in it; names its process.
    """
    if not is_main():
        yield
        return
    LOCKS.mkdir(parents=True, exist_ok=True)
    with (LOCKS / folder.name).open("a+", encoding="utf-8") as file:
        until = time.monotonic() + OTHERS_SECONDS
        while not _locked(file):
            if time.monotonic() > until:
                file.seek(0)
                raise UserError(f"another training writes {folder} ({file.read().strip()}); wait for it, or end it")
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}")
        file.flush()
        yield


def _locked(file: TextIO) -> bool:
    """Takes a file for this process alone until it is closed; True also where a file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
