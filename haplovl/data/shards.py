"""One shard of prepared data: records as token ids, label spans and picture files, in a Parquet file."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
from PIL import Image

from haplovl.data.conversation import TEMPLATES, Encoded, Encoder
from haplovl.data.media import Media
from haplovl.data.validated import ImageFile, ValidatedRecord
from haplovl.data_settings import PrepareSettings
from haplovl.errors import UserError
from haplovl.files import RAW, sha256_of
from haplovl.model import HaploProcessor
from haplovl.pictures import ImageError, decode_bytes
from haplovl.records import IMAGE_PLACEHOLDER, Record, RecordError

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

INDEX = pa.schema(
    [("kind", pa.string()), ("source", pa.string()), ("tokens", pa.int32()), ("sizes", pa.list_(pa.int32()))]
)
"""What packing must know of every record, apart from the shards: reading it there would touch every row group."""

GROUP_RECORDS, GROUP_BYTES = 32, 1 << 19
"""Most records of a shard that are read together, and about how many bytes: training reads them one by one, in random
order. With smaller groups, opening a shard takes longer than reading a record: 11 µs and 8 KB of memory for each."""
ENCODED_TOGETHER = 256
"""Records whose texts go to the tokenizer in one call."""
WRITTEN_TOGETHER = 64
"""Records whose pictures are in memory at once."""
JPEG_QUALITY = 92
TOO_LONG = "longer than prepare.max_tokens"
_PICTURES = "images.list.element"


@dataclass(frozen=True)
class Picture:
    """One picture as a shard holds it: an image file's bytes and its upright size in pixels."""

    data: bytes
    width: int
    height: int


class ShardMaker:
    """Turns validated records into the rows of shards; what it does follows from its processor and settings alone."""

    def __init__(self, processor: HaploProcessor, settings: PrepareSettings, raw: Path = RAW) -> None:
        self.settings, self.processor = settings, processor
        self._encoder = Encoder(TEMPLATES[settings.chat_template], processor.tokenizer)
        self._media = Media(raw)

    def write(self, items: Sequence[ValidatedRecord], path: Path, index: Path) -> dict[str, Any]:
        """Writes the shard and its index, unless no record is left; returns its facts, refused records among them.

        Raises:
            UserError: a picture is no longer what it was when it was validated.
        """
        refused: list[dict[str, Any]] = []
        sources: Counter[str] = Counter()
        facts = {"records": 0, "tokens": 0, "supervised": 0, "images": 0, "shortened": 0}
        known: list[dict[str, Any]] = []
        writer = None
        rows = self._rows(items, refused)
        try:
            while part := list(islice(rows, WRITTEN_TOGETHER)):
                facts["records"] += len(part)
                facts["images"] += sum(len(row["images"]) for row in part)
                for name in ("tokens", "supervised", "shortened"):
                    facts[name] += sum(row[name] for row in part)
                sources.update(row["source"] for row in part)
                known += [{name: row[name] for name in INDEX.names} for row in part]
                writer = writer or _open(path)
                _write(part, writer)
        finally:
            if writer:
                writer.close()
        if known:
            feather.write_feather(pa.Table.from_pylist(known, schema=INDEX), index, compression="zstd")
        found = {**facts, "sources": dict(sorted(sources.items())), "refused": refused}
        return {**found, "sha256": sha256_of(path)} if known else found

    def _rows(self, items: Sequence[ValidatedRecord], refused: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(items), ENCODED_TOGETHER):
            part = items[start : start + ENCODED_TOGETHER]
            for item, encoded in zip(part, self._encoded(part), strict=True):
                outcome = self._row(item, encoded) if isinstance(encoded, Encoded) else {"reason": str(encoded)}
                if "reason" in outcome:
                    refused.append({"id": item.record.id, "source": item.source, **outcome})
                else:
                    yield outcome

    def _encoded(self, items: Sequence[ValidatedRecord]) -> list[Encoded | RecordError]:
        records = [item.record for item in items]
        try:
            return list(self._encoder.encode_many(records))
        except RecordError as error:
            # Somebody among them: each alone, to find out who.
            return [error] if len(items) == 1 else [one for item in items for one in self._encoded([item])]

    def _row(self, item: ValidatedRecord, encoded: Encoded) -> dict[str, Any]:
        """The record's row, or the reason why it has none."""
        pictures = [self._picture(item, image) for image in item.images]
        limit = self.settings.max_tokens
        needed = self._expanded(encoded, pictures)
        record, shortened = item.record, False
        while needed > limit:
            if self.settings.too_long != "drop_last_turns" or len(record.turns) == 1:
                return {"reason": TOO_LONG, "tokens": needed, "limit": limit}
            record, shortened = without_last_turn(record), True
            pictures = pictures[: len(record.images)]
            encoded = self._encoder.encode(record)
            needed = self._expanded(encoded, pictures)
        if not encoded.supervised:
            return {"reason": "no supervised token"}
        return {
            "id": record.id,
            "kind": record.kind,
            "source": item.source,
            "input_ids": encoded.input_ids,
            "spans": [edge for span in encoded.spans for edge in span],
            "images": [picture.data for picture in pictures],
            "sizes": [edge for picture in pictures for edge in (picture.width, picture.height)],
            "tokens": len(encoded.input_ids),
            "supervised": encoded.supervised,
            "shortened": shortened,
        }

    def _expanded(self, encoded: Encoded, pictures: Sequence[Picture]) -> int:
        """Tokens with those of the pictures in place of their placeholders."""
        images = sum(self.processor.image_tokens(picture.height, picture.width) - 1 for picture in pictures)
        return len(encoded.input_ids) + images

    def _picture(self, item: ValidatedRecord, image: ImageFile) -> Picture:
        try:
            data = self._media.read(item.source, image.path)
            if hashlib.sha256(data).hexdigest() != image.sha256:
                raise ImageError("it changed after it was validated")
            side = self.settings.max_image_side
            if side is None or max(image.width, image.height) <= side:
                return Picture(data, image.width, image.height)
            return scaled_down(decode_bytes(data, image.width * image.height), side)
        except ImageError as error:
            where = f"picture {image.path} of record '{item.record.id}' ({item.source})"
            raise UserError(f"{where}: {error}; run 'haplovl validate' again") from None


def without_last_turn(record: Record) -> Record:
    """The record without its last turn and the pictures of that turn."""
    turns = record.turns[:-1]
    pictures = sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in turns)
    return replace(record, turns=turns, images=record.images[:pictures])


def scaled_down(image: Image.Image, side: int) -> Picture:
    """An RGB image as a JPEG file whose longer side has `side` pixels."""
    scale = side / max(image.size)
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    file = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=JPEG_QUALITY)
    return Picture(file.getvalue(), *size)


def _open(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        SCHEMA,
        # Picture files are compressed already, and make no dictionary.
        compression=dict.fromkeys(_leaves(), "zstd") | {_PICTURES: "none"},
        use_dictionary=["kind", "source"],
        write_statistics=False,
    )


def _write(rows: list[dict[str, Any]], writer: pq.ParquetWriter) -> None:
    size = sum(4 * len(row["input_ids"]) + sum(map(len, row["images"])) for row in rows) / len(rows)
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    writer.write_table(pa.table(columns, schema=SCHEMA), max(1, min(GROUP_RECORDS, int(GROUP_BYTES / size))))


def _leaves() -> list[str]:
    """The columns as Parquet names them."""
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in SCHEMA]
