"""Cells of Parquet files by row, read forward in small batches: a table's pictures are never all in memory."""

import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from haplovl.pictures import MAX_FILE_BYTES, ImageError

BATCH = 16
"""Rows that are decoded at a time: pictures are large."""
BATCHES_KEPT = 4
"""Batches behind the newest that can be read again: threads ask for rows a little out of order."""
FILES_KEPT = 4


class CellReader:
    """Reads single cells; quick where rows are asked for in about their order. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cursors: OrderedDict[tuple[Path, str], _Cursor] = OrderedDict()

    def read(self, path: Path, row: int, column: str, index: int | None = None) -> bytes:
        """The image file in a cell: bytes, a `datasets` image (bytes and path), or element `index` of a list of them.

        Raises:
            ImageError: the file is missing or damaged, or there is no image file in that cell.
        """
        import pyarrow as pa

        try:
            with self._lock:
                value = self._cursor(path, column).cell(row)
        except (OSError, pa.ArrowException, IndexError, KeyError) as error:
            raise ImageError(f"the table cannot be read: {' '.join(str(error).split())}") from None
        if index is not None:
            value = value[index] if isinstance(value, list) and index < len(value) else None
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            found = "text; only pictures inside the table are read" if isinstance(value, str) else type(value).__name__
            raise ImageError(f"the table's cell must hold an image file, found {found}")
        if len(value) > MAX_FILE_BYTES:
            raise ImageError(f"the file is larger than {MAX_FILE_BYTES} bytes")
        return value

    def _cursor(self, path: Path, column: str) -> "_Cursor":
        key = (path, column)
        if key not in self._cursors:
            self._cursors[key] = _Cursor(path, column)
            while len(self._cursors) > FILES_KEPT:
                self._cursors.popitem(last=False)
        self._cursors.move_to_end(key)
        return self._cursors[key]


class _Cursor:
    """One column of one file."""

    def __init__(self, path: Path, column: str) -> None:
        import pyarrow.parquet as pq

        self.file, self.column = pq.ParquetFile(path, memory_map=True), column
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.group, self.next = -1, 0
        self.batches: Iterator[Any] = iter(())
        self.recent: deque[tuple[int, Any]] = deque(maxlen=BATCHES_KEPT + 1)

    def cell(self, row: int) -> Any:
        """One value as a Python object."""
        while True:
            for start, values in self.recent:
                if start <= row < start + len(values):
                    return values[row - start].as_py()
            group = bisect_right(self.starts, row) - 1
            if not 0 <= group < len(self.starts) - 1:
                raise IndexError(f"there is no row {row}")
            if group != self.group or row < self.next:
                self.batches = self.file.iter_batches(BATCH, row_groups=[group], columns=[self.column])
                self.group, self.next = group, self.starts[group]
            values = next(self.batches, None)
            if values is None:
                raise IndexError(f"there is no row {row}")
            self.recent.append((self.next, values.column(0)))
            self.next += len(values)
