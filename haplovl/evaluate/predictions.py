"""Predictions that exist already: predictions.jsonl files, and whether two of them answer the same questions."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haplovl.data.validated import ImageFile
from haplovl.errors import UserError
from haplovl.evaluate.questions import Question, checked_kind
from haplovl.evaluate.scorers import exact_match
from haplovl.records import read_items

MOST = sys.float_info.max


@dataclass(frozen=True)
class Said:
    """A prediction and the mean log-probability of its tokens."""

    question: Question
    prediction: str
    confidence: float

    @property
    def correct(self) -> bool:
        """Whether it is the right answer."""
        return exact_match(self.prediction, self.question.answer)


@dataclass(frozen=True)
class Side:
    """What one model answered, by the ids of the questions."""

    name: str
    answers: dict[str, Said]


def read_predictions(path: Path) -> Side:
    """The answers in a predictions.jsonl file of the evaluation.

    Raises:
        UserError: the file is damaged, empty, lacks a column, or holds a question twice; names the line.
    """
    rows = {}
    for item in read_items(path):
        if item.error:
            raise UserError(f"{path}, line {item.position}: {item.error}")
        rows[item.position] = item.data
    return predictions_of(rows, str(path))


def predictions_of(rows: Mapping[int, Any], name: str) -> Side:
    """The answers in rows as the evaluation writes them, by the number of their line; `name` says where they are from.

    Raises:
        UserError: there are none, a row lacks a column, or a question occurs twice; names the line.
    """
    answers: dict[str, Said] = {}
    for line, row in rows.items():
        place = f"{name}, line {line}"
        said = _said(row, place)
        if said.question.id in answers:
            raise UserError(f"{place}: the question '{said.question.id}' occurs twice")
        answers[said.question.id] = said
    if not answers:
        raise UserError(f"{name} holds no predictions")
    return Side(name, answers)


def require_same_questions(first: Side, second: Side) -> None:
    """Refuses to compare answers to different questions.

    Raises:
        UserError: names how many questions differ, and one of them with what differs in it.
    """
    only = [sorted(set(a.answers) - set(b.answers)) for a, b in ((first, second), (second, first))]
    if any(only):
        told = " and ".join(
            f"{len(ids)} only {side.name} (such as '{ids[0]}')"
            for side, ids in zip((first, second), only, strict=True)
            if ids
        )
        raise UserError(f"{first.name} and {second.name} answer different questions: {told} answered")
    different = [(id_, _difference(said.question, second.answers[id_].question)) for id_, said in first.answers.items()]
    found = [(id_, what) for id_, what in different if what]
    if found:
        raise UserError(
            f"{first.name} and {second.name} were asked on different test data: {len(found)} of {len(different)} "
            f"questions differ, such as '{found[0][0]}' in {found[0][1]}"
        )


def as_object(data: Any, place: str) -> dict[str, Any]:
    """An entry of a file that must be a JSON object; `place` names it.

    Raises:
        UserError: it is none.
    """
    if not isinstance(data, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(data).__name__}")
    return data


def text_of(row: dict[str, Any], name: str, place: str, default: str | None = None) -> str:
    """A text of an entry; `default` where there is none.

    Raises:
        UserError: it is missing without a default, or no text.
    """
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise UserError(f"{place}: '{name}' is missing" if value is None else f"{place}: '{name}' must be a string")
    return value


def _said(data: Any, place: str) -> Said:
    row = as_object(data, place)
    for name in ("images", "image_sha256"):
        if name not in row:
            raise UserError(f"{place}: '{name}' is missing; 'haplovl evaluate' writes it")
        if not isinstance(row[name], list) or not all(isinstance(entry, str) for entry in row[name]):
            raise UserError(f"{place}: '{name}' must be a list of strings")
    if len(row["images"]) != len(row["image_sha256"]):
        raise UserError(f"{place}: there are {len(row['images'])} images, but {len(row['image_sha256'])} image_sha256")
    confidence = row.get("confidence")
    good = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not good or not -MOST <= confidence <= MOST:  # nor NaN, which is not within anything
        raise UserError(f"{place}: 'confidence' must be a number, the mean log-probability of the answer's tokens")
    images = tuple(ImageFile(path, sha, 0, 0) for path, sha in zip(row["images"], row["image_sha256"], strict=True))
    id_, kind, question, answer, prediction, source = (
        text_of(row, name, place) for name in ("id", "kind", "question", "answer", "prediction", "source")
    )
    kind = checked_kind(kind, place)
    return Said(Question(id_, id_, kind, images, question, answer, source), prediction, float(confidence))


def _difference(ours: Question, theirs: Question) -> str:
    """The first thing in which two questions of one id differ; nothing where they are the same."""
    for name, what in (("question", "its words"), ("answer", "its right answer"), ("kind", "its type")):
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b:
            return f"{what} ('{a:.60}' and '{b:.60}')"
    if [image.sha256 for image in ours.images] != [image.sha256 for image in theirs.images]:
        return "the content of its pictures"
    return ""
