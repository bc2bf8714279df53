"""Validated records to Parquet shards of token ids, label spans and encoded pictures; the manifest is written last.

Shards are made by several processes and kept in runs/cache/prepare under a name that follows from everything that they
are made from. Preparing again makes only the shards whose records, or whose settings, changed.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather

from haplovl.data import conversation, shards
from haplovl.data.cache import CACHE, take, trim
from haplovl.data.shards import TOO_LONG, ShardMaker
from haplovl.data.validated import ValidatedRecord, read_validated
from haplovl.data.workers import in_order
from haplovl.data_settings import PrepareSettings
from haplovl.errors import UserError
from haplovl.files import (
    PREPARED,
    TEACHERS,
    VALIDATED,
    read_json,
    require,
    sha256_of,
    sha256_of_folder,
    whole_folder,
    write_json,
)
from haplovl.model import HaploProcessor
from haplovl.records import SPLITS, write_jsonl
from haplovl.settings import Params, fingerprint

KEPT = CACHE / "prepare"
FEW_RECORDS = 16_384
"""New records up to which this process works alone: others would take longer to start than to help."""
CACHE_FACTOR = 2
"""Most bytes of kept shards, in multiples of those that the last run used: room for a second set of settings."""
PACKAGES = ("tokenizers", "transformers", "pyarrow", "pillow")
COUNTS = ("records", "tokens", "supervised", "images")


@dataclass(frozen=True)
class Block:
    """Consecutive records of one split that become one shard, and the key that follows from all it is made from."""

    split: str
    key: str
    items: list[ValidatedRecord]


def prepare(params: Params) -> None:
    """Writes data/prepared/: shards per split, what was refused and why, and the manifest.

    Raises:
        UserError: validated data or teachers are missing, a picture changed since it was validated, or no training
            record is left.
    """
    require(VALIDATED, "validate")
    place = require(TEACHERS / "processor", "teachers")
    KEPT.mkdir(parents=True, exist_ok=True)
    made = _Made()
    recipe = _recipe(place, params.prepare)
    blocks = made.missing(cut(read_validated(VALIDATED), params.prepare.records_per_shard, recipe))
    for key in _make(blocks, _Worker(place, params.prepare)):
        made.new.add(key)
    with whole_folder(PREPARED) as folder:
        manifest = _assemble(folder, made, params)
        write_json(folder / "manifest.json", manifest)
    used = {path for _, key in made.order for path in _kept(key)}
    trim(KEPT, CACHE_FACTOR * sum(path.stat().st_size for path in used if path.exists()), used)
    totals, refused = manifest["totals"].values(), sum(manifest["refused"].values())
    new = sum(1 for _, key in made.order if key in made.new)
    print(
        f"prepared {sum(total['records'] for total in totals)} records in {len(manifest['shards'])} shards, "
        f"{refused} refused; {new} of {len(made.order)} blocks were new -> {PREPARED}"
    )


def cut(items: Iterable[ValidatedRecord], most: int, recipe: str) -> Iterator[Block]:
    """Cuts the records of every split into blocks of at most `most`.

    Blocks end after records whose hash says so, not after a number of records: where records are added or removed, the
    cuts behind them stay where they were, as in content-defined chunking (LBFS, SOSP 2001).
    """
    least, mean = max(1, most // 4), max(1, most // 2)
    open_blocks: dict[str, tuple[list[ValidatedRecord], Any]] = {}
    for item in items:
        split = item.record.split
        records, key = open_blocks.setdefault(split, ([], hashlib.sha256(recipe.encode())))
        digest = _digest(item)
        key.update(digest)
        records.append(item)
        ends = len(records) >= least and int.from_bytes(digest[:8], "big") % mean == 0
        if ends or len(records) == most:
            yield Block(split, key.hexdigest(), records)
            del open_blocks[split]
    for split in SPLITS:
        if split in open_blocks:
            records, key = open_blocks[split]
            yield Block(split, key.hexdigest(), records)


def _digest(item: ValidatedRecord) -> bytes:
    record = item.record
    turns = [[turn.question, turn.answer, turn.kind] for turn in record.turns]
    images = [[image.path, image.sha256, image.width, image.height] for image in item.images]
    content = [record.id, record.split, record.system, item.source, turns, images]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).digest()


def _recipe(processor: Path, settings: PrepareSettings) -> str:
    """Fingerprint of all but the records: tokenizer, picture sizes, settings, template, code and packages."""
    return fingerprint(
        {
            "processor": sha256_of_folder(processor),
            "settings": settings.model_dump(mode="json", exclude={"records_per_shard"}),
            "template": asdict(conversation.TEMPLATES[settings.chat_template]),
            "code": [sha256_of(Path(str(module.__file__))) for module in (conversation, shards)],
            "packages": {name: version(name) for name in PACKAGES},
        }
    )


def _kept(key: str) -> tuple[Path, Path, Path]:
    """Where a block's shard, its index and its facts are kept; the facts are written last."""
    return tuple(KEPT / key[:2] / f"{key}.{kind}" for kind in ("parquet", "arrow", "json"))


