"""Validated records to Parquet shards of token ids, label spans and encoded pictures; the manifest is written last."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from haplovl.data.conversation import TEMPLATES, encode
from haplovl.data.media import Media
from haplovl.data.validated import ValidatedRecord, read_validated
from haplovl.errors import UserError
from haplovl.files import PREPARED, RAW, TEACHERS, VALIDATED, read_json, require, sha256_of, whole_folder, write_json
from haplovl.model import HaploProcessor
from haplovl.records import SPLITS, write_jsonl
from haplovl.settings import Params

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "kind": pa.string(),
        "source": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
        "images": pa.list_(pa.binary()),
        "sizes": pa.list_(pa.int32()),
        "tokens": pa.int32(),
        "supervised": pa.int32(),
    }
)
"""One row per record: ids with one placeholder per image, spans as start, stop, start, stop …, pictures as encoded
files, their width and height, and the record's tokens (placeholders counted once) and supervised tokens."""

ROW_GROUP = 16
"""Records of a shard that are read together: training reads them one by one, in random order."""


def prepare(params: Params) -> None:
    """Writes data/prepared/: shards per split, what was refused and why, and the manifest.

    Raises:
        UserError: validated data or teachers are missing, or no training record is left.
    """
    require(VALIDATED, "validate")
    processor = HaploProcessor.from_pretrained(require(TEACHERS / "processor", "teachers"))
    with whole_folder(PREPARED) as folder:
        refused: list[dict[str, Any]] = []
        shards = [
            shard
            for split in SPLITS
            for shard in _write_split(folder, split, _rows(split, processor, params, refused), params)
        ]
        if not any(shard["split"] == "train" for shard in shards):
            why = Counter(row["reason"] for row in refused).most_common(1)
            reason = f"; most were refused because: {why[0][0]}" if why else ""
            raise UserError(f"no training record is left after preparation{reason}")
        write_jsonl(folder / "quarantine.jsonl", refused)
        write_json(folder / "manifest.json", _manifest(shards, refused, params))
    total = sum(shard["records"] for shard in shards)
    print(f"prepared {total} records in {len(shards)} shards, {len(refused)} refused -> {PREPARED}")


def _rows(
    split: str, processor: HaploProcessor, params: Params, refused: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Encodes the records of a split; those that cannot be trained on go to `refused` with the reason."""
    template = TEMPLATES[params.prepare.chat_template]
    limit = params.prepare.max_tokens
    media = Media(RAW)
    for item in read_validated(VALIDATED, split=split):
        encoded = encode(item.record, template, processor.tokenizer)
        pictures = sum(processor.image_tokens(image.height, image.width) - 1 for image in item.images)
        expanded = len(encoded.input_ids) + pictures
        if expanded > limit:
            reason = "longer than prepare.max_tokens"
            refused.append({"id": item.record.id, "reason": reason, "tokens": expanded, "limit": limit})
        elif not encoded.supervised:
            refused.append({"id": item.record.id, "reason": "no supervised token"})
        else:
            yield _row(item, media, encoded.input_ids, encoded.spans, encoded.supervised)


def _row(
    item: ValidatedRecord, media: Media, ids: list[int], spans: list[tuple[int, int]], supervised: int
) -> dict[str, Any]:
    return {
        "id": item.record.id,
        "kind": item.record.kind,
        "source": item.source,
        "input_ids": ids,
        "spans": [edge for span in spans for edge in span],
        "images": [media.read(item.source, image.path) for image in item.images],
        "sizes": [edge for image in item.images for edge in (image.width, image.height)],
        "tokens": len(ids),
        "supervised": supervised,
    }


def _write_split(folder: Path, split: str, rows: Iterator[dict[str, Any]], params: Params) -> list[dict[str, Any]]:
    shards, batch = [], []

    def flush() -> None:
        path = folder / f"{split}-{len(shards):05d}.parquet"
        table = pa.Table.from_pylist(batch, schema=SCHEMA)
        pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
        shards.append(
            {
                "file": path.name,
                "split": split,
                "records": len(batch),
                "tokens": sum(row["tokens"] for row in batch),
                "supervised": sum(row["supervised"] for row in batch),
                "images": sum(len(row["images"]) for row in batch),
                "sha256": sha256_of(path),
            }
        )
        batch.clear()

    for row in rows:
        batch.append(row)
        if len(batch) == params.prepare.records_per_shard:
            flush()
    if batch:
        flush()
    return shards


def _manifest(shards: list[dict[str, Any]], refused: list[dict[str, Any]], params: Params) -> dict[str, Any]:
    totals = {
        split: {
            name: sum(shard[name] for shard in shards if shard["split"] == split)
            for name in ("records", "tokens", "supervised", "images")
        }
        for split in SPLITS
    }
    return {
        "chat_template": params.prepare.chat_template,
        "tokenizer_sha256": sha256_of(TEACHERS / "processor" / "tokenizer.json"),
        "totals": totals,
        "refused": dict(Counter(row["reason"] for row in refused)),
        "shards": shards,
    }


def read_manifest(folder: Path = PREPARED) -> dict[str, Any]:
    """The manifest of prepared data.

    Raises:
        UserError: it is missing (preparation did not finish) or damaged.
    """
    return read_json(require(folder / "manifest.json", "prepare"))
