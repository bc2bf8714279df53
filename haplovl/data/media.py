"""Pictures of collected sources by reference, wherever they lie: in folders, archives, tables or videos.

A reference is a string inside a record, resolved below data/raw/<source>/media:

    file:<path>     one file
"""

import json
from functools import cached_property
from pathlib import Path

from PIL import Image

from haplovl.files import RAW
from haplovl.pictures import MAX_PIXELS, ImageError, decode_bytes, read_image_file, resolve_inside

MEDIA, SKIPPED = "media", "skipped.jsonl"
REASONS_KEPT = 100_000
"""Most reasons of one source's skipped.jsonl that are held in memory; later ones read as missing."""


class Media:
    """Reads pictures of all sources below `raw`; may be shared by threads, and sent to other processes."""

    def __init__(self, raw: Path = RAW) -> None:
        self.raw = raw
        self._places: dict[str, _Place] = {}

    def read(self, source: str, ref: str) -> bytes:
        """The bytes of the image file that `ref` names in a source.

        Raises:
            ImageError: it is missing, was skipped by collect, leaves its place, is too large or damaged.
        """
        if source not in self._places:
            self._places[source] = _Place(self.raw / source)
        return self._places[source].read(ref)

    def open(self, source: str, ref: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The picture that `ref` names, as `haplovl.pictures.decode_bytes` gives it.

        Raises:
            ImageError: as `read`, or it cannot be decoded.
        """
        return decode_bytes(self.read(source, ref), max_pixels)

    def path(self, source: str, ref: str) -> Path | None:
        """The file of a `file:` reference; None for pictures that have none of their own."""
        kind, _, name = ref.partition(":")
        return self.raw / source / MEDIA / name if kind == "file" else None

    def __reduce__(self) -> tuple:
        return Media, (self.raw,)


class _Place:
    """One source's media."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, ref: str) -> bytes:
        kind, _, name = ref.partition(":")
        if kind != "file" or not name:
            raise ImageError(f"'{ref:.60}' is no reference to a picture")
        if ref in self._skipped:
            raise ImageError(self._skipped[ref])
        return read_image_file(resolve_inside(self.folder / MEDIA, name))

    @cached_property
    def _skipped(self) -> dict[str, str]:
        """Why pictures of this source could not be collected, by reference."""
        reasons: dict[str, str] = {}
        path = self.folder / SKIPPED
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    if "ref" in row and len(reasons) < REASONS_KEPT:
                        reasons[row["ref"]] = row["reason"]
        return reasons