class _Made:
    """What is kept of earlier runs, and the blocks of this one in their order."""

    def __init__(self) -> None:
        self.order: list[tuple[str, str]] = []
        self.new: set[str] = set()

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Notes the order of the blocks and yields those that no earlier run made, or whose file was damaged."""
        for block in blocks:
            self.order.append((block.split, block.key))
            if not _is_whole(block.key):
                yield block


def _is_whole(key: str) -> bool:
    """Whether a block is kept, and its shard as it was written: it may be the file in data/prepared/, too."""
    shard, index, facts = _kept(key)
    if not facts.exists():
        return False
    found = read_json(facts)
    return not found["records"] or (index.exists() and shard.exists() and sha256_of(shard) == found["sha256"])


class _Worker:
    """Makes a block's shard in the cache; sent to every process, where it loads the processor once."""

    def __init__(self, processor: Path, settings: PrepareSettings) -> None:
        self._place, self._settings = processor, settings
        self._maker: ShardMaker | None = None

    def __call__(self, task: list[Block]) -> str:
        # The processes share the cores; the tokenizer's own threads would only get in their way.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self._maker is None:
            self._maker = ShardMaker(HaploProcessor.from_pretrained(self._place), self._settings)
        (block,) = task
        shard, index, facts = _kept(block.key)
        facts.unlink(missing_ok=True)
        shard.parent.mkdir(parents=True, exist_ok=True)
        # Never written into: the old file may be the one in data/prepared/, or in DVC's cache.
        shard.unlink(missing_ok=True)
        write_json(facts, self._maker.write(block.items, shard, index))
        return block.key


def _make(blocks: Iterator[Block], worker: _Worker) -> Iterator[str]:
    """Makes the blocks' shards: a few in this process, more in several; yields their keys in order."""
    first, records = [], 0
    for block in blocks:
        first.append(block)
        records += len(block.items)
        if records > FEW_RECORDS:
            tasks = ([block] for block in chain(first, blocks))
            yield from in_order(worker, tasks, _crashed)
            return
    for block in first:
        yield worker([block])


def _crashed(block: Block) -> str:
    ids = f"'{block.items[0].record.id}' to '{block.items[-1].record.id}'"
    raise UserError(f"a process died while it prepared the records {ids}; is there enough memory?")


def _assemble(folder: Path, made: _Made, params: Params) -> dict[str, Any]:
    """Links the kept shards into `folder`, writes what was refused, and returns the manifest."""
    listed: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    indexes: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
    shortened, too_long = 0, sys.maxsize

    def refusals() -> Iterator[dict[str, Any]]:
        nonlocal shortened, too_long
        for split in SPLITS:
            number = 0
            for key in (key for own, key in made.order if own == split):
                shard, index, facts = _kept(key)
                found = read_json(facts)
                rows, shortened = found.pop("refused"), shortened + found.pop("shortened")
                refused.update(row["reason"] for row in rows)
                too_long = min([too_long, *(row["tokens"] for row in rows if row["reason"] == TOO_LONG)])
                yield from rows
                if found["records"]:
                    name = f"{split}-{number:05d}.parquet"
                    take(shard, folder / name)
                    listed.append({"file": name, "split": split, **found})
                    indexes[split].append(feather.read_table(index))
                    number += 1
                    os.utime(index)
                os.utime(facts)

    write_jsonl(folder / "quarantine.jsonl", refusals())
    if not any(shard["split"] == "train" for shard in listed):
        why = refused.most_common(1)
        reason = f"; most were refused because: {why[0][0]}" if why else ""
        if why and why[0][0] == TOO_LONG:
            reason += f" (the shortest has {too_long} tokens)"
        raise UserError(f"no training record is left after preparation{reason}")
    for split, tables in indexes.items():
        if tables:
            feather.write_feather(pa.concat_tables(tables), folder / index_name(split), compression="zstd")
    return {
        "chat_template": params.prepare.chat_template,
        "tokenizer_sha256": sha256_of(TEACHERS / "processor" / "tokenizer.json"),
        "totals": {split: _totals(shard for shard in listed if shard["split"] == split) for split in SPLITS},
        "sources": _by_source(listed),
        # Here, so that in DVC's graph a new weight reaches training, and a new licence does not.
        "weights": {source.name: source.weight for source in params.collect.sources},
        "refused": dict(refused),
        "shortened": shortened,
        "shards": listed,
    }


def index_name(split: str) -> str:
    """File of the prepared data that holds the index of a split: `shards.INDEX` of all its records, in order."""
    return f"index-{split}.arrow"


def _totals(listed: Iterable[dict[str, Any]]) -> dict[str, int]:
    chosen = list(listed)
    return {name: sum(shard[name] for shard in chosen) for name in COUNTS}


def _by_source(listed: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Records of every source in every split."""
    found: dict[str, dict[str, int]] = {}
    for shard in listed:
        for source, records in shard["sources"].items():
            splits = found.setdefault(source, dict.fromkeys(SPLITS, 0))
            splits[shard["split"]] += records
    return dict(sorted(found.items()))


def read_manifest(folder: Path = PREPARED) -> dict[str, Any]:
    """The manifest of prepared data.

    Raises:
        UserError: it is missing (preparation did not finish) or damaged.
    """
    return read_json(require(folder / "manifest.json", "prepare"))
