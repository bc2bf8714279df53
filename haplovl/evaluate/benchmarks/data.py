"""Benchmark data in a local folder: rows in Parquet or JSON, pictures inside them or as files beside them."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from haplovl.data.tables import CellReader
from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.catalogue import BENCHMARKS
from haplovl.evaluate.benchmarks.checking import check_records, name_of
from haplovl.evaluate.benchmarks.reading import read_json_or_lines
from haplovl.evaluate.benchmarks.rules import Benchmark, Record
from haplovl.pictures import ImageError, decode_bytes, read_image_file, resolve_inside
from haplovl.progress import reporter

_SHARD = re.compile(r"(.+?)-\d{5}-of-(\d{5}).*")
"""The names of the hub's files: split, number of the shard, number of shards."""


@dataclass(frozen=True)
class Picture:
    """Where a picture lies: a file, or the cell of a Parquet file."""

    path: Path
    row: int | None = None
    column: str = ""
    index: int | None = None


@dataclass(frozen=True)
class Row:
    """One question with its pictures; `name` is how messages call it."""

    name: str
    record: Record
    pictures: tuple[Picture, ...]


def read_rows(benchmark: Benchmark, data: Path, limit: int | None = None) -> list[Row]:
    """The questions of a benchmark from a folder or file, in its order.

    Parquet files have the columns of the published data set, with pictures as bytes or as {bytes, path}, or lists of
    them; JSON and JSON lines have the same fields, with pictures as paths below the file's folder. GQA's pictures may
    lie in tables of their own with `id` and `image`. `limit` takes the first so many questions, each with all its rows:
    rotated copies (MMBench), both of a pair (MMVP).

    Raises:
        UserError: no data, several splits or folders, a missing column, picture or id, and all that `check_records`
            refuses.
    """
    files = _files(benchmark, data)
    rows: list[Row] = []
    for path in files.questions:
        table = path.suffix == ".parquet"
        rows += _parquet_rows(benchmark, path, files.pictures) if table else _json_rows(benchmark, path)
    check_records(benchmark, [row.record for row in rows], [row.name for row in rows], str(data))
    used = (*benchmark.fields, *benchmark.optional)
    rows = [replace(row, record={name: row.record[name] for name in used if name in row.record}) for row in rows]
    return rows if limit is None else _first(benchmark, rows, limit)


class PictureReader:
    """Reads pictures of rows, quickly in about their order."""

    def __init__(self) -> None:
        self._cells = CellReader()

    def read(self, picture: Picture) -> bytes:
        """The bytes of an image file.

        Raises:
            ImageError: it is missing or cannot be read.
        """
        if picture.row is None:
            return read_image_file(picture.path)
        return self._cells.read(picture.path, picture.row, picture.column, picture.index)

    def read_row(self, row: Row) -> list[bytes]:
        """The bytes of all pictures of a row.

        Raises:
            UserError: one of them is missing or cannot be read; names the row.
        """
        try:
            return [self.read(picture) for picture in row.pictures]
        except ImageError as error:
            raise UserError(f"{row.name} has no readable picture: {error}") from None


