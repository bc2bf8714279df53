"""Data folders of benchmarks: what lmms-eval would stumble over, or count wrongly, is refused before anything runs."""

import hashlib
import itertools
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.catalogue import BENCHMARKS
from haplovl.evaluate.benchmarks.mmbench import MMBENCH_EN_DEV, ROTATION
from haplovl.evaluate.harness.tasks import ANSWERS, ID, NUMBER, PICTURE, PICTURES, TEXT, TEXTS, Task
from haplovl.files import sha256_of
from haplovl.pictures import ImageError, decode_bytes

ROWS_AT_A_TIME = 64
MAY_BE_EMPTY = ("hint", "A", "B", "C", "D", "image")
"""Columns in which null is data: MMBench's options, hints of pictures that have none. Pictures are looked at apart."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_MARKER = re.compile(r"<image (\d+)>")

Row = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """A benchmark's data that can be run: its `files` (and those of GQA's pictures), the number of questions of the
    benchmark in them, and the sha256 of the files' names and contents.
    """

    task: Task
    path: Path
    files: tuple[Path, ...]
    picture_files: tuple[Path, ...]
    questions: int
    sha256: str

    def rows(self) -> Iterator[Row]:
        """The rows of the benchmark in lmms-eval's order, without pictures."""
        names = pq.read_schema(self.files[0]).names
        without = [name for name in names if self.task.columns.get(name) not in (PICTURE, PICTURES)]
        return _kept(self.task, _read(self.files, without))


def check_folder(task: Task, data: Path, limit: int | None = None) -> Folder:
    """The benchmark's folder `data`/NAME, whole and readable; the pictures of the first `limit` questions decode.

    Raises:
        UserError: the folder, a file, a column or a value that the task reads is missing; a picture is missing or
            damaged; a pair of MMVP or the first of MMBench's rotated questions is missing; the limit cuts a pair or the
            rotated copies of a question.
    """
    path = data / task.name
    if not path.is_dir():
        raise UserError(f"{data} has no folder {task.name}; put the data set {task.source} there")
    files = _files(task, path, task.files)
    picture_files = _files(task, path, task.picture_files) if task.picture_files else ()
    for file in files:
        _check_columns(task, file, task.columns)
    for file in picture_files:
        _check_columns(task, file, {"id": ID, "image": PICTURE})
    questions = _check_rows(task, files, picture_files, limit)
    digest = hashlib.sha256()
    for file in (*files, *picture_files):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
    return Folder(task, path, files, picture_files, questions, digest.hexdigest())


# ---- files and columns


def _files(task: Task, path: Path, pattern: str) -> tuple[Path, ...]:
    files = tuple(sorted(path.glob(pattern)))
    if not files:
        raise UserError(f"{path} holds no {pattern}, where {task.source} keeps {task.title}")
    for file in files:
        shard = _SHARD.search(file.stem)
        if shard and len(files) != int(shard[2]):
            raise UserError(f"{path} holds {len(files)} of the {int(shard[2])} files {pattern} of {task.title}")
    return files


def _check_columns(task: Task, file: Path, columns: dict[str, str]) -> None:
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is no readable Parquet file: {' '.join(str(error).split())}") from None
    missing = [f"'{name}'" for name in columns if name not in schema.names]
    if missing:
        what = "column" if len(missing) == 1 else "columns"
        raise UserError(f"{file} lacks the {what} {', '.join(missing)} of {task.title} ({task.source})")
    for name, kind in columns.items():
        if not _is_of(kind, schema.field(name).type):
            found = str(schema.field(name).type)
            raise UserError(f"{file}: the column '{name}' must be a {kind}, but its type is {found:.60}")
        if kind in (PICTURE, PICTURES) and not _known_as_pictures(schema, name):
            raise UserError(
                f"{file}: the column '{name}' is not marked as pictures in the file's metadata; write it with the "
                "datasets library, as the published files are"
            )


