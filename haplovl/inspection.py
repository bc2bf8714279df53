"""`haplovl inspect`: one record as the model will see it, or why it was refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from haplovl.data.conversation import TEMPLATES, encode, segments
from haplovl.data.media import Media
from haplovl.data.validated import ValidatedRecord, find_validated
from haplovl.errors import UserError, printable
from haplovl.files import PREPARED, QUARANTINE, RAW, TEACHERS, VALIDATED
from haplovl.model import HaploProcessor
from haplovl.pictures import ImageError
from haplovl.records import Record, RecordError, parse_record
from haplovl.settings import Params

SUPERVISED, GIVEN, PLACE = ("bold green", "bold bright_green"), ("default", "dim"), "cyan"
"""Styles of tokens with and without loss, two of each so that neighbours can be told apart, and of pictures."""
BLOCKS = 48
"""Most characters that a picture is wide on the terminal."""
GAP = 2
"""Pixels between the tiles of a picture."""


def inspect(params: Params, id_: str, source: str | None = None, output: Path | None = None) -> bool:
    """Prints a record: where it is, its pictures in tiles, its tokens with those that carry loss in green.

    `output` takes the tiled pictures as a PNG file; without it they are drawn on the terminal. False where the record
    was refused; its reasons are printed then.

    Raises:
        UserError: no record has this id, or several sources have one.
    """
    console = Console(highlight=False, soft_wrap=True)
    found = [row for row in find_validated(id_, VALIDATED) if source in (None, row.source)]
    refused = [row for row in _refused(id_) if source in (None, row.get("source", source))]
    if len(found) > 1:
        raise UserError(f"'{id_}' is in the sources {', '.join(row.source for row in found)}; name one with --source")
    if not found and not refused:
        raise UserError(f"no record with the id '{id_}' is in {VALIDATED} or {QUARANTINE}")
    for row in refused:
        _show_refused(console, row)
    for row in found:
        about = f"{row.record.split}, {row.record.kind}, {len(row.record.turns)} turns, {len(row.images)} pictures"
        console.print(Text(printable(f"{row.source}/{row.record.id}: {about}"), "bold"))
        _show(console, row, params, output)
    return not refused


def _refused(id_: str) -> Iterator[dict[str, Any]]:
    """The lines of both quarantines about an id."""
    for path in (QUARANTINE / "records.jsonl", PREPARED / "quarantine.jsonl"):
        if path.exists():
            with path.open(encoding="utf-8") as file:
                yield from (row for row in map(json.loads, file) if row["id"] == id_)


def _show_refused(console: Console, row: dict[str, Any]) -> None:
    place = f"{row['source']}, {row['file']}, entry {row['position']}" if "file" in row else "while preparing"
    console.print(Text(printable(f"refused ({place})"), "bold red"))
    for reason in row.get("reasons") or [row["reason"]]:
        console.print(Text(printable(f"  {reason}"), "red"))
    if "data" not in row:
        return
    try:
        for kind, text in segments(parse_record(row["data"]), TEMPLATES["plain"]):
            console.print(Text(printable(text), SUPERVISED[0] if kind == "answer" else GIVEN[0]), end="")
        console.print()
    except RecordError:
        console.print(Text(printable(json.dumps(row["data"], ensure_ascii=False, indent=2))))


def _show(console: Console, row: ValidatedRecord, params: Params, output: Path | None) -> None:
    template = TEMPLATES[params.prepare.chat_template]
    folder = TEACHERS / "processor"
    if not folder.exists():
        console.print(Text(f"({folder} is missing: no tiles and tokens yet, 'haplovl teachers' makes them)", "dim"))
        text = Text()
        for kind, piece in segments(row.record, template):
            text.append(printable(piece), SUPERVISED[0] if kind in ("answer", "stop") else GIVEN[0])
        console.print(text)
        return
    processor = HaploProcessor.from_pretrained(folder)
    pictures = [_tiled(console, row, number, processor) for number in range(len(row.images))]
    if output is not None and pictures:
        _below_each_other(pictures).save(output, format="PNG")
        console.print(Text(f"the tiles are in {output}", "dim"))
    elif output is None:
        for picture in pictures:
            console.print(_blocks(picture))
    tokens = [processor.image_tokens(image.height, image.width) for image in row.images]
    console.print(_tokens(row.record, tokens, params, processor))


def _tiled(console: Console, row: ValidatedRecord, number: int, processor: HaploProcessor) -> Image.Image:
    """A picture as the processor lays it out: its tiles, resized and padded, with gaps between them."""
    image = row.images[number]
    look = processor.image_processor
    try:
        seen = look([Media(RAW).open(row.source, image.path)])
    except ImageError as error:
        raise UserError(f"{image.path}: {error}; it changed since validation") from None
    tiles, (rows, columns) = np.asarray(seen["pixel_values"][0]), (int(n) for n in seen["image_grids"][0][:2])
    count = processor.image_tokens(image.height, image.width)
    about = f"{image.width}x{image.height} pixels, {rows} x {columns} tiles, {count} tokens"
    console.print(Text(printable(f"picture {number + 1}, {image.path}: {about}"), PLACE))
    step = look.image_size + GAP
    canvas = Image.new("RGB", (columns * step - GAP, rows * step - GAP), "white")
    colours = tiles.transpose(0, 2, 3, 1) * np.array(look.image_std) + np.array(look.image_mean)
    for place, tile in enumerate((255 * colours).round().clip(0, 255).astype(np.uint8)):
        canvas.paste(Image.fromarray(tile), (place % columns * step, place // columns * step))
    return canvas


def _below_each_other(pictures: list[Image.Image]) -> Image.Image:
    height = sum(picture.height + GAP for picture in pictures) - GAP
    page = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height + GAP
    return page


def _blocks(picture: Image.Image) -> Text:
    """A small picture of characters, each of which shows two pixels, one above the other."""
    width = min(BLOCKS, picture.width)
    height = max(2, round(picture.height * width / picture.width) // 2 * 2)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    text = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", f"rgb({above[0]},{above[1]},{above[2]}) on rgb({below[0]},{below[1]},{below[2]})")
        text.append("\n")
    return text


def _tokens(record: Record, image_tokens: list[int], params: Params, processor: HaploProcessor) -> Text:
    """Every token in order, coloured; a picture's tokens as one."""
    encoded = encode(record, TEMPLATES[params.prepare.chat_template], processor.tokenizer)
    supervised = np.zeros(len(encoded.input_ids), dtype=bool)
    for start, stop in encoded.spans:
        supervised[start:stop] = True
    total = len(encoded.input_ids) + sum(image_tokens) - len(image_tokens)
    limit = params.prepare.max_tokens
    text = Text(f"{total} tokens (limit {limit}), {encoded.supervised} carry loss (green)\n", "dim")
    pictures = iter(enumerate(image_tokens, start=1))
    for place, token in enumerate(encoded.input_ids):
        if token == processor.image_token_id:
            number, count = next(pictures)
            text.append(f"[picture {number}: {count} tokens]", PLACE)
            continue
        styles = SUPERVISED if supervised[place] else GIVEN
        text.append(printable(processor.tokenizer.decode([token])), styles[place % 2])
    return text
