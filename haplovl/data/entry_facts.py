"""What can be told from one entry alone, without its pictures: the first half of validation, done by many processes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from haplovl.data.text_checks import degenerate, encoding_damage, question_key
from haplovl.data.validated import TURNS
from haplovl.data.workers import in_order
from haplovl.records import IMAGE_PLACEHOLDER, ConversationError, RawItem, Record, RecordError, parse_record

DATA_LIMIT = 10_000
"""Characters of an entry that quarantine keeps."""
TASK, TASK_CHARACTERS = 256, 1 << 22
"""Entries that one process takes at a time, at most; and characters of their texts, from which on it takes no more."""
KEY = pa.binary(16)

SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "file": pa.string(),
        "position": pa.int64(),
        "id": pa.string(),
        "id_key": KEY,
        "split": pa.string(),
        "split_place": pa.uint64(),
        "kind": pa.string(),
        "system": pa.string(),
        "turns": TURNS,
        "refs": pa.list_(pa.string()),
        "ref_keys": pa.list_(KEY),
        "placeholders": pa.int32(),
        "stray_placeholders": pa.int32(),
        "blank_messages": pa.int32(),
        "degenerate_answers": pa.string(),
        "encoding_error": pa.string(),
        "entry_error": pa.string(),
        "conversation_error": pa.string(),
        "question_keys": pa.list_(pa.uint64()),
        "raw": pa.string(),
    }
)
"""One row per entry, as it waits on disk for what only all entries together can tell. Errors are null where there is
none; `kind` is null where no record could be read. `raw` is the entry as JSON, for quarantine."""


@dataclass(frozen=True)
class ReadEntries:
    """Turns entries into rows of SCHEMA; sent to every process.

    `question_words` is the length from which questions are compared with those of benchmarks; None compares none.
    """

    max_characters: int
    degenerate_repeats: int
    question_words: int | None

    def __call__(self, items: list[RawItem]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist([self.row(item) for item in items], schema=SCHEMA)

    def row(self, item: RawItem) -> dict[str, Any]:
        """One entry's row."""
        row: dict[str, Any] = {
            "source": item.source,
            "file": _clean(item.file),
            "position": item.position,
            "id": _clean(_id_of(item)),
            "raw": _bounded(item),
        }
        try:
            record = self._record(item)
        except ConversationError as error:
            row["conversation_error"] = _clean(str(error))
        except RecordError as error:
            row["entry_error"] = _clean(str(error))
        else:
            row.update(_identity(record, item.source), **self._text_facts(record))
        return row

    def _record(self, item: RawItem) -> Record:
        if item.error:
            raise RecordError(item.error)
        record = parse_record(item.data)
        length = sum(len(text) for text in _texts(record))
        if length > self.max_characters:
            raise RecordError(f"the text has {length} characters, more than the limit of {self.max_characters}")
        return record

    def _text_facts(self, record: Record) -> dict[str, Any]:
        outside = [record.system, *(turn.answer for turn in record.turns)]
        keys = []
        if self.question_words is not None:
            keys = [question_key(turn.question, self.question_words) for turn in record.turns]
        return {
            "placeholders": record.placeholders,
            "stray_placeholders": sum(text.count(IMAGE_PLACEHOLDER) for text in outside),
            # A question may be the image alone (caption data); an answer needs text of its own.
            "blank_messages": sum(
                (not turn.question.strip()) + (not turn.answer.replace(IMAGE_PLACEHOLDER, "").strip())
                for turn in record.turns
            ),
            "degenerate_answers": self._degenerate(record),
            "encoding_error": encoding_damage("\n".join(_texts(record))),
            "question_keys": [key for key in keys if key is not None],
        }

    def _degenerate(self, record: Record) -> str | None:
        for number, turn in enumerate(record.turns, start=1):
            if reason := degenerate(turn.answer, self.degenerate_repeats):
                return f"answer {number}: {reason}"
        return None


def read_rows(items: Iterable[RawItem], work: ReadEntries, processes: int | None) -> Iterator[pa.RecordBatch]:
    """The rows of all entries, in order."""
    return in_order(work, _tasks(items), _crashed, processes)


def _tasks(items: Iterable[RawItem]) -> Iterator[list[RawItem]]:
    task: list[RawItem] = []
    characters = 0
    for item in items:
        task.append(item)
        characters += _length(item.data)
        if len(task) >= TASK or characters >= TASK_CHARACTERS:
            yield task
            task, characters = [], 0
    if task:
        yield task


def _length(data: Any) -> int:
    """About how many characters an entry's conversation has."""
    messages = data.get("conversations") if isinstance(data, dict) else None
    if not isinstance(messages, list):
        return 0
    texts = [message.get("value") for message in messages if isinstance(message, dict)]
    return sum(len(text) for text in texts if isinstance(text, str))


def _crashed(item: RawItem) -> pa.RecordBatch:
    row = {"source": item.source, "file": _clean(item.file), "position": item.position, "raw": "null"}
    row["entry_error"] = "the process that read it was killed (too large for the memory?)"
    return pa.RecordBatch.from_pylist([row], schema=SCHEMA)


def _identity(record: Record, source: str) -> dict[str, Any]:
    return {
        "id": record.id,
        "id_key": short_key(source, record.id),
        "split": record.split,
        "split_place": int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:8], "big"),
        "kind": record.kind,
        "system": record.system,
        "turns": [{"question": turn.question, "answer": turn.answer, "kind": turn.kind} for turn in record.turns],
        "refs": list(record.images),
        "ref_keys": [short_key(source, ref) for ref in record.images],
    }


def short_key(source: str, name: str) -> bytes:
    """16 bytes that stand for an id or a reference of a source where millions of them are compared."""
    return hashlib.blake2b(f"{source}\0{name}".encode(), digest_size=16).digest()


def _texts(record: Record) -> list[str]:
    return [record.id, record.system, *(text for turn in record.turns for text in (turn.question, turn.answer))]


def _id_of(item: RawItem) -> str | None:
    """The entry's id as far as it can be told, so that quarantine can name even what cannot be read."""
    if item.error:
        found = re.match(r'\s*\{\s*"id"\s*:\s*"?([^",}\s]+)', item.raw)
        return found[1] if found else None
    id_ = item.data.get("id") if isinstance(item.data, dict) else None
    return str(id_)[:DATA_LIMIT] if isinstance(id_, str | int) else None


def _bounded(item: RawItem) -> str:
    """The entry as JSON; the beginning of its text where it is long or could not be read."""
    if item.error:
        return _clean(json.dumps(item.raw[:DATA_LIMIT], ensure_ascii=False))
    try:
        text = _clean(json.dumps(item.data, ensure_ascii=False, default=repr))
    except (ValueError, TypeError, RecursionError) as error:
        return json.dumps(f"cannot be shown: {error}")
    return text if len(text) <= DATA_LIMIT else json.dumps(text[:DATA_LIMIT], ensure_ascii=False)


def _clean(text: str | None) -> str | None:
    """The text with lone surrogates as escapes, which inside JSON mean the same."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