def _is_of(kind: str, found: pa.DataType) -> bool:
    is_text = pa.types.is_string(found) or pa.types.is_large_string(found)
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    if kind == TEXT:
        return is_text
    if kind in (NUMBER, ID):
        return pa.types.is_integer(found) or (kind == ID and is_text)
    if kind == PICTURE:
        return pa.types.is_struct(found) and found.get_field_index("bytes") >= 0
    inside = {TEXTS: TEXT, PICTURES: PICTURE}.get(kind)
    if kind == ANSWERS:
        return is_list and pa.types.is_struct(found.value_type) and found.value_type.get_field_index("answer") >= 0
    return is_list and inside is not None and _is_of(inside, found.value_type)


def _known_as_pictures(schema: pa.Schema, name: str) -> bool:
    """Whether the datasets library will hand out pictures instead of dictionaries with bytes."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return '"_type": "Image"' in json.dumps(info["info"]["features"][name])
    except (ValueError, KeyError, TypeError):
        return False


# ---- rows


def _read(files: tuple[Path, ...], columns: list[str]) -> Iterator[Row]:
    for file in files:
        try:
            for batch in pq.ParquetFile(file, memory_map=True).iter_batches(ROWS_AT_A_TIME, columns=columns):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def _kept(task: Task, rows: Iterator[Row]) -> Iterator[Row]:
    if task.keep is None:
        return rows
    column, value = task.keep
    return (row for row in rows if row[column] == value)


def _check_rows(task: Task, files: tuple[Path, ...], picture_files: tuple[Path, ...], limit: int | None) -> int:
    plain = [name for name, kind in task.columns.items() if kind not in (PICTURE, PICTURES)]
    group = BENCHMARKS[task.name].group
    count, together = 0, []
    for count, row in enumerate(_kept(task, _read(files, plain)), 1):
        _check_values(task, row, count)
        if group:
            together.append(row)
    if not count:
        raise UserError(f"{files[0].parent} holds no questions of {task.title}")
    if task.name == "mmbench_en_dev":
        _check_rotations(together)
    if task.name == "mmvp":
        _check_pairs([row["Index"] for row in together])
    if group and limit is not None:
        _check_limit(task, [group(row) for row in together], limit)
    pictures = _gqa_pictures(files, picture_files, limit) if picture_files else _pictures(task, files, limit)
    good: set[bytes] = set()
    for name, content in pictures:
        _check_picture(name, content, good)
    return count


def _check_values(task: Task, row: Row, number: int) -> None:
    missing = next((name for name, value in row.items() if value is None and name not in MAY_BE_EMPTY), None)
    if missing is not None:
        raise UserError(f"question {number} of {task.title} has no value in the column '{missing}'")
    if task.name == "pope" and row["answer"].strip().lower() not in ("yes", "no"):
        raise UserError(f"question {number} of POPE has the answer {row['answer']!r:.40}; it must be yes or no")
    if task.name == "vqav2":
        _check_annotators(row, number)


def _check_annotators(row: Row, number: int) -> None:
    """lmms-eval takes annotators whose entries are equal for one and the same: their agreement would count as none."""
    found = [(entry or {}).get("answer_id") for entry in row["answers"]]
    if None in found or len(set(found)) < len(found):
        wrong = "an answer without 'answer_id'" if None in found else "an 'answer_id' that comes twice"
        raise UserError(f"question {number} of VQAv2 has {wrong}; lmms-eval tells the annotators apart by it")


def _check_rotations(rows: Sequence[Row]) -> None:
    """MMBench asks every question with its options rotated, numbered 1,000,000 further; a rotation alone is dropped."""
    ids = {row["index"] for row in rows}
    alone = sorted({i % ROTATION for i in ids} - ids)
    if alone:
        raise UserError(f"MMBench-EN-dev lacks question {alone[0]}, of which it holds rotated copies")
    strange = MMBENCH_EN_DEV.check_all(rows)
    if strange:
        raise UserError(f"MMBench-EN-dev: {strange}")


def _check_pairs(ids: list[int]) -> None:
    """lmms-eval takes indices from 1 as pairs (1, 2), (3, 4) …, and passes over a pair of which one is missing."""
    if sorted(ids) != list(range(1, len(ids) + 1)) or len(ids) % 2:
        raise UserError(
            f"MMVP's column 'Index' must count 1 to {len(ids) + len(ids) % 2}, each once: pairs are 1 and 2, …"
        )


def _check_limit(task: Task, groups: Sequence[Hashable], limit: int) -> None:
    """lmms-eval's limit counts rows: it passes over a pair that is cut, and judges a question by the rotations left."""
    whole = _whole_limits(groups)
    if limit in whole or limit > len(groups):
        return
    nearest = [*[number for number in whole if number < limit][-1:], next(number for number in whole if number > limit)]
    named = " and ".join(f"{number} (all)" if number == len(groups) else str(number) for number in nearest)
    cut = "a pair" if task.name == "mmvp" else "the rotated copies of a question"
    are = "limits without a cut are" if len(nearest) > 1 else "limit without a cut is"
    raise UserError(f"--limit {limit} cuts {cut} of {task.title}; the nearest {are} {named}")


