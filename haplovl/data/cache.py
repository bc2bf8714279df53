"""A folder of files that can be made again, named after what they are made from; safe to delete at any time."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from haplovl.files import RUNS

CACHE = RUNS / "cache"


def take(kept: Path, target: Path) -> None:
    """Puts a kept file at `target` too, as a second name of the same content where the file system can."""
    try:
        os.link(kept, target)
    except OSError:
        shutil.copyfile(kept, target)
    os.utime(kept)  # used last: `trim` leaves it for longer


def trim(folder: Path, most_bytes: int, keep: Collection[Path] = ()) -> None:
    """Removes the files that were not used for longest until the folder has at most so many bytes; never `keep`."""
    found = []
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except OSError:  # another process cleans up as well
            continue
        if path.is_file():
            found.append((status.st_mtime, path, status.st_size))
    total = sum(size for _, _, size in found)
    for _, path, size in sorted(found):
        if total <= most_bytes:
            return
        if path not in keep:
            path.unlink(missing_ok=True)
            total -= size
