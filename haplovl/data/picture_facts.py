"""What can be told from one picture alone: the other half of validation, done by many processes."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from haplovl.data.media import Media
from haplovl.data.similar import picture_hash
from haplovl.data.workers import in_order
from haplovl.pictures import ImageError, decode_bytes

TASK = 16
"""Pictures that one process takes at a time."""

SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "ref": pa.string(),
        "sha256": pa.binary(32),
        "width": pa.int32(),
        "height": pa.int32(),
        "look": pa.uint64(),
        "error": pa.string(),
    }
)
"""One row per picture: its place, its content's hash, upright size in pixels, perceptual hash (null where the source
compares none, or the picture is flat), or the error that makes it useless."""


@dataclass(frozen=True)
class ReadPictures:
    """Decodes pictures of any source into rows of SCHEMA; sent to every process.

    `compared` names the sources whose pictures get a perceptual hash.
    """

    media: Media
    max_pixels: int
    compared: frozenset[str]

    def __call__(self, places: list[tuple[str, str]]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist([self.row(*place) for place in places], schema=SCHEMA)

    def row(self, source: str, ref: str) -> dict[str, Any]:
        """One picture's row."""
        row: dict[str, Any] = {"source": source, "ref": ref}
        try:
            data = self.media.read(source, ref)
            picture = decode_bytes(data, self.max_pixels)
        except ImageError as error:
            return {**row, "error": _clean(str(error))}
        except (OSError, MemoryError) as error:
            return {**row, "error": f"the image cannot be read: {_clean(str(error)) or type(error).__name__}"}
        look = picture_hash(picture) if source in self.compared else None
        size = {"width": picture.width, "height": picture.height}
        return {**row, "sha256": hashlib.sha256(data).digest(), **size, "look": look}


def read_pictures(
    places: Iterable[tuple[str, str]], work: ReadPictures, processes: int | None
) -> Iterator[pa.RecordBatch]:
    """The rows of all pictures, in order; `places` are pairs of source and reference."""
    places = iter(places)
    return in_order(work, iter(lambda: list(islice(places, TASK)), []), _crashed, processes)


def _crashed(place: tuple[str, str]) -> pa.RecordBatch:
    row = {"source": place[0], "ref": place[1], "error": "the image kills the process that decodes it"}
    return pa.RecordBatch.from_pylist([row], schema=SCHEMA)


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