def _whole_limits(groups: Sequence[Hashable]) -> list[int]:
    """The numbers of first rows that hold whole groups only; the last one is that of all rows."""
    ends = {group: number for number, group in enumerate(groups, 1)}
    reached = itertools.accumulate((ends[group] for group in groups), max)
    return [number for number, end in enumerate(reached, 1) if end == number]


def _pictures(task: Task, files: tuple[Path, ...], limit: int | None) -> Iterator[tuple[str, bytes | None]]:
    """The pictures that the questions show, each with its question's name in messages."""
    columns = [name for name, kind in task.columns.items() if kind in (PICTURE, PICTURES)]
    with_text = [name for name in ("question", "options", "question_type") if name in task.columns]
    kept = [] if task.keep is None else [task.keep[0]]
    rows = _kept(task, _read(files, list(dict.fromkeys([*columns, *with_text, *kept]))))
    for number, row in enumerate(itertools.islice(rows, limit)):
        for name in _shown(task, row, columns):
            cells = row[name] if task.columns[name] == PICTURES else [row[name]]
            for cell in cells or [None]:
                where = f"question {number + 1} of {task.title}" + (f" ({name})" if len(columns) > 1 else "")
                yield where, (cell or {}).get("bytes")


def _shown(task: Task, row: Row, columns: list[str]) -> list[str]:
    """The columns of the pictures that a question names; all of them, where questions name none."""
    if task.name != "mmmu_val":
        return columns
    text = row["question"] + (row["options"] if row["question_type"] == "multiple-choice" else "")
    return [f"image_{number}" for number in dict.fromkeys(_MARKER.findall(text)) if f"image_{number}" in columns]


def _gqa_pictures(
    files: tuple[Path, ...], picture_files: tuple[Path, ...], limit: int | None
) -> Iterator[tuple[str, bytes | None]]:
    wanted = dict.fromkeys(row["imageId"] for row in _read(files, ["imageId"]))
    there = {row["id"] for row in _read(picture_files, ["id"])}
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(f"GQA's picture '{missing[0]}' is missing in {picture_files[0].parent}")
    first = {row["imageId"] for row in itertools.islice(_read(files, ["imageId"]), limit)}
    for row in _read(picture_files, ["id", "image"]):
        if row["id"] in first:
            yield f"picture '{row['id']}' of GQA", (row["image"] or {}).get("bytes")


def _check_picture(name: str, content: bytes | None, good: set[bytes]) -> None:
    if not content:
        raise UserError(f"{name} holds no picture" if name.startswith("picture") else f"{name} has no picture")
    digest = hashlib.sha256(content).digest()
    if digest in good:
        return
    try:
        decode_bytes(content)
    except ImageError as error:
        raise UserError(f"{name}: {error}") from None
    good.add(digest)
