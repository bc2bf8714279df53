"""Exact match, and the two baselines that it must beat: the majority answer and the blanked picture."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haplovl.evaluate.statistics import interval

if TYPE_CHECKING:
    from haplovl.evaluate.questions import Question

DECIMALS = 4


def normalise(text: str) -> str:
    """The form in which answers are compared: one space between words, lower case, no period at the end."""
    return " ".join(text.split()).lower().removesuffix(".").rstrip()


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two answers are equal after normalisation; nothing is searched for inside a longer answer."""
    return normalise(prediction) == normalise(answer)


@dataclass(frozen=True)
class Outcome:
    """One question with what the model said, with the picture and with the picture blanked out.

    `confidence` is the mean log-probability of the prediction's tokens (0 is certain).
    """

    question: "Question"
    prediction: str
    blank_prediction: str
    confidence: float

    @property
    def correct(self) -> bool:
        return exact_match(self.prediction, self.question.answer)

    @property
    def blank_correct(self) -> bool:
        return exact_match(self.blank_prediction, self.question.answer)


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of every question type; types in alphabetical order."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.question.kind].append(outcome)
    return {kind: groups[kind] for kind in sorted(groups)}


def majority_answer(outcomes: Sequence[Outcome]) -> tuple[str, int]:
    """The most frequent right answer of these questions and its count; of equally frequent ones the first by name."""
    counts = Counter(normalise(outcome.question.answer) for outcome in outcomes)
    return min(counts.items(), key=lambda item: (-item[1], item[0]))


def score(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracy, both baselines and the number of questions, overall and per type, all as shares of 0…1.

    `accuracy`, `majority` and `blank_image` at the top are micro averages: every question counts once. `majority` is
    the strongest constant answer: the most frequent one of each type in these very questions. `margin` is the accuracy
    of a type above the better of its two baselines. `accuracy_low` and `accuracy_high` are the ends of the accuracy's
    95 % interval over questions (`haplovl.evaluate.statistics`).
    """
    types, majority_right = {}, 0
    for kind, group in by_kind(outcomes).items():
        majority_right += majority_answer(group)[1]
        types[kind] = _shares(group, majority_answer(group)[1])
    return {**_shares(outcomes, majority_right), "types": types}


def _shares(outcomes: Sequence[Outcome], majority_right: int) -> dict[str, Any]:
    n = len(outcomes)
    found = interval([outcome.correct for outcome in outcomes])
    accuracy = found.mean
    blank, majority = sum(outcome.blank_correct for outcome in outcomes) / n, majority_right / n
    margin = accuracy - max(blank, majority)
    return {
        "accuracy": round(accuracy, DECIMALS),
        "accuracy_low": round(found.low, DECIMALS),
        "accuracy_high": round(found.high, DECIMALS),
        "majority": round(majority, DECIMALS),
        "blank_image": round(blank, DECIMALS),
        "margin": round(margin, DECIMALS),
        "n": n,
    }
