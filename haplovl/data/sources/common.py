"""What the adapters share: the folder that a source is brought into, and image references inside records."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from haplovl.data.media import MEDIA
from haplovl.errors import UserError
from haplovl.records import RawItem

ANNOTATIONS = "annotations"


@dataclass
class Bringing:
    """A source on its way into `folder`: what was brought, and what was not."""

    folder: Path
    files: list[dict[str, Any]] = field(default_factory=list)
    """Path below the source's folder, bytes and sha256 of the files that were brought."""

    @property
    def media(self) -> Path:
        return self.folder / MEDIA

    def copy(self, original: Path, relative: str) -> None:
        """Copies a file to `relative` below the source's folder and notes its hash.

        Raises:
            OSError: the original cannot be read, or the copy not be written.
        """
        target = self.folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with original.open("rb") as source, target.open("wb") as copy:
            digest = _copy_and_hash(source, copy)
        self.files.append({"path": relative, "bytes": target.stat().st_size, "sha256": digest})


def _copy_and_hash(source: BinaryIO, copy: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        copy.write(chunk)
    return digest.hexdigest()


def bring_annotations(names: list[str], bringing: Bringing) -> None:
    """Copies annotation files, under numbered names where two have the same."""
    for name, unique in zip(names, unique_names(names), strict=True):
        bringing.copy(Path(name), f"{ANNOTATIONS}/{unique}")


def annotation_files(folder: Path, names: list[str]) -> Iterator[Path]:
    """The copies of annotation files in the order of the settings."""
    for unique in unique_names(names):
        yield folder / ANNOTATIONS / unique


def unique_names(paths: list[str]) -> Iterator[str]:
    """The files' names, with a number where an earlier file has the same one."""
    taken: set[str] = set()
    for path in map(Path, paths):
        unique, number = path.name, 1
        while unique in taken:
            number += 1
            unique = f"{path.stem}-{number}{path.suffix}"
        taken.add(unique)
        yield unique


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


def check_annotations(names: list[str], suffixes: tuple[str, ...] = (".json", ".jsonl")) -> None:
    """Raises UserError for an annotation file of an unknown type, or one that cannot be opened."""
    for name in names:
        path = Path(name)
        if path.suffix not in suffixes:
            raise UserError(f"the annotation file {name} must end in {' or '.join(suffixes)}")
        check_file(path, "annotation file")


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


def copy_open(original: BinaryIO, target: Path) -> None:
    """Writes the rest of an open file to `target`.

    Raises:
        OSError: the copy cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(original, file, 1 << 20)
