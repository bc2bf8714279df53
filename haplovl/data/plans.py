"""The rows of one epoch as numbers: packed once, kept on disk, and any row found at once afterwards."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haplovl.data import packing
from haplovl.data.cache import CACHE, trim
from haplovl.data.packing import Row
from haplovl.files import sha256_of
from haplovl.settings import fingerprint

PLANS = CACHE / "packing"
MOST_BYTES = 1 << 30
"""Most bytes of kept plans: about 60 epochs of a million records."""
LEAST_RECORDS = 10_000
"""Fewer records are packed faster than their plan would be worth."""
_HEADER = 3


class Plan:
    """Rows of one epoch, those that were asked for so far: record numbers, and where documents and rows end.

    Memory: 4 bytes for each record and document, 4 for each row. An epoch that was packed to its end is kept at `path`,
    from where a later plan reads single rows.
    """

    def __init__(self, pack: Callable[[], Iterator[Row]], path: Path | None = None) -> None:
        self._path = path
        self._records, self._documents, self._rows = (array("i") for _ in range(3))
        self._more: Iterator[Row] | None = None
        if path is None or not self._load(path):
            self._more = pack()

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, rows: int) -> bool:
        """Whether the epoch has so many rows; packs up to there."""
        while len(self._rows) < rows and self._more is not None:
            row = next(self._more, None)
            if row is None:
                self._more = None
                self._keep()
            else:
                self._add(row)
        return len(self._rows) >= rows

    def row(self, number: int) -> Row:
        """Row `number`, which `has` knows already."""
        first, last = self._rows[number - 1] if number else 0, self._rows[number]
        starts = [int(self._documents[first - 1]) if first else 0, *map(int, self._documents[first:last])]
        return [list(map(int, self._records[a:b])) for a, b in zip(starts, starts[1:], strict=False)]

    def _add(self, row: Row) -> None:
        for document in row:
            self._records.extend(document)
            self._documents.append(len(self._records))
        self._rows.append(len(self._documents))

    def _keep(self) -> None:
        if self._path is None:
            return
        parts = (self._records, self._documents, self._rows)
        numbers = np.concatenate([np.array([len(part) for part in parts], np.int32), *map(np.asarray, parts)])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")  # every rank packs the same
        with partial.open("wb") as file:
            np.save(file, numbers.astype(np.int32))
        partial.replace(self._path)
        trim(PLANS, MOST_BYTES, {self._path})

    def _load(self, path: Path) -> bool:
        try:
            numbers = np.load(path, mmap_mode="r", allow_pickle=False)
            os.utime(path)
        except (OSError, ValueError, EOFError):
            return False  # not kept, or damaged
        if len(numbers) < _HEADER or len(numbers) != _HEADER + sum(map(int, numbers[:_HEADER])):
            return False
        ends = np.cumsum([_HEADER, *numbers[:_HEADER]]).tolist()
        self._records, self._documents, self._rows = (numbers[a:b] for a, b in zip(ends, ends[1:], strict=False))
        return True


def plan_key(columns: Sequence[Sequence[Any]], settings: Any) -> str:
    """What an epoch's rows follow from: the records' columns, settings, and the packing's code."""
    digest = hashlib.sha256(sha256_of(Path(packing.__file__)).encode())
    digest.update(fingerprint(settings).encode())
    for column in columns:
        words = not column or isinstance(column[0], str)
        digest.update("\n".join(column).encode() if words else array("i", column).tobytes())
        digest.update(b"\0")
    return digest.hexdigest()
