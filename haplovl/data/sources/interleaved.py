"""Documents in which pictures and texts take turns.

Read as published: MMC4 (JSONL of `text_list` and `image_info` with `image_name` and `matched_text_index`, the sentence
that a picture belongs to: it comes before it), and OBELICS (`images` and `texts` of equal length, at every place one of
them null; in Parquet, or in JSONL made of it). Both publish URLs; the pictures are downloaded by the user, under the
names that the annotations then hold.

A document becomes a conversation: what is shown is the question, the text that follows it is the answer. A picture that
could not be collected is left out of its document, as links of the web rot; pictures after the last text too.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from haplovl.data.media import SKIPPED
from haplovl.data.sources.common import (
    Bringing,
    ImagePlaces,
    annotation_files,
    bring_annotations,
    check_annotations,
)
from haplovl.data.sources.conversations import id_of, split_of
from haplovl.data_settings import InterleavedSource
from haplovl.records import IMAGE_PLACEHOLDER, RawItem, read_items

ROWS = 1024
"""Rows of a table that are read at a time."""


def check(settings: InterleavedSource) -> None:
    """Raises UserError where a file or folder of the settings cannot be read."""
    check_annotations(settings.annotations, (".json", ".jsonl", ".parquet"))
    ImagePlaces(settings.images).check()


def bring(settings: InterleavedSource, seed: int, bringing: Bringing) -> None:
    """Copies the annotation files and brings the archives."""
    bring_annotations(settings.annotations, bringing)
    bringing.places = ImagePlaces(settings.images)
    bringing.places.bring(bringing)


def bring_image(settings: InterleavedSource, ref: str, bringing: Bringing) -> None:
    """Brings the image that `ref` names; raises ImageError where that is not possible."""
    bringing.places.bring_image(ref, bringing)


def entries(folder: Path, settings: InterleavedSource) -> Iterator[RawItem]:
    """The documents of all annotation files as conversations."""
    places = ImagePlaces(settings.images)
    skipped = _skipped(folder / SKIPPED)
    for path in annotation_files(folder, settings.annotations):
        for item in _documents(path):
            if item.error:
                yield item
                continue
            try:
                parts = _parts(item.data)
            except ValueError as error:
                yield replace(item, data=None, error=str(error), raw=str(item.data)[:1000])
                continue
            shown = [(places.ref(part), "") if is_image else ("", part) for is_image, part in parts]
            talk, images = _conversation([part for part in shown if part[0] not in skipped])
            data = {"id": id_of(item), "image": images, "conversations": talk, **split_of(item.data)}
            yield replace(item, data=data)


def _documents(path: Path) -> Iterator[RawItem]:
    """The entries of an annotation file, or the rows of a table with OBELICS' two columns."""
    if path.suffix != ".parquet":
        yield from read_items(path)
        return
    position = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            columns = ["images", "texts", *({"split"} & set(file.schema_arrow.names))]
            for batch in file.iter_batches(ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield RawItem(path.name, position, data=row)
                    position += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        yield RawItem(path.name, position, error=f"the table is damaged: {' '.join(str(error).split())}", cut=True)


def _skipped(path: Path) -> set[str]:
    if not path.exists():
        return set()
    with path.open(encoding="utf-8") as file:
        return {json.loads(line)["ref"] for line in file}


def _parts(data: Any) -> list[tuple[bool, str]]:
    """The document in order: whether a part is a picture, and its name or text.

    Raises:
        ValueError: it is of neither layout.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a document must be a JSON object, found {type(data).__name__}")
    if "text_list" in data:
        return _mmc4(data)
    if "texts" in data and "images" in data:
        return _obelics(data)
    raise ValueError("a document needs 'text_list' and 'image_info' (MMC4), or 'texts' and 'images' (OBELICS)")


def _mmc4(data: dict[str, Any]) -> list[tuple[bool, str]]:
    texts, infos = data["text_list"], data.get("image_info")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("'text_list' must be a list of strings")
    if not isinstance(infos, list):
        raise ValueError("'image_info' must be a list")
    before: dict[int, list[str]] = {}
    for info in infos:
        name, place = (info.get("image_name"), info.get("matched_text_index")) if isinstance(info, dict) else (0, 0)
        if not isinstance(name, str) or not name or not isinstance(place, int) or not 0 <= place < len(texts):
            raise ValueError(
                "every element of 'image_info' needs an 'image_name' and a 'matched_text_index' in the list"
            )
        before.setdefault(place, []).append(name)
    parts = []
    for number, text in enumerate(texts):
        parts += [(True, name) for name in before.get(number, [])]
        parts.append((False, text))
    return parts


def _obelics(data: dict[str, Any]) -> list[tuple[bool, str]]:
    images, texts = data["images"], data["texts"]
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise ValueError("'images' and 'texts' must be lists of equal length")
    parts = []
    for image, text in zip(images, texts, strict=True):
        part = text if image is None else image
        if not isinstance(part, str) or not part or (image is not None and text is not None):
            raise ValueError("at every place one of 'images' and 'texts' must be a string and the other null")
        parts.append((image is not None, part))
    return parts


def _conversation(parts: list[tuple[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """Turns and images of (reference, text) parts. Text before the first picture belongs to the first question."""
    talk: list[dict[str, str]] = []
    images: list[str] = []
    question: list[str] = []
    answer: list[str] = []

    def close() -> None:
        if question and answer:
            talk.append({"from": "human", "value": "\n".join(question)})
            talk.append({"from": "gpt", "value": "\n".join(answer)})
            question.clear()
            answer.clear()

    for ref, text in parts:
        if ref:
            close()
            question.append(IMAGE_PLACEHOLDER)
            images.append(ref)
        elif IMAGE_PLACEHOLDER in question:
            answer.append(text)
        else:
            question.append(text)
    trailing = 0 if answer else question.count(IMAGE_PLACEHOLDER)
    close()
    return talk, images[: len(images) - trailing]
