"""LLaVA-style annotations (`conversations` of `from` and `value`) and the images that they name."""

from collections.abc import Iterator
from pathlib import Path

from haplovl.data.sources.common import (
    Bringing,
    annotation_files,
    bring_annotations,
    check_annotations,
    check_folder,
    copy_open,
    with_refs,
)
from haplovl.data_settings import LlavaSource
from haplovl.pictures import ImageError, open_file, resolve_inside
from haplovl.records import RawItem, read_items


def check(settings: LlavaSource) -> None:
    """Raises UserError where a file or folder of the settings cannot be read."""
    check_annotations(settings.annotations)
    if settings.images is not None:
        check_folder(Path(settings.images), "image folder")


def bring(settings: LlavaSource, seed: int, bringing: Bringing) -> None:
    """Copies the annotation files."""
    bring_annotations(settings.annotations, bringing)


def bring_image(settings: LlavaSource, ref: str, bringing: Bringing) -> None:
    """Copies the image that `ref` names to the same relative path, links resolved.

    Raises:
        ImageError: it is missing, leaves the folder, is no regular file or cannot be read.
        OSError: the copy cannot be written.
    """
    if settings.images is None:
        raise ImageError("the source names no place for images")
    name = ref.removeprefix("file:")
    with open_file(resolve_inside(Path(settings.images), name)) as original:
        copy_open(original, bringing.media / name)


def entries(folder: Path, settings: LlavaSource) -> Iterator[RawItem]:
    """The entries of all annotation files."""
    for path in annotation_files(folder, settings.annotations):
        for item in read_items(path):
            yield with_refs(item, lambda name: f"file:{name}")