def picture_digests(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The sha256 of every row's pictures. Each different one is decoded, so that no broken one turns up hours later.

    Raises:
        UserError: a picture is missing or damaged; names the row.
    """
    reader, good, digests = PictureReader(), set(), []
    with reporter("pictures", len(rows)) as report:
        for number, row in enumerate(rows, 1):
            names = []
            for content in reader.read_row(row):
                names.append(hashlib.sha256(content).hexdigest())
                if names[-1] not in good:
                    _decode(row, content)
                    good.add(names[-1])
            digests.append(tuple(names))
            report.update(number)
    return digests


def data_digest(rows: Sequence[Row], digests: Sequence[tuple[str, ...]]) -> str:
    """sha256 over the questions and their pictures, in order; the same for Parquet and JSON with the same content."""
    whole = hashlib.sha256()
    for row, names in zip(rows, digests, strict=True):
        whole.update(json.dumps([row.record, names], sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return whole.hexdigest()


def _decode(row: Row, content: bytes) -> Image.Image:
    try:
        return decode_bytes(content)
    except ImageError as error:
        raise UserError(f"{row.name} has no readable picture: {error}") from None


# ---- files


@dataclass(frozen=True)
class _Files:
    questions: list[Path]
    pictures: dict[str, Picture]


def _files(benchmark: Benchmark, data: Path) -> _Files:
    if not data.exists():
        raise UserError(f"there is no file or folder {data}")
    if data.is_file():
        if data.suffix not in (".parquet", ".json", ".jsonl"):
            raise UserError(f"{data} is neither a Parquet nor a JSON file")
        return _Files([data], {})
    tables = sorted(data.rglob("*.parquet"))
    if not tables:
        return _Files([_one_json(benchmark, data)], {})
    questions = [path for path in tables if not _holds_only_pictures(path)]
    pictures = _picture_tables([path for path in tables if path not in questions])
    if not questions:
        raise UserError(f"{data} holds pictures, but no table of questions of {benchmark.title}")
    return _Files(_of_one_split(benchmark, data, questions), pictures)


def _one_json(benchmark: Benchmark, data: Path) -> Path:
    found = sorted(path for path in data.iterdir() if path.suffix in (".json", ".jsonl"))
    if not found:
        raise UserError(f"{data} holds no Parquet and no JSON files; {benchmark.title} is {benchmark.dataset}")
    if len(found) > 1:
        raise UserError(f"{data} holds several JSON files ({found[0].name}, {found[1].name}, …); name one of them")
    return found[0]


def _of_one_split(benchmark: Benchmark, data: Path, tables: list[Path]) -> list[Path]:
    """All tables where their names tell no split, else the shards of the benchmark's."""
    shards = {path: match for path in tables if (match := _SHARD.fullmatch(path.stem))}
    if shards:
        apart = next((path for path in tables if path not in shards), None)
        if apart:
            raise UserError(
                f"{data} holds {apart.name} beside shards such as {next(iter(shards)).name}; name one of both"
            )
        there = sorted({match[1] for match in shards.values()})
        tables = [path for path, match in shards.items() if match[1] == benchmark.split]
        if not tables:
            what = f"the split {there[0]}" if len(there) == 1 else f"the splits {', '.join(there)}"
            raise UserError(f"{data} holds {what}, but not {benchmark.split}, which {benchmark.title} is")
    folders = sorted({path.parent for path in tables})
    if len(folders) > 1:
        names = ", ".join(str(folder.relative_to(data)) for folder in folders[:4])
        raise UserError(f"{data} holds tables in several folders ({names}); name the one of {benchmark.dataset}")
    whole = int(shards[tables[0]][2]) if shards else len(tables)
    if len(tables) != whole:
        raise UserError(
            f"{data} holds {len(tables)} of the {whole} files of {benchmark.title}'s split {benchmark.split}"
        )
    return tables


# ---- Parquet


def _schema(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no readable Parquet file: {' '.join(str(error).split())}") from None


def _holds_only_pictures(path: Path) -> bool:
    return {"id", "image"} == set(_schema(path).names)


def _picture_tables(paths: list[Path]) -> dict[str, Picture]:
    import pyarrow.parquet as pq

    found = {}
    for path in paths:
        for row, name in enumerate(pq.read_table(path, columns=["id"])["id"].to_pylist()):
            found[str(name)] = Picture(path, row, "image")
    return found


def _parquet_rows(benchmark: Benchmark, path: Path, apart: dict[str, Picture]) -> list[Row]:
    import pyarrow.parquet as pq

    there = _schema(path)
    _require_columns(benchmark, path, there.names, bool(apart))
    # Columns that only other benchmarks have tell whether the table is one of theirs.
    told = {*benchmark.optional, *(name for other in BENCHMARKS.values() for name in other.fields)}
    records = pq.read_table(path, columns=[name for name in there.names if name in told]).to_pylist()
    lists = "image" in there.names and _is_list(there.field("image").type)
    counts = _list_lengths(path, "image") if lists else None
    rows = []
    for place, record in enumerate(records):
        if not benchmark.keeps(record):
            continue
        record = {key: None if value != value else value for key, value in record.items()}  # NaN, where pandas wrote
        name = name_of(benchmark, record, place + 1, str(path))
        if "image" not in there.names and apart:
            pictures = (_from_apart(record, apart, name),)
        else:
            pictures = tuple(_cells(benchmark, record, path, place, there.names, counts, name))
        rows.append(Row(name, record, pictures))
    return rows


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _list_lengths(path: Path, column: str) -> list[int]:
    """How many pictures every row of a list column holds, counted by their names: the pictures are large."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, memory_map=True)
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    names = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]
    lengths: list[int] = []
    for batch in file.iter_batches(16, columns=names or [column]):
        lengths += [length or 0 for length in pc.list_value_length(batch.column(0)).to_pylist()]
    return lengths


def _cells(
    benchmark: Benchmark,
    record: Record,
    path: Path,
    row: int,
    there: Sequence[str],
    counts: list[int] | None,
    name: str,
) -> Iterable[Picture]:
    for column in _picture_columns(benchmark, record, name):
        if column not in there:
            raise UserError(f"{name}: {path} has no column {column!r}, which the question names")
        if counts is None:
            yield Picture(path, row, column)
        elif not counts[row]:
            raise UserError(f"{name} has no picture in the column {column!r}")
        else:
            yield from (Picture(path, row, column, index) for index in range(counts[row]))


def _from_apart(record: Record, apart: dict[str, Picture], name: str) -> Picture:
    found = apart.get(str(record["imageId"]))
    if found is None:
        raise UserError(f"{name}: there is no picture {record['imageId']!r} in the tables of pictures")
    return found


def _require_columns(benchmark: Benchmark, path: Path, there: Iterable[str], apart: bool) -> None:
    wanted = [*benchmark.fields, *benchmark.tabled]
    if "image" in benchmark.columns:
        wanted.append("imageId" if apart and "image" not in there else "image")
    missing = [repr(name) for name in wanted if name not in there]
    if missing:
        what = "column" if len(missing) == 1 else "columns"
        raise UserError(f"{path} lacks the {what} {', '.join(missing)} of {benchmark.title} ({benchmark.dataset})")


def _picture_columns(benchmark: Benchmark, record: Record, name: str) -> tuple[str, ...]:
    try:
        return benchmark.pictures(record)
    except (KeyError, TypeError, AttributeError, IndexError):  # the record is broken: `check_records` says how
        return ()


# ---- JSON


def _json_rows(benchmark: Benchmark, path: Path) -> list[Row]:
    records = read_json_or_lines(path)
    records = records.get("records") if isinstance(records, dict) else records
    if not isinstance(records, list):
        raise UserError(f"{path} holds no list of records of {benchmark.title}")
    rows = []
    for number, record in enumerate(records, 1):
        name = name_of(benchmark, record, number, str(path))
        if not isinstance(record, dict):
            raise UserError(f"{name} is no object with the fields of {benchmark.title}")
        if not benchmark.keeps(record):
            continue
        pictures = [
            _file(path.parent, named, name)
            for column in _picture_columns(benchmark, record, name)
            for named in _paths(record, column, name)
        ]
        rows.append(Row(name, record, tuple(pictures)))
    return rows


def _paths(record: Record, column: str, name: str) -> list[str]:
    value = record.get(column)
    paths = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise UserError(f"{name}: the field {column!r} must name an image file below the data's folder")
    return paths


def _file(folder: Path, named: str, name: str) -> Picture:
    try:
        path = resolve_inside(folder, named)
    except ImageError as error:
        raise UserError(f"{name}: {named}: {error}") from None
    if not path.is_file():
        raise UserError(f"{name}: the picture {named} is missing in {folder}")
    return Picture(path)


def _first(benchmark: Benchmark, rows: list[Row], limit: int) -> list[Row]:
    if benchmark.group is None:
        return rows[:limit]
    groups = [benchmark.group(row.record) for row in rows]
    chosen = set(list(dict.fromkeys(groups))[:limit])
    return [row for row, group in zip(rows, groups, strict=True) if group in chosen]
