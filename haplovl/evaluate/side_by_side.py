"""Two models' answers to the same questions, side by side: counts per type, and a page with the differences first."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from rich.text import Text

from haplovl.evaluate.console import wide_console
from haplovl.evaluate.exams import Exam
from haplovl.evaluate.pages import embedded_picture, page_templates
from haplovl.evaluate.predictions import Side, require_same_questions
from haplovl.evaluate.questions import TOTAL, Question
from haplovl.evaluate.scorers import exact_match, normalise
from haplovl.files import REPORTS, whole_folder, write_whole
from haplovl.pictures import ImageError
from haplovl.records import write_jsonl

FOLDER = REPORTS / "side_by_side"
GROUPS = {
    "only_a": "A is right, B is wrong",
    "only_b": "B is right, A is wrong",
    "both_wrong_differently": "Both are wrong, and say different things",
    "different": "Different answers, where no right one is known",
    "both_wrong_alike": "Both are wrong, and say the same",
    "both_right": "Both are right",
    "alike": "The same answer, where no right one is known",
}
"""What a pair of answers can be, in the order of the page: differences first."""
DIFFERENCES_SHOWN, AGREEMENTS_SHOWN = 60, 12
"""Most cards of a group on the page; answers.jsonl has them all."""
_DIFFERENCES = ("only_a", "only_b", "both_wrong_differently", "different")


@dataclass(frozen=True)
class Pair:
    """Both answers to one question; confidences are mean log-probabilities of their tokens (0 is certain).

    A question without a right answer (`""`) cannot be judged.
    """

    question: Question
    predictions: tuple[str, str]
    confidences: tuple[float, float]

    @property
    def judged(self) -> bool:
        return bool(self.question.answer)

    @property
    def right(self) -> tuple[bool, bool]:
        """Which of both answers is right; neither where that is not known."""
        first, second = (self.judged and exact_match(said, self.question.answer) for said in self.predictions)
        return first, second

    @property
    def group(self) -> str:
        """One of GROUPS."""
        first, second = map(normalise, self.predictions)
        if not self.judged:
            return "alike" if first == second else "different"
        if self.right == (False, False):
            return "both_wrong_alike" if first == second else "both_wrong_differently"
        return {(True, True): "both_right", (True, False): "only_a", (False, True): "only_b"}[self.right]

    @property
    def surest_mistake(self) -> float:
        """The confidence of the surest wrong answer; where nothing is judged, of the surest answer."""
        wrong = [value for value, right in zip(self.confidences, self.right, strict=True) if not right]
        return max(wrong, default=-math.inf)


def show_side_by_side(exam: Exam, root: Path = Path(".")) -> None:
    """Prints the counts and writes reports/side_by_side/ below `root`: the page, and every pair of answers as JSONL.

    Raises:
        UserError: both sides did not answer the same questions about the same pictures.
    """
    pairs = pair_up(exam.first, exam.second)
    with whole_folder(root / FOLDER) as folder:
        write_jsonl(folder / "answers.jsonl", map(_row, in_order(pairs)))
        write_page(folder / "index.html", (exam.first.name, exam.second.name), pairs, exam.open_picture)
    console = wide_console()
    console.print(counts_table(pairs))
    console.print(f"A is {exam.first.name}, B is {exam.second.name}", markup=False)
    console.print(f"The page is {root / FOLDER / 'index.html'}", markup=False)


def pair_up(first: Side, second: Side) -> list[Pair]:
    """The answers of both sides to every question, in the order of the first.

    Raises:
        UserError: the questions are not the same, or not about the same pictures; says what differs.
    """
    require_same_questions(first, second)
    return [
        Pair(said.question, (said.prediction, other.prediction), (said.confidence, other.confidence))
        for said, other in ((said, second.answers[id_]) for id_, said in first.answers.items())
    ]


def in_order(pairs: Sequence[Pair]) -> list[Pair]:
    """Differences first, group by group as in GROUPS; in a group of mistakes the surest first, else by a fixed hash."""
    groups = list(GROUPS)

    def place(pair: Pair) -> tuple[Any, ...]:
        sure = -pair.surest_mistake if pair.group in _DIFFERENCES else 0.0
        return groups.index(pair.group), sure, hashlib.sha256(pair.question.id.encode()).hexdigest()

    return sorted(pairs, key=place)


def counts(pairs: Sequence[Pair]) -> dict[str, Counter]:
    """How many pairs of every question type are in which group; types in alphabetical order, then `all`."""
    kinds = sorted({pair.question.kind for pair in pairs})
    return {
        **{kind: Counter(pair.group for pair in pairs if pair.question.kind == kind) for kind in kinds},
        TOTAL: Counter(pair.group for pair in pairs),
    }


def counted(pairs: Sequence[Pair]) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """The counts as column names and rows of (type, numbers); columns that no question can fill are left out."""
    columns = {
        "both right": ["both_right"],
        "only A": ["only_a"],
        "only B": ["only_b"],
        "both wrong": ["both_wrong_differently", "both_wrong_alike"],
        "different": ["different"],
        "the same": ["alike"],
    }
    judged = {pair.judged for pair in pairs}
    names = [name for i, name in enumerate(columns) if (i < 4) in judged]
    rows = []
    for kind, found in counts(pairs).items():
        rows.append((kind, [*(sum(found[group] for group in columns[name]) for name in names), found.total()]))
    return [*names, "questions"], rows


def counts_table(pairs: Sequence[Pair]) -> Table:
    """The counts for the terminal."""
    names, rows = counted(pairs)
    table = Table(title="The same questions, two models")
    table.add_column("type")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for kind, numbers in rows:
        # Types are whatever a source calls them, and no markup.
        table.add_row(Text(kind), *map(str, numbers), style="bold" if kind == TOTAL else None)
    return table


def write_page(
    target: Path, names: tuple[str, str], pairs: Sequence[Pair], open_picture: Callable[[Question, int], Image.Image]
) -> None:
    """Writes the page: differences first. The same answers and pictures give the same bytes."""
    columns, rows = counted(pairs)
    ordered = in_order(pairs)
    groups = []
    for group, title in GROUPS.items():
        own = [pair for pair in ordered if pair.group == group]
        limit = DIFFERENCES_SHOWN if group in _DIFFERENCES else AGREEMENTS_SHOWN
        if own:
            cards = [_card(pair, open_picture) for pair in own[:limit]]
            groups.append({"title": title, "count": len(own), "cards": cards, "differ": group in _DIFFERENCES})
    judged = [pair for pair in pairs if pair.judged]
    page = page_templates().get_template("side_by_side.html.j2")
    write_whole(
        target,
        page.render(
            names=names,
            columns=columns,
            rows=rows,
            groups=groups,
            questions=len(pairs),
            differences=sum(pair.group in _DIFFERENCES for pair in pairs),
            found=counts(pairs)[TOTAL],
            judged=len(judged),
            accuracies=[sum(pair.right[i] for pair in judged) / max(len(judged), 1) for i in (0, 1)],
        ),
    )


def _card(pair: Pair, open_picture: Callable[[Question, int], Image.Image]) -> dict[str, Any]:
    question = pair.question
    return {
        "id": question.id,
        "kind": question.kind,
        "question": question.question,
        "answer": question.answer,
        "judged": pair.judged,
        "sides": [
            {"name": name, "said": said, "right": right, "certainty": math.exp(min(0.0, confidence))}
            for name, said, right, confidence in zip("AB", pair.predictions, pair.right, pair.confidences, strict=True)
        ],
        "pictures": [_picture(question, number, open_picture) for number in range(len(question.images))],
    }


def _picture(
    question: Question, number: int, open_picture: Callable[[Question, int], Image.Image]
) -> dict[str, Any] | None:
    try:
        return embedded_picture(open_picture(question, number))
    except ImageError:  # predictions travel further than the pictures that they are about
        return None


def _row(pair: Pair) -> dict[str, Any]:
    """One line of answers.jsonl."""
    question = pair.question
    sides = {
        name: {"prediction": said, "correct": right if pair.judged else None, "confidence": confidence}
        for name, said, right, confidence in zip("ab", pair.predictions, pair.right, pair.confidences, strict=True)
    }
    return {
        "group": pair.group,
        "id": question.id,
        "kind": question.kind,
        "question": question.question,
        "answer": question.answer or None,
        "images": [image.path for image in question.images],
        **sides,
    }
