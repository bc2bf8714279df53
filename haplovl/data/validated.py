"""The table of validated records: what `validate` accepts, as one Parquet file that refers to the raw images."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from haplovl.files import VALIDATED, require
from haplovl.records import Record, Turn

FILE_NAME = "records.parquet"
ROWS_PER_GROUP = 4096


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, rows = _schema(), iter(rows)
    with pq.ParquetWriter(folder / FILE_NAME, schema, compression="zstd") as writer:
        while group := [_to_row(row) for row in islice(rows, ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_validated(folder: Path = VALIDATED, split: str | None = None) -> Iterator[ValidatedRecord]:
    """Yields the validated records in the order of their source, those of one split if it is named.

    Raises:
        UserError: there is no table; names the command that makes it.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(require(folder / FILE_NAME, made_by="validate")) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
            if split is not None:
                batch = batch.filter(pc.equal(batch["split"], split))
            yield from map(_from_row, batch.to_pylist())


def _schema() -> Any:
    import pyarrow as pa

    text = pa.string()
    image = pa.struct({"path": text, "sha256": text, "width": pa.int32(), "height": pa.int32()})
    turn = pa.struct({"question": text, "answer": text, "kind": text})
    names = ("id", "split", "kind", "source", "system")
    return pa.schema([*((name, text) for name in names), ("images", pa.list_(image)), ("turns", pa.list_(turn))])


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
