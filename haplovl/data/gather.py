"""One pass over the raw data: every entry's facts to disk, every picture decoded once, and short columns of both.

Memory: some 60 bytes per entry and 150 per picture; everything longer waits in a file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from haplovl.data.across import NO_SPLIT, Rows
from haplovl.data.entry_facts import ReadEntries, read_rows
from haplovl.data.picture_facts import SCHEMA, ReadPictures, read_pictures
from haplovl.progress import reporter
from haplovl.records import SPLITS, RawItem


@dataclass
class Entries:
    """All entries: their facts in the Arrow file `path`, and their short columns.

    `asked` marks entries with a question that an evaluation set asks, too. `named` marks the elements of
    `rows.pictures` that name their picture for the first time.
    """

    path: Path
    rows: Rows
    asked: np.ndarray
    named: np.ndarray

    def batches(self, columns: list[str] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The facts (some columns, if they are named) in order, each batch with the row that it starts at."""
        start = 0
        with pa.OSFile(str(self.path)) as source:
            wanted = None
            if columns is not None:
                schema = pa.ipc.open_file(source).schema
                wanted = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in columns])
            file = pa.ipc.open_file(source, options=wanted)
            for number in range(file.num_record_batches):
                batch = file.get_batch(number)
                yield start, batch
                start += batch.num_rows

    def places(self) -> Iterator[tuple[str, str]]:
        """Source and reference of every picture, in the order of their numbers."""
        for start, batch in self.batches(["source", "refs"]):
            own = self.rows.starts[start : start + batch.num_rows + 1]
            new = self.named[own[0] : own[-1]]
            if new.any():
                refs = batch["refs"].flatten().to_pylist()
                sources = np.repeat(batch["source"].to_pylist(), np.diff(own)).tolist()
                yield from ((sources[i], refs[i]) for i in np.flatnonzero(new))


def gather_entries(
    items: Iterable[RawItem],
    work: ReadEntries,
    path: Path,
    sources: list[str],
    asked: set[int],
    total: int,
    processes: int | None,
) -> Entries:
    """Reads every entry once. `asked` are the question keys of evaluation sets; `total` is for the progress bar."""
    columns = _Columns(sources, np.array(sorted(asked), dtype=np.uint64))
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    writer = None
    try:
        with reporter("entries", total) as report:
            for batch in read_rows(items, work, processes):
                if writer is None:
                    writer = pa.ipc.new_file(str(path), batch.schema, options=options)
                writer.write_batch(batch)
                report.update(columns.add(batch))
    finally:
        if writer is not None:
            writer.close()
    return columns.finish(path)


class _Columns:
    """Collects the short columns, batch by batch."""

    def __init__(self, sources: list[str], asked: np.ndarray) -> None:
        self.numbers = {name: number for number, name in enumerate(sources)}
        self.asked_keys = asked
        self.count = 0
        self.parts: dict[str, list[np.ndarray]] = {
            name: [] for name in ("readable", "source", "declared", "place", "images", "asked")
        }
        self.ids: list[pa.Array] = []
        self.refs: list[pa.Array] = []

    def add(self, batch: pa.RecordBatch) -> int:
        """Takes in a batch; returns the number of entries so far."""
        self.count += batch.num_rows
        parts = self.parts
        splits = {name: number for number, name in enumerate(SPLITS)}
        declared = [splits.get(name, NO_SPLIT) for name in batch["split"].to_pylist()]
        parts["readable"].append(batch["kind"].is_valid().to_numpy(zero_copy_only=False))
        parts["source"].append(np.array([self.numbers[name] for name in batch["source"].to_pylist()], dtype=np.int16))
        parts["declared"].append(np.array(declared, dtype=np.int8))
        parts["place"].append(batch["split_place"].fill_null(0).to_numpy(zero_copy_only=False))
        parts["images"].append(_lengths(batch["refs"]))
        parts["asked"].append(self._asked(batch["question_keys"]))
        self.ids.append(batch["id_key"])
        self.refs.append(batch["ref_keys"].flatten())
        return self.count

    def _asked(self, keys: pa.ListArray) -> np.ndarray:
        asked = np.zeros(len(keys), dtype=bool)
        if len(self.asked_keys):
            found = np.isin(keys.flatten().to_numpy(zero_copy_only=False), self.asked_keys)
            asked[np.repeat(np.arange(len(keys)), _lengths(keys))[found]] = True
        return asked

    def finish(self, path: Path) -> Entries:
        """The columns in one piece."""
        if not self.count:
            return Entries(path, *_nothing())
        whole = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        starts = np.r_[0, np.cumsum(whole["images"], dtype=np.int64)]
        pictures = _codes(self.refs)
        named = np.zeros(len(pictures), dtype=bool)
        named[np.unique(pictures, return_index=True)[1]] = True
        short = (whole["readable"], whole["source"], whole["declared"], whole["place"])
        return Entries(path, Rows(*short, _codes(self.ids), starts, pictures), whole["asked"], named)


def _nothing() -> tuple[Rows, np.ndarray, np.ndarray]:
    empty = np.empty(0, dtype=np.int64)
    return Rows(empty == 0, empty, empty, empty, empty, np.zeros(1, dtype=np.int64), empty), empty == 0, empty == 0


def _codes(keys: list[pa.Array]) -> np.ndarray:
    """Equal numbers for equal keys, counted in the order in which they appear; -1 for null."""
    chunks = pa.chunked_array(keys).combine_chunks().dictionary_encode()
    return chunks.indices.fill_null(-1).to_numpy(zero_copy_only=False)


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)


@dataclass
class Pictures:
    """All pictures that entries name, by number: `table` as haplovl.data.picture_facts.SCHEMA has it, and columns."""

    table: pa.Table
    fine: np.ndarray
    sha256: np.ndarray
    look: np.ndarray
    hashed: np.ndarray
    width: np.ndarray
    height: np.ndarray

    def name(self, number: int) -> str:
        """The reference of a picture."""
        return self.table["ref"][number].as_py()

    def error(self, number: int) -> str:
        """Why a picture cannot be used."""
        return self.table["error"][number].as_py()


def gather_pictures(entries: Entries, work: ReadPictures, processes: int | None) -> Pictures:
    """Decodes every picture that an entry names once."""
    batches, done = [], 0
    with reporter("pictures", int(entries.named.sum())) as report:
        for batch in read_pictures(entries.places(), work, processes):
            batches.append(batch)
            done += batch.num_rows
            report.update(done)
    table = pa.Table.from_batches(batches, schema=SCHEMA).combine_chunks()
    whole = {name: _one_piece(table[name]) for name in ("sha256", "look", "width", "height", "error")}
    return Pictures(
        table,
        fine=whole["error"].is_null().to_numpy(zero_copy_only=False),
        sha256=_bytes(whole["sha256"]),
        look=whole["look"].fill_null(0).to_numpy(zero_copy_only=False),
        hashed=whole["look"].is_valid().to_numpy(zero_copy_only=False),
        width=whole["width"].fill_null(0).to_numpy(zero_copy_only=False),
        height=whole["height"].fill_null(0).to_numpy(zero_copy_only=False),
    )


def _one_piece(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)


def _bytes(values: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The bytes of fixed-size values, uint8 [N, size]; zeros for null."""
    size = values.type.byte_width
    flat = values.fill_null(b"\0" * size)
    data = np.frombuffer(flat.buffers()[1] or b"", dtype=np.uint8)
    return data[flat.offset * size : (flat.offset + len(flat)) * size].reshape(-1, size)
