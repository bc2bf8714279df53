"""Record: one conversation with its images; readers and writers of LLaVA-style JSON and JSONL."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_PLACEHOLDER = "<image>"
ROLES = ("human", "gpt")
SPLITS = ("train", "validation", "test")


class RecordError(ValueError):
    """A record that cannot be used; the message is the reason that quarantine shows."""


class ConversationError(RecordError):
    """A record whose fields are there, but whose conversation is empty or does not alternate."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    `kind` names what is asked (`caption`, `digit`, …) where the source knows it, else `""`.
    """

    question: str
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class Record:
    """One conversation about zero or more images.

    `images` are references that `haplovl.data.media` resolves, in the order of the `<image>` placeholders that the
    questions hold. `split` is one of SPLITS, or `""` where the source names none.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    split: str = ""
    system: str = ""

    @property
    def placeholders(self) -> int:
        """Number of image placeholders in the questions."""
        return sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in self.turns)

    @property
    def kind(self) -> str:
        """What the record teaches: `text` (no image), `caption` (one caption turn) or `instruction`."""
        if not self.images:
            return "text"
        return "caption" if [turn.kind for turn in self.turns] == ["caption"] else "instruction"

    def to_json(self) -> dict[str, Any]:
        """The record as a LLaVA-style dictionary; `parse_record` reads it back."""
        conversations: list[dict[str, str]] = [{"from": "system", "value": self.system}] if self.system else []
        for turn in self.turns:
            kind = {"kind": turn.kind} if turn.kind else {}
            conversations.append({"from": "human", "value": turn.question, **kind})
            conversations.append({"from": "gpt", "value": turn.answer})
        data: dict[str, Any] = {"id": self.id}
        if self.split:
            data["split"] = self.split
        if self.images:
            data["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        return {**data, "conversations": conversations}


def parse_record(data: Any) -> Record:
    """Builds a Record from a LLaVA-style dictionary.

    Raises:
        RecordError: a field is missing or has the wrong type, or the turns do not alternate. Whether placeholders
            match images and answers hold text is judged by validation, which sees the whole record.
    """
    if not isinstance(data, dict):
        raise RecordError(f"a record must be a JSON object, found {type(data).__name__}")
    id_ = data.get("id")
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)
    if not isinstance(id_, str) or not id_:
        raise RecordError(f"'id' must be a non-empty string, found {_short(id_)}")
    images = data.get("image", [])
    images = [images] if isinstance(images, str) else [] if images is None else images
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise RecordError(f"'image' must be a path or a list of paths, found {_short(data['image'])}")
    split = data.get("split", "")
    if split not in ("", *SPLITS):
        raise RecordError(f"'split' must be one of {', '.join(SPLITS)}, found {_short(split)}")
    system, turns = _parse_conversation(data.get("conversations"))
    record = Record(id=id_, images=tuple(images), turns=turns, split=split, system=system)
    _check_text(record)
    return record


def _check_text(record: Record) -> None:
    """Refuses lone surrogates: JSON can spell them and damaged UTF-8 leaves them, but no tokenizer takes them."""
    turns = [text for turn in record.turns for text in (turn.question, turn.answer, turn.kind)]
    try:
        "".join([record.id, record.system, *record.images, *turns]).encode()
    except UnicodeEncodeError:
        raise RecordError("the text holds damaged characters (no valid Unicode)") from None


def _parse_conversation(messages: Any) -> tuple[str, tuple[Turn, ...]]:
    if not isinstance(messages, list):
        raise RecordError(f"'conversations' must be a list, found {_short(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise RecordError(f"message {i} must be an object with a string 'value'")
        if message.get("from") not in (*ROLES, "system"):
            raise RecordError(f"message {i} has the unknown role {_short(message.get('from'))}")
    system = ""
    if messages and messages[0]["from"] == "system":
        system, messages = messages[0]["value"], messages[1:]
    if not messages:
        raise ConversationError("the conversation is empty")
    for i, message in enumerate(messages):
        if message["from"] != ROLES[i % 2]:
            raise ConversationError(f"turns do not alternate: message {i} is from '{message['from']}'")
    if len(messages) % 2:
        raise ConversationError("the last question has no answer")
    pairs = zip(messages[0::2], messages[1::2], strict=True)
    return system, tuple(Turn(q["value"], a["value"], str(q.get("kind", ""))) for q, a in pairs)


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True)
class RawItem:
    """One entry of a source: its data, or the error that stands in its place.

    `file` is the annotation file or archive that holds it; `position` is the 1-based line (JSONL) or the 0-based index
    (everything else). Beside an error, `raw` holds the beginning of the text that could not be read.
    """

    file: str
    position: int
    data: Any = None
    error: str = ""
    raw: str = ""
    source: str = ""


RAW_LIMIT = 10_000
"""Characters of unreadable text that a RawItem keeps."""


def read_items(path: Path) -> Iterator[RawItem]:
    """Yields every entry of a .jsonl or .json annotation file, with an error where an entry cannot be read.

    A damaged line of a JSONL file costs that line; a damaged or truncated JSON list costs what follows the damage.

    Raises:
        OSError: the file itself cannot be opened.
    """
    reader = _read_jsonl if path.suffix == ".jsonl" else _read_json
    yield from reader(path)


def _read_jsonl(path: Path) -> Iterator[RawItem]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield RawItem(path.name, number, data=json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except (ValueError, RecursionError) as error:
                raw = line[:RAW_LIMIT].decode("utf-8", errors="replace")
                yield RawItem(path.name, number, error=f"not valid JSON: {error}", raw=raw)


def _read_json(path: Path) -> Iterator[RawItem]:
    # Damaged bytes become lone surrogates, which parse_record refuses: they cost their own record and no other.
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    decoder = json.JSONDecoder()
    start = _skip(text, 0, " \t\r\n\ufeff")
    if start >= len(text) or text[start] != "[":
        yield RawItem(path.name, 0, error="the file must hold a JSON list of records", raw=text[:RAW_LIMIT])
        return
    start, index = _skip(text, start + 1), 0
    while True:
        if start < len(text) and text[start] == "]":
            return
        try:
            data, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            lost = f"not valid JSON from here to the end of the file ({len(text) - start} characters): {error}"
            yield RawItem(path.name, index, error=lost, raw=text[start : start + RAW_LIMIT])
            return
        yield RawItem(path.name, index, data=data)
        index, start = index + 1, _skip(text, start)
        if start < len(text) and text[start] == ",":
            start = _skip(text, start + 1)
        elif start >= len(text) or text[start] != "]":
            lost = f"the list of records ends without ']' or lacks a ',' ({len(text) - start} characters follow)"
            yield RawItem(path.name, index, error=lost, raw=text[start : start + RAW_LIMIT])
            return


def _skip(text: str, start: int, blanks: str = " \t\r\n") -> int:
    while start < len(text) and text[start] in blanks:
        start += 1
    return start


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes dictionaries as JSON lines in a stable form (UTF-8, key order kept)."""
    # A lone surrogate becomes its JSON escape, so that quarantine can show what it refuses.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
