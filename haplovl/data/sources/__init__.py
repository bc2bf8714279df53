"""Collected sources: what data/raw/sources.json lists, and the entries of every source in one form.

data/raw/sources.json           every source with its settings, files (sha256, bytes) and counts
data/raw/<name>/annotations/    annotation files as they came
data/raw/<name>/media/          pictures, archives, tables and videos as they came
data/raw/<name>/skipped.jsonl   what could not be brought, with the reason
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from haplovl.data.sources import interleaved, llava, scenes_source, tables, text, video, webdataset
from haplovl.data_settings import Source, SourceSettings
from haplovl.errors import UserError
from haplovl.files import RAW, read_json, require
from haplovl.records import RawItem

SOURCES_FILE = "sources.json"
ADAPTERS = {
    "scenes": scenes_source,
    "llava": llava,
    "sharegpt": text,
    "alpaca": text,
    "interleaved": interleaved,
    "webdataset": webdataset,
    "parquet": tables,
    "hub": tables,
    "video": video,
}
"""For every format the module that brings its files and reads its entries."""


@dataclass(frozen=True)
class Collected:
    """One collected source: its settings, its counts, and how its sample is drawn.

    `sample_below` is the 64-bit id hash that a record must stay below to be in the sample; None takes every record.
    """

    settings: SourceSettings
    records: int
    images: int
    skipped: int
    sample_below: int | None = None
    files: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.settings.name

    def takes(self, item: RawItem) -> bool:
        """Whether an entry is in the source's sample."""
        return self.sample_below is None or id_hash(item) < self.sample_below

    def to_json(self) -> dict[str, Any]:
        """The source as an element of sources.json; its weight, which brings no other bytes, is left out."""
        settings = self.settings.model_dump(mode="json", exclude={"weight"})
        about = {key: settings.pop(key) for key in ("name", "format", "license")}
        counts = {"records": self.records, "images": self.images, "skipped": self.skipped}
        return {**about, **counts, "sample_below": self.sample_below, "settings": settings, "files": list(self.files)}


def read_sources(raw: Path = RAW) -> list[Collected]:
    """The collected sources in the order of the settings.

    Raises:
        UserError: nothing was collected, or sources.json is damaged.
    """
    adapter: TypeAdapter[SourceSettings] = TypeAdapter(Source)
    sources = []
    try:
        rows = read_json(require(raw / SOURCES_FILE, made_by="collect"))
        if not isinstance(rows, list):
            raise TypeError("it must hold a list")
        for row in rows:
            about = {key: row[key] for key in ("name", "format", "license")}
            settings = adapter.validate_python({**about, **row["settings"]})
            counts = (row["records"], row["images"], row["skipped"])
            sources.append(Collected(settings, *counts, row["sample_below"], tuple(row["files"])))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{raw / SOURCES_FILE} is damaged: {error}") from None
    return sources


def entries(raw: Path, source: Collected) -> Iterator[RawItem]:
    """Every entry of a collected source in order: a LLaVA-style dictionary, or the error in its place.

    Images are references that `haplovl.data.media` resolves. Entries outside the source's sample are left out.
    """
    for item in read_entries(raw / source.name, source.settings):
        if source.takes(item):
            yield item


def read_entries(folder: Path, settings: SourceSettings) -> Iterator[RawItem]:
    """Every entry of the source in `folder`, its sample not yet drawn."""
    fixed = settings.split if isinstance(settings.split, str) else None
    for item in ADAPTERS[settings.format].entries(folder, settings):
        if fixed and isinstance(item.data, dict):
            item = replace(item, data={**item.data, "split": fixed})
        yield replace(item, source=settings.name)


def id_hash(item: RawItem) -> int:
    """64 bits of a hash of the entry's id, or of its place where it has none."""
    id_ = item.data.get("id") if isinstance(item.data, dict) else None
    key = f"{item.source}\0{id_}" if isinstance(id_, str | int) else f"{item.source}\0{item.file}\0{item.position}"
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8])
