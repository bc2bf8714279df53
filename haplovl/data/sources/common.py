"""What the adapters share: the folder that a source is brought into, and the places that images come from."""

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from haplovl.data.archives import SUFFIXES, find_member, read_index, write_index
from haplovl.data.media import INDEX, MEDIA, SKIPPED
from haplovl.errors import UserError
from haplovl.files import sha256_of
from haplovl.pictures import ImageError, open_file, resolve_inside
from haplovl.records import RawItem

ANNOTATIONS = "annotations"
FICLONE = 0x40049409
"""The kernel's request to share a file's blocks until one of the two is written to (btrfs, XFS)."""


NAME_KEPT = 4096
"""Characters of a name that skipped.jsonl keeps; no path is longer."""


# --- bringing ------------------------------------------------------------------------------------------------------
@dataclass
class Bringing:
    """A source on its way into `folder`: what was brought, and what was not."""

    folder: Path
    files: list[dict[str, Any]] = field(default_factory=list)
    """Path below the source's folder, bytes and sha256 of the files that were brought."""
    skipped: int = 0
    indexes: dict[str, np.ndarray] = field(default_factory=dict)
    places: "ImagePlaces | None" = None
    """Where the images of annotation files come from."""

    @property
    def media(self) -> Path:
        return self.folder / MEDIA

    def copy(self, original: BinaryIO, relative: str, origin: str = "") -> None:
        """Copies an open file to `relative` below the source's folder and notes its hash (and `origin`).

        Raises:
            OSError: the original cannot be read, or the copy not be written.
        """
        target, digest = self._target(relative), hashlib.sha256()
        with target.open("wb") as copy:
            while chunk := original.read(1 << 20):
                digest.update(chunk)
                copy.write(chunk)
        self.note(relative, digest.hexdigest(), origin)

    def link(self, original: Path, relative: str) -> None:
        """Brings a large file without copying it where the file system can, and notes its hash.

        Raises:
            OSError: it cannot be read, or not be written.
        """
        link_or_copy(original, self._target(relative))
        self.note(relative, sha256_of(self.folder / relative))

    def archive(self, original: Path, name: str) -> None:
        """Brings a tar or zip and writes its index; damage is noted among the skipped."""
        self.link(original, f"{MEDIA}/{name}")
        damage = write_index(self.media / name, self.folder / INDEX)
        if damage:
            self.skip(f"{original.suffix[1:]}:{name}", damage)

    def has_member(self, archive: str, member: str) -> None:
        """Raises ImageError where an archive that was brought holds no such member."""
        if archive not in self.indexes:
            self.indexes[archive] = read_index(self.folder / INDEX, archive)
        find_member(self.indexes[archive], member)

    def skip(self, ref: str, reason: str) -> None:
        """Notes what could not be brought, and why."""
        self.skipped += 1
        with (self.folder / SKIPPED).open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(json.dumps({"ref": ref[:NAME_KEPT], "reason": reason}, ensure_ascii=False) + "\n")

    def _target(self, relative: str) -> Path:
        target = self.folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def note(self, relative: str, digest: str, origin: str = "") -> None:
        """Lists a file that was brought."""
        size = (self.folder / relative).stat().st_size
        note = {"path": relative, "bytes": size, "sha256": digest}
        self.files.append({**note, "origin": origin} if origin else note)


def link_or_copy(original: Path, target: Path) -> None:
    """`target` becomes a file with the original's bytes: sharing its blocks, else a hard link, else a copy.

    Raises:
        OSError: the original cannot be read, or the target not be written.
    """
    original = original.resolve()
    with original.open("rb") as source:
        try:
            with target.open("xb") as copy:
                fcntl.ioctl(copy.fileno(), FICLONE, source.fileno())
            return
        except OSError:
            target.unlink(missing_ok=True)
        try:
            os.link(original, target)
        except OSError:
            with target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


def link_into(original: Path, media: Path, name: str) -> None:
    """Brings a file under the relative name that a record gives it.

    Raises:
        ImageError: the name cannot be used.
        OSError: it cannot be read, or not be written.
    """
    target = resolve_inside(media, name)
    try:
        if target.exists():
            return  # the same file under a second spelling of its name
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ImageError("a part of its path is the name of another file") from None
    link_or_copy(original, target)


def bring_annotations(names: list[str], bringing: Bringing) -> None:
    """Copies annotation files, under numbered names where two have the same."""
    for name, unique in zip(names, unique_names(names), strict=True):
        with open(name, "rb") as original:
            bringing.copy(original, f"{ANNOTATIONS}/{unique}")


def annotation_files(folder: Path, names: list[str]) -> Iterator[Path]:
    """The copies of annotation files in the order of the settings."""
    for unique in unique_names(names):
        yield folder / ANNOTATIONS / unique


def media_files(folder: Path) -> list[Path]:
    """The archives or tables of a source, by name."""
    return sorted((folder / MEDIA).iterdir())


