"""Record: one conversation with its images; readers and writers of LLaVA-style JSON and JSONL."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

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
    (everything else). Beside an error, `raw` holds the beginning of the text that could not be read, and `cut` says
    that all that follows in the file is lost with it.
    """

    file: str
    position: int
    data: Any = None
    error: str = ""
    raw: str = ""
    source: str = ""
    cut: bool = False


RAW_LIMIT = 10_000
"""Characters of unreadable text that a RawItem keeps."""
ENTRY_LIMIT = 1 << 26
"""Longest entry, in bytes of a line or characters of a list's element (64 Mi): no file can fill the memory."""
WINDOW = 1 << 20
"""Characters that are read at a time."""


def read_items(path: Path) -> Iterator[RawItem]:
    """Yields every entry of a .jsonl or .json annotation file, with an error where an entry cannot be read.

    Neither is ever held as a whole. A damaged line of a JSONL file costs that line. Damage in a JSON list costs what
    lies before the next text that begins like the list's first record, or the rest of the file.

    Raises:
        OSError: the file itself cannot be opened.
    """
    reader = _read_jsonl if path.suffix == ".jsonl" else _read_json
    yield from reader(path)


def _read_jsonl(path: Path) -> Iterator[RawItem]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(ENTRY_LIMIT):
            number += 1
            size = len(line) + _rest_of_line(file, line)
            if not line.strip():
                continue
            try:
                if size > len(line):
                    raise ValueError(f"the line has {size} bytes, more than the limit of {ENTRY_LIMIT}")
                data = _UNIQUE.decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raw = line[:RAW_LIMIT].decode("utf-8", errors="replace")
                yield RawItem(path.name, number, error=f"not valid JSON: {error}", raw=raw)
            else:
                yield RawItem(path.name, number, data=data)


def _rest_of_line(file: BinaryIO, line: bytes) -> int:
    """Passes over what is left of a line that is longer than ENTRY_LIMIT; its bytes."""
    size = 0
    while not line.endswith(b"\n") and (line := file.readline(WINDOW)):
        size += len(line)
    return size


class _RepeatedKey(ValueError):
    """One object has a key twice, of which Python's decoder would keep the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKey(f"the key {_short(twice)} occurs twice in one object")
    return found


_UNIQUE, _PLAIN = json.JSONDecoder(object_pairs_hook=_unique), json.JSONDecoder()


def decode_unique(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, an object has a key twice (of which other decoders keep the last), or it is nested
            deeper than the interpreter goes.
    """
    try:
        return _UNIQUE.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read_json(path: Path) -> Iterator[RawItem]:
    # Damaged bytes become lone surrogates, which parse_record refuses: they cost their own record and no other.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        text = _Window(file)
        if text.peek() != "[":
            what = "the file is empty; it" if not text.peek() else "the file"
            hint = "; records line by line belong into a .jsonl file" if text.peek() == "{" else ""
            yield RawItem(
                path.name, 0, error=f"{what} must hold a JSON list of records{hint}", raw=text.shown(), cut=True
            )
            return
        text.take()
        index, opening = 0, None
        while text.peek() != "]":
            raw, broken = text.shown(), ""
            try:
                data = text.decode()
                opening = opening or _opening(data)
                yield RawItem(path.name, index, data=data)
                index += 1
            except _RepeatedKey as twice:
                yield RawItem(path.name, index, error=f"not valid JSON: {twice}", raw=raw)
                index += 1
            except (ValueError, RecursionError) as damage:
                broken = str(damage)
            if not broken and text.peek() == ",":
                text.take()
            elif broken or text.peek() != "]":
                raw = raw if broken else text.shown()
                lost, ended = text.skip_to(opening, skip_here=bool(broken))
                if error := _damage(broken, lost, ended):
                    yield RawItem(path.name, index, error=error, raw=raw, cut=ended)
                    index += 1
                if ended:
                    return


def _damage(broken: str, lost: int, ended: bool) -> str:
    """What to say of `lost` characters that could not be read; nothing, where only a comma is missing."""
    if broken:
        where = "from here to the end of the file " if ended else ""
        return f"not valid JSON {where}({lost} characters): {broken}"
    return f"the list of records ends without ']' or lacks a ',' ({lost} characters follow)" if lost or ended else ""


def _opening(data: Any) -> re.Pattern[str] | None:
    """How records of this kind begin: an object whose first key is that of `data`."""
    first = next(iter(data), None) if isinstance(data, dict) else None
    return None if first is None else re.compile(r"\{\s*" + re.escape(json.dumps(first)) + r"\s*:")


class _Window:
    """A JSON text of any length, of which only the part that is being parsed is in memory."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._ended = file, "", 0, False

    def peek(self) -> str:
        """The next character that is no blank; nothing at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self) -> None:
        """Passes over one character."""
        self._at += 1

    def shown(self) -> str:
        """The beginning of what follows."""
        return self._text[self._at : self._at + RAW_LIMIT]

    def decode(self) -> Any:
        """The JSON value that follows.

        Raises:
            _RepeatedKey: an object in it has a key twice; the value is passed over.
            ValueError, RecursionError: it is damaged, too long or too deep; nothing is passed over.
        """
        while True:
            try:
                try:
                    data, end = _UNIQUE.raw_decode(self._text, self._at)
                except _RepeatedKey:
                    _, self._at = _PLAIN.raw_decode(self._text, self._at)
                    raise
            except json.JSONDecodeError as error:
                # What the window cuts off fails at its end, or as a string whose end is not in sight.
                cut = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if not cut or not self._more(len(self._text) - self._at):
                    raise
                if len(self._text) > ENTRY_LIMIT:
                    raise ValueError(f"the entry has more than {ENTRY_LIMIT} characters") from None
                continue
            if end == len(self._text) and self._text[end - 1] not in ']}"' and self._more():
                continue  # a number at the end of the window may go on
            self._at = end
            return data

    def skip_to(self, opening: re.Pattern[str] | None, skip_here: bool) -> tuple[int, bool]:
        """Passes over everything before the next match of `opening`, which `skip_here` keeps from being found here.

        Returns the number of characters passed over, and whether there was no match.
        """
        lost = int(skip_here and self._at < len(self._text))
        self._at += lost
        while True:
            found = opening.search(self._text, self._at) if opening else None
            if found:
                lost += found.start() - self._at
                self._at = found.start()
                return lost, False
            # A match may begin in what is in memory and end in what is not.
            kept = max(self._at, len(self._text) - 1024)
            lost, self._at = lost + kept - self._at, kept
            if not self._more():
                lost += len(self._text) - self._at
                self._at = len(self._text)
                return lost, True

    def _more(self, size: int = 0) -> bool:
        """Reads on and lets go of what was passed over; False at the end of the file."""
        chunk = "" if self._ended else self._file.read(max(size, WINDOW))
        self._ended = not chunk
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes dictionaries as JSON lines in a stable form (UTF-8, key order kept)."""
    # A lone surrogate becomes its JSON escape, so that quarantine can show what it refuses.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
