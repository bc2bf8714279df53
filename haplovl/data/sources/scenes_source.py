"""The embedded scenes as a source."""

from collections.abc import Iterator
from pathlib import Path

from haplovl.data import scenes
from haplovl.data.sources.common import ANNOTATIONS, Bringing, with_refs
from haplovl.data_settings import ScenesSource
from haplovl.files import sha256_of
from haplovl.records import RawItem, read_items, write_jsonl

FILE = "scenes.jsonl"


def check(settings: ScenesSource) -> None:
    """The scenes come with the program."""


def bring(settings: ScenesSource, seed: int, bringing: Bringing) -> None:
    """Draws the scenes: records, and pictures as PNG files."""
    path = bringing.folder / ANNOTATIONS / FILE
    generated = scenes.generate(settings, seed, bringing.media)
    write_jsonl(path, (record.to_json() for record in generated))
    bringing.note(f"{ANNOTATIONS}/{FILE}", sha256_of(path))


def bring_image(settings: ScenesSource, ref: str, bringing: Bringing) -> None:
    """The pictures are drawn already."""


def entries(folder: Path, settings: ScenesSource) -> Iterator[RawItem]:
    """The records as they were written, with references to their pictures."""
    for item in read_items(folder / ANNOTATIONS / FILE):
        yield with_refs(item, lambda path: f"file:{path}")
