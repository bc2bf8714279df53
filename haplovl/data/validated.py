"""The table of validated records: what `validate` accepts, as one Parquet file that refers to the raw images."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from haplovl.files import VALIDATED, require
from haplovl.records import Record, Turn

FILE_NAME = "records.parquet"
ROWS_PER_GROUP = 4096

_text = pa.string()
TURNS = pa.list_(pa.struct({"question": _text, "answer": _text, "kind": _text}))
IMAGES = pa.list_(pa.struct({"path": _text, "sha256": _text, "width": pa.int32(), "height": pa.int32()}))
SCHEMA = pa.schema(
    {
        "id": _text,
        "split": _text,
        "kind": _text,
        "source": _text,
        "system": _text,
        "images": IMAGES,
        "turns": TURNS,
    }
)
"""One row per record; see ValidatedRecord."""


@dataclass(frozen=True)
class ImageFile:
    """One checked image: its reference for `haplovl.data.media`, its content's sha256, its upright size in pixels."""

    path: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class ValidatedRecord:
    """A record that passed every check.

    `record.split` is always set, `images[i]` describes `record.images[i]`, and `source` is the source's name.
    """

    record: Record
    images: tuple[ImageFile, ...]
    source: str


def write_validated(folder: Path, rows: Iterable[ValidatedRecord]) -> None:
    """Writes `folder/records.parquet` in row groups as the rows arrive; the same rows give the same bytes."""
    rows = iter(rows)
    groups = iter(lambda: [_to_row(row) for row in islice(rows, ROWS_PER_GROUP)], [])
    for _ in write_tables(folder, (pa.Table.from_pylist(group, schema=SCHEMA) for group in groups)):
        pass


def write_tables(folder: Path, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Writes tables of SCHEMA, however long, as `write_validated` does, and yields each row group that was written."""
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(folder / FILE_NAME, SCHEMA, compression="zstd") as writer:

        def write(group: pa.Table) -> pa.Table:
            writer.write_table(group)
            return group

        for table in tables:
            waiting.append(table)
            if sum(part.num_rows for part in waiting) < ROWS_PER_GROUP:
                continue
            joined = pa.concat_tables(waiting)
            whole = joined.num_rows - joined.num_rows % ROWS_PER_GROUP
            for start in range(0, whole, ROWS_PER_GROUP):
                yield write(joined.slice(start, ROWS_PER_GROUP))
            waiting = [joined.slice(whole)]
        rest = pa.concat_tables(waiting) if waiting else SCHEMA.empty_table()
        if rest.num_rows:
            yield write(rest)


def read_validated(folder: Path = VALIDATED, split: str | None = None) -> Iterator[ValidatedRecord]:
    """Yields the validated records in the order of their source, those of one split if it is named.

    Raises:
        UserError: there is no table; names the command that makes it.
    """
    with pq.ParquetFile(require(folder / FILE_NAME, made_by="validate")) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
            if split is not None:
                batch = batch.filter(pc.equal(batch["split"], split))
            yield from map(_from_row, batch.to_pylist())


def find_validated(id_: str, folder: Path = VALIDATED) -> list[ValidatedRecord]:
    """The validated records with an id: one per source at most. None where there is no table yet."""
    path = folder / FILE_NAME
    if not path.exists():
        return []
    return [_from_row(row) for row in pq.read_table(path, filters=[("id", "=", id_)]).to_pylist()]


def _to_row(row: ValidatedRecord) -> dict[str, Any]:
    record = row.record
    return {
        "id": record.id,
        "split": record.split,
        "kind": record.kind,
        "source": row.source,
        "system": record.system,
        "images": [asdict(image) for image in row.images],
        "turns": [asdict(turn) for turn in record.turns],
    }


def _from_row(row: dict[str, Any]) -> ValidatedRecord:
    images = tuple(ImageFile(**image) for image in row["images"])
    turns = tuple(Turn(**turn) for turn in row["turns"])
    paths = tuple(image.path for image in images)
    return ValidatedRecord(Record(row["id"], paths, turns, row["split"], row["system"]), images, row["source"])
