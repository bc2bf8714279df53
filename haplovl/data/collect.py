"""`haplovl collect`: brings the sources into data/raw/, their bytes unchanged (layout: haplovl.data.sources).

Nothing is decoded or judged here; that is validate's work.
"""

import hashlib
import heapq
from dataclasses import replace
from pathlib import Path
from typing import Any

from haplovl.data.media import SKIPPED
from haplovl.data.sources import ADAPTERS, SOURCES_FILE, Collected, id_hash, read_entries
from haplovl.data.sources.common import ANNOTATIONS, Bringing
from haplovl.data_settings import SourceSettings
from haplovl.errors import UserError
from haplovl.files import RAW, whole_folder, write_json
from haplovl.pictures import ImageError
from haplovl.records import RecordError, parse_record
from haplovl.settings import Params


def collect(params: Params, root: Path = RAW) -> None:
    """Brings every source into `root`, which appears only when all of it is there.

    Raises:
        UserError: a source cannot be read, or a file not to its end.
        OSError: the output cannot be written (disk full).
    """
    sources = params.collect.sources
    for settings in sources:
        ADAPTERS[settings.format].check(settings)
    with whole_folder(root) as folder:
        collected = [_bring(settings, params.seed, folder) for settings in sources]
        write_json(folder / SOURCES_FILE, [source.to_json() for source in collected])
    for source in collected:
        skipped = f", {source.skipped} skipped (see {root / source.name / SKIPPED})" if source.skipped else ""
        print(f"{source.name}: {source.records} records, {source.images} images{skipped}")
    print(f"collected {len(collected)} source{'s' * (len(collected) > 1)} into {root}")


def _bring(settings: SourceSettings, seed: int, raw: Path) -> Collected:
    """Brings one source: its files, then every image that a record of its sample names."""
    adapter = ADAPTERS[settings.format]
    bringing = Bringing(raw / settings.name)
    (bringing.folder / ANNOTATIONS).mkdir(parents=True)
    bringing.media.mkdir()
    (bringing.folder / SKIPPED).touch()
    adapter.bring(settings, seed, bringing)
    source = Collected(settings, 0, 0, 0, _sample_below(bringing.folder, settings), tuple(bringing.files))
    records = images = 0
    seen = _Seen()
    for item in read_entries(bringing.folder, settings):
        if item.cut and settings.damaged_files == "refuse":
            raise UserError(
                f"{item.file} of the source {settings.name} is unusable from entry {item.position} on: {item.error}; "
                "bring the file whole, or set 'damaged_files: keep' for this source, and what follows will be missing"
            )
        if not source.takes(item):
            continue
        records += 1
        for ref in _images_of(item.data):
            if not seen.add(ref):
                continue
            try:
                adapter.bring_image(settings, ref, bringing)
                images += 1
            except ImageError as error:
                bringing.skip(ref, str(error))
    return replace(source, records=records, images=images, skipped=bringing.skipped)


class _Seen:
    """A set of names that keeps 8 bytes of each."""

    def __init__(self) -> None:
        self._hashes: set[int] = set()

    def add(self, name: str) -> bool:
        """Whether the name is new."""
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
        before = len(self._hashes)
        self._hashes.add(int.from_bytes(digest))
        return len(self._hashes) > before


def _sample_below(folder: Path, settings: SourceSettings) -> int | None:
    """The id hash that lets exactly `sample` records through; None where all pass."""
    if settings.sample is None:
        return None
    smallest = heapq.nsmallest(settings.sample + 1, map(id_hash, read_entries(folder, settings)))
    return smallest[-1] if len(smallest) > settings.sample else None


def _images_of(data: Any) -> tuple[str, ...]:
    """The images of an entry; none where it is no record, as nothing will read them."""
    try:
        return parse_record(data).images
    except RecordError:
        return ()