def unique_names(paths: list[str]) -> Iterator[str]:
    """The files' names, with a number where an earlier file has the same one; `!` ends a name in references."""
    taken: set[str] = set()
    for path in (Path(path.replace("!", "_")) for path in paths):
        unique, number = path.name, 1
        while unique in taken:
            number += 1
            unique = f"{path.stem}-{number}{path.suffix}"
        taken.add(unique)
        yield unique


# --- image places --------------------------------------------------------------------------------------------------
class ImagePlaces:
    """Where the images of an annotation file lie: one place for all, or several by the first parts of the path."""

    def __init__(self, images: str | dict[str, str] | None) -> None:
        places = {"": images} if isinstance(images, str) else dict(images or {})
        self.folders = {prefix: Path(place) for prefix, place in places.items() if not _is_archive(place)}
        packed = {prefix: place for prefix, place in places.items() if _is_archive(place)}
        named = dict(
            zip(dict.fromkeys(packed.values()), unique_names(list(dict.fromkeys(packed.values()))), strict=True)
        )
        self.archives = {prefix: named[place] for prefix, place in packed.items()}
        self.originals = {name: Path(place) for place, name in named.items()}
        # The longest prefix is the closest one.
        self._prefixes = sorted(places, key=len, reverse=True)

    def check(self) -> None:
        """Raises UserError for a folder or archive that cannot be read."""
        for folder in self.folders.values():
            check_folder(folder, "image folder")
        for archive in self.originals.values():
            check_file(archive, "image archive")

    def ref(self, name: str) -> str:
        """The reference of the image that a record calls `name`."""
        prefix = self._prefix(name)
        if prefix in self.archives:
            archive = self.archives[prefix]
            return f"{archive.rpartition('.')[2]}:{archive}!{name}"
        return f"file:{name}"

    def bring(self, bringing: Bringing) -> None:
        """Brings the archives; files of folders follow one by one, as records name them."""
        for name, original in self.originals.items():
            bringing.archive(original, name)

    def bring_image(self, ref: str, bringing: Bringing) -> None:
        """Brings the file that a `file:` reference names, links resolved; makes sure of members of archives.

        Raises:
            ImageError: it is missing, leaves its place, is no regular file or cannot be read.
            OSError: the copy cannot be written.
        """
        kind, _, name = ref.partition(":")
        if kind != "file":
            bringing.has_member(*name.split("!", 1))
            return
        prefix = self._prefix(name)
        if prefix is None:
            raise ImageError("no place is named for it in the source's 'images'")
        real = resolve_inside(self.folders[prefix], name.removeprefix(prefix).lstrip("/") if prefix else name)
        with open_file(real):
            pass
        link_into(real, bringing.media, name)

    def _prefix(self, name: str) -> str | None:
        return next((p for p in self._prefixes if not p or name == p or name.startswith(f"{p}/")), None)


def _is_archive(place: str) -> bool:
    return place.endswith(SUFFIXES)


def with_refs(item: RawItem, ref: Callable[[str], str]) -> RawItem:
    """The entry with references in the place of image paths; what is no path stays, for the parser to refuse."""
    if not isinstance(item.data, dict) or "image" not in item.data:
        return item
    image = item.data["image"]
    if isinstance(image, str):
        image = ref(image) if image else image
    elif isinstance(image, list):
        image = [ref(path) if isinstance(path, str) and path else path for path in image]
    return replace(item, data={**item.data, "image": image})


# --- checks before anything is written -----------------------------------------------------------------------------
def check_annotations(names: list[str], suffixes: tuple[str, ...] = (".json", ".jsonl")) -> None:
    """Raises UserError for an annotation file of an unknown type, or one that cannot be opened."""
    for name in names:
        path = Path(name)
        if path.suffix not in suffixes:
            raise UserError(f"the annotation file {name} must end in {' or '.join(suffixes)}")
        check_file(path, "annotation file")


def matching_files(patterns: list[str], suffix: str, what: str) -> list[Path]:
    """The files that the patterns name, each once, in the order of the patterns, then of their names.

    Raises:
        UserError: a pattern finds nothing, or a file cannot be read or ends otherwise.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = sorted(glob.glob(pattern, recursive=True)) or [pattern]
        for name in names:
            if not name.endswith(suffix):
                raise UserError(f"the {what} {name} must end in {suffix}")
            check_file(Path(name), what)
            found[name] = None
    return [Path(name) for name in found]


def check_file(path: Path, what: str) -> None:
    """Raises UserError where a file cannot be opened."""
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be read: {error.strerror}") from None


def check_folder(path: Path, what: str) -> None:
    """Raises UserError where a folder cannot be listed or entered."""
    try:
        with os.scandir(path):
            pass
        # Listing needs the right to read, opening the files inside the right to enter.
        os.stat(os.path.join(path, "."))
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be read: {error.strerror}") from None
