"""Pictures of collected sources by reference, wherever they lie: in folders, archives, tables or videos.

A reference is a string inside a record, resolved below data/raw/<source>/media:

    file:<path>                                   one file
    tar:<archive>!<member>, zip:<archive>!<member>
    parquet:<file>!<row>!<column>[!<index>]       a cell with an image file's bytes, or one element of a list of them
    video:<file>!<frame>!<frames>                 one of so many frames, evenly spread, as JPEG
"""

import io
import json
import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from haplovl.data.archives import read_index, read_member
from haplovl.data.tables import CellReader
from haplovl.files import RAW
from haplovl.pictures import MAX_PIXELS, ImageError, decode_bytes, read_image_file, resolve_inside

MEDIA, INDEX, SKIPPED = "media", "index", "skipped.jsonl"
REASONS_KEPT = 100_000
"""Most reasons of one source's skipped.jsonl that are held in memory; later ones read as missing."""
VIDEOS_KEPT = 2
"""Videos whose frames are held: the frames of a record are read one after the other."""
JPEG_QUALITY = 95


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
        self._lock = threading.Lock()
        self._indexes: dict[str, np.ndarray] = {}
        self._cells = CellReader()
        self._videos: OrderedDict[str, list[bytes]] = OrderedDict()

    def read(self, ref: str) -> bytes:
        kind, _, name = ref.partition(":")
        readers = {
            "file": self._read_file,
            "tar": self._read_member,
            "zip": self._read_member,
            "parquet": self._read_cell,
            "video": self._read_frame,
        }
        if kind not in readers or not name:
            raise ImageError(f"'{ref:.60}' is no reference to a picture")
        if ref in self._skipped:
            raise ImageError(self._skipped[ref])
        return readers[kind](name)

    def _read_file(self, name: str) -> bytes:
        return read_image_file(self._inside(name))

    def _inside(self, name: str) -> Path:
        return resolve_inside(self.folder / MEDIA, name)

    def _read_member(self, name: str) -> bytes:
        archive, _, member = name.partition("!")
        path = self._inside(archive)
        with self._lock:
            if archive not in self._indexes:
                self._indexes[archive] = read_index(self.folder / INDEX, archive)
        return read_member(path, self._indexes[archive], member)

    def _read_cell(self, name: str) -> bytes:
        file, row, column, *index = name.split("!")
        return self._cells.read(self._inside(file), int(row), column, int(index[0]) if index else None)

    def _read_frame(self, name: str) -> bytes:
        file, frame, frames = name.rsplit("!", 2)
        from haplovl.model.videos import read_frames  # torch comes with the package

        key = f"{file}!{frames}"
        with self._lock:
            if key not in self._videos:
                self._videos[key] = [_jpeg(picture) for picture in read_frames(self._inside(file), int(frames))]
            self._videos.move_to_end(key)
            while len(self._videos) > VIDEOS_KEPT:
                self._videos.popitem(last=False)
            shown = self._videos[key]
        # A video with fewer frames shows them more than once.
        return shown[int(frame) * len(shown) // int(frames)]

    @cached_property
    def _skipped(self) -> dict[str, str]:
        """Why pictures of this source could not be collected, by reference."""
        reasons: dict[str, str] = {}
        path = self.folder / SKIPPED
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    if len(reasons) < REASONS_KEPT:
                        reasons[row["ref"]] = row["reason"]
        return reasons


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
