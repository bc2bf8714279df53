"""The held-out questions: every one asked in a fresh conversation, about the record's own pictures."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from haplovl.data.validated import ImageFile, ValidatedRecord, read_validated
from haplovl.errors import UserError
from haplovl.evaluate.scorers import normalise
from haplovl.files import VALIDATED
from haplovl.records import IMAGE_PLACEHOLDER

UNNAMED_KIND = "answer"
"""The type of questions from sources that do not name what a turn asks (LLaVA-style files)."""

TOTAL = "all"
"""What tables call all questions together: no type may have this name, or its row would be the total's."""


@dataclass(frozen=True)
class Question:
    """One question to ask; `images` are the record's pictures in the order they are shown, `source` is theirs."""

    id: str
    record_id: str
    kind: str
    images: tuple[ImageFile, ...]
    question: str
    answer: str
    source: str = ""


def held_out_questions(per_type: int, folder: Path = VALIDATED, split: str = "test") -> list[Question]:
    """The questions of a split, at most `per_type` of every kind, balanced over their answers.

    Returns questions sorted by kind and id; the choice depends on nothing but the records and `per_type`.
    """
    questions = [question for item in read_validated(folder=folder, split=split) for question in questions_of(item)]
    by_kind: dict[str, list[Question]] = defaultdict(list)
    for question in _told_apart(questions):
        by_kind[question.kind].append(question)
    return [question for kind in sorted(by_kind) for question in balanced(by_kind[kind], per_type)]


def _told_apart(questions: list[Question]) -> list[Question]:
    """The questions, with their source in the ids that several sources use: ids are unique within one only."""
    sources: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        sources[question.id].add(question.source)
    return [
        replace(question, id=f"{question.source}/{question.id}") if len(sources[question.id]) > 1 else question
        for question in questions
    ]


def questions_of(item: ValidatedRecord) -> list[Question]:
    """The turns of a record about pictures as single questions, without the turns before them.

    Caption turns are no questions: their answer would be judged by its wording. Where no turn of the record names a
    kind, every turn counts, as kind `answer`. Image placeholders leave the text: the pictures come first instead.

    Raises:
        UserError: see `checked_kind`.
    """
    record = item.record
    if not item.images:
        return []
    named = any(turn.kind for turn in record.turns)
    questions = []
    for number, turn in enumerate(record.turns):
        kind = turn.kind if named else UNNAMED_KIND
        text = " ".join(turn.question.replace(IMAGE_PLACEHOLDER, " ").split())
        if kind in ("", "caption") or not text:
            continue
        kind = checked_kind(kind, f"record '{record.id}' of {item.source}")
        questions.append(
            Question(f"{record.id}#{number}", record.id, kind, item.images, text, turn.answer, item.source)
        )
    return questions


def checked_kind(kind: str, place: str) -> str:
    """A question type as it is; `place` says where it was found.

    Raises:
        UserError: it has the name of the total.
    """
    if kind == TOTAL:
        raise UserError(f"{place}: '{TOTAL}' names all questions together and cannot be the type of some; rename it")
    return kind


def balanced(questions: Iterable[Question], limit: int) -> list[Question]:
    """At most `limit` questions, taken answer by answer in turns, so that no answer outweighs another needlessly.

    Answers and the questions of an answer come in the order of a fixed hash: no randomness, and no favour for early
    letters or early records. Returns them sorted by id.
    """
    by_answer: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_answer[normalise(question.answer)].append(question)
    piles = [sorted(by_answer[answer], key=lambda q: _order(q.id)) for answer in sorted(by_answer, key=_order)]
    chosen: list[Question] = []
    for turn in range(max(map(len, piles), default=0)):
        chosen.extend(pile[turn] for pile in piles if turn < len(pile))
        if len(chosen) >= limit:
            break
    return sorted(chosen[:limit], key=lambda q: q.id)


def digest(questions: Iterable[Question]) -> str:
    """sha256 over the questions, the content of their pictures and their answers: equal digests mean the same exam."""
    lines = (json.dumps(asdict(question), sort_keys=True) for question in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
