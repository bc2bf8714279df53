"""Evaluation sets that lie on this machine: their pictures and questions, which training data must not hold."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from haplovl.data.similar import picture_hash
from haplovl.data.text_checks import question_key
from haplovl.errors import UserError
from haplovl.pictures import ImageError, decode_bytes, open_file
from haplovl.records import RawItem, read_items

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})
QUESTIONS = frozenset({"question", "questions", "query", "prompt", "text", "instruction", "value", "content"})
"""Names under which published evaluation files keep what is asked."""
ROWS = 64
"""Rows of a Parquet file that are read together: they may hold pictures."""


@dataclass
class Benchmarks:
    """What evaluation sets hold: `sha256` of picture files, their perceptual hashes, and keys of their questions."""

    least_words: int
    max_pixels: int
    sha256: set[bytes] = field(default_factory=set)
    looks: set[int] = field(default_factory=set)
    questions: set[int] = field(default_factory=set)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def add_folder(self, folder: Path) -> None:
        """Takes in every picture, .json, .jsonl and .parquet file below a folder; what cannot be read is counted.

        Raises:
            UserError: there is no such folder, or nothing in it can be read, which would look like no overlap.
        """
        if not folder.is_dir():
            raise UserError(f"the evaluation set {folder} (validate.benchmarks) is no folder")
        count = {"pictures": 0, "questions": 0, "unreadable": 0}
        pictures = []
        for path in _files_below(folder):
            suffix = path.suffix.lower()
            if suffix in PICTURES and path.is_file():
                pictures.append(path)
            elif suffix in (".json", ".jsonl") and path.is_file():
                self._add_questions(_objects(path), count)
            elif suffix == ".parquet" and path.is_file():
                self._add_parquet(path, count)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
            self._add_pictures(pool.map(self._read_picture, pictures), count)
        if not count["pictures"] and not count["questions"]:
            raise UserError(
                f"the evaluation set {folder} (validate.benchmarks) holds neither a picture nor a question that can be "
                "read: pictures, .json, .jsonl and .parquet are, tables of text and archives are not"
            )
        self.counts[folder.as_posix()] = count

    def look_array(self) -> np.ndarray:
        """The perceptual hashes as uint64, sorted."""
        return np.array(sorted(self.looks), dtype=np.uint64)

    def _read_picture(self, path: Path) -> tuple[bytes, int | None] | None:
        try:
            with open_file(path) as file:
                return self._look_at(file.read())
        except (ImageError, OSError):
            return None

    def _look_at(self, data: bytes) -> tuple[bytes, int | None] | None:
        try:
            return hashlib.sha256(data).digest(), picture_hash(decode_bytes(data, self.max_pixels))
        except (ImageError, MemoryError):
            return None

    def _add_pictures(self, found: Any, count: dict[str, int]) -> None:
        for picture in found:
            if picture is None:
                count["unreadable"] += 1
                continue
            count["pictures"] += 1
            self.sha256.add(picture[0])
            if picture[1] is not None:
                self.looks.add(picture[1])

    def _add_questions(self, values: Iterator[Any], count: dict[str, int]) -> None:
        for value in values:
            if isinstance(value, RawItem):
                count["unreadable"] += 1
                continue
            for text in _texts(value, asked=False):
                count["questions"] += 1
                key = question_key(text, self.least_words)
                if key is not None:
                    self.questions.add(key)

    def _add_parquet(self, path: Path, count: dict[str, int]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=ROWS):
                    rows = batch.to_pylist()
                    self._add_questions(iter(rows), count)
                    self._add_pictures((self._look_at(data) for row in rows for data in _embedded(row)), count)
        except (pa.ArrowException, OSError):
            count["unreadable"] += 1


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted; links to folders are followed, each folder once."""
    found, known = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in known]
        known |= {os.path.realpath(os.path.join(place, name)) for name in folders}
        found += [Path(place) / name for name in names]
    return sorted(found)


def _objects(path: Path) -> Iterator[Any]:
    """The values of a JSON or JSONL file; a RawItem where one cannot be read."""
    if path.suffix.lower() == ".json":
        try:
            yield json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, OSError, RecursionError) as error:
            yield RawItem(path.name, 0, error=str(error))
        return
    for item in read_items(path):
        yield item if item.error else item.data


def _texts(value: Any, asked: bool) -> Iterator[str]:
    """The strings that stand under one of the names of QUESTIONS, however deep."""
    stack = [(value, asked)]
    while stack:
        value, asked = stack.pop()
        if isinstance(value, str):
            if asked:
                yield value
        elif isinstance(value, dict):
            # Answers stand under "value" as well where a set is written as conversations.
            if value.get("from", value.get("role")) in ("gpt", "assistant"):
                continue
            stack += [(inner, str(name).lower() in QUESTIONS) for name, inner in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(inner, asked) for inner in value]


def _embedded(row: dict[str, Any]) -> Iterator[bytes]:
    """The picture files in a row of a Parquet file: binary columns, and structs of bytes as `datasets` writes them."""
    for value in row.values():
        for inner in value if isinstance(value, list) else [value]:
            data = inner.get("bytes") if isinstance(inner, dict) else inner
            if isinstance(data, bytes) and data:
                yield data


def read_benchmarks(folders: list[str], least_words: int, max_pixels: int) -> Benchmarks:
    """Everything that the named evaluation sets hold.

    Raises:
        UserError: one of them is no folder.
    """
    benchmarks = Benchmarks(least_words, max_pixels)
    for folder in folders:
        benchmarks.add_folder(Path(folder))
    return benchmarks
