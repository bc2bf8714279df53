"""`haplovl collect`: brings a data source into data/raw/, unchanged.

    data/raw/annotations/   LLaVA-style .json and .jsonl files
    data/raw/images/        the images that the records name, under the same relative paths
    data/raw/skipped.jsonl  images that could not be brought, with the reason (LLaVA sources only)

Nothing is decoded or judged here; that is validate's work.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from haplovl.data import scenes
from haplovl.errors import UserError
from haplovl.files import RAW, whole_folder
from haplovl.pictures import ImageError, open_file, resolve_inside
from haplovl.records import RecordError, parse_record, read_items, write_jsonl
from haplovl.settings import LlavaSource, Params, ScenesSource

ANNOTATIONS, IMAGES, SKIPPED = "annotations", "images", "skipped.jsonl"


def collect(params: Params, root: Path = RAW) -> None:
    """Writes the source's annotations and images to `root`, which appears only when all of it is there.

    Raises:
        UserError: the source cannot be read.
        OSError: the output cannot be written (disk full).
    """
    source = params.collect.source
    if isinstance(source, LlavaSource):
        files, images = _readable_files(source.annotations), _readable_folder(source.images)
    with whole_folder(root) as folder:
        (folder / ANNOTATIONS).mkdir()
        (folder / IMAGES).mkdir()
        if isinstance(source, ScenesSource):
            counts = _collect_scenes(source, params.seed, folder)
        else:
            counts = _collect_llava(files, images, folder)
    skipped = f", {counts['skipped']} images skipped (see {root / SKIPPED})" if counts["skipped"] else ""
    print(f"collected {counts['records']} records and {counts['images']} images into {root}{skipped}")


def _collect_scenes(source: ScenesSource, seed: int, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()

    def rows() -> Iterator[dict]:
        for record in scenes.generate(source, seed, folder / IMAGES):
            counts.update(records=1, images=len(record.images))
            yield record.to_json()

    write_jsonl(folder / ANNOTATIONS / "scenes.jsonl", rows())
    return counts


def _collect_llava(files: list[Path], images: Path, folder: Path) -> Counter[str]:
    """Copies the annotation files, then every image that one of their records names."""
    counts: Counter[str] = Counter()
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    names: set[str] = set()
    for file in files:
        copy = folder / ANNOTATIONS / _unique_name(file.name, names)
        shutil.copyfile(file, copy)
        for item in read_items(copy):
            counts["records"] += 1
            for image in _images_of(item.data):
                if image in seen:
                    continue
                seen.add(image)
                try:
                    _copy_image(images, image, folder / IMAGES)
                    counts["images"] += 1
                except ImageError as error:
                    skipped[image] = str(error)
    counts["skipped"] = len(skipped)
    write_jsonl(folder / SKIPPED, ({"image": image, "reason": skipped[image]} for image in sorted(skipped)))
    return counts


def _images_of(data: object) -> tuple[str, ...]:
    """The images of an entry; none where it is no record, as nothing will read them."""
    try:
        return parse_record(data).images
    except RecordError:
        return ()


def _copy_image(source: Path, relative: str, target: Path) -> None:
    """Copies one image's bytes to the same relative path, links resolved.

    Raises:
        ImageError: it is missing, leaves the folder, is no regular file or cannot be read.
        OSError: the copy cannot be written.
    """
    with open_file(resolve_inside(source, relative)) as original:
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.open("wb") as file:
            shutil.copyfileobj(original, file, 1 << 20)


def _unique_name(name: str, taken: set[str]) -> str:
    """`name`, or `name` with a number where another source file of this name came first."""
    path, unique, number = Path(name), name, 1
    while unique in taken:
        number += 1
        unique = f"{path.stem}-{number}{path.suffix}"
    taken.add(unique)
    return unique


def _readable_files(names: list[str]) -> list[Path]:
    for name in names:
        path = Path(name)
        if path.suffix not in (".json", ".jsonl"):
            raise UserError(f"the annotation file {name} must end in .json or .jsonl")
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise UserError(f"the annotation file {name} cannot be read: {error.strerror}") from None
    return [Path(name) for name in names]


def _readable_folder(name: str) -> Path:
    try:
        with os.scandir(name):
            pass
        # Listing needs the right to read, opening the files inside the right to enter.
        os.stat(os.path.join(name, "."))
    except OSError as error:
        raise UserError(f"the image folder {name} cannot be read: {error.strerror}") from None
    return Path(name)
