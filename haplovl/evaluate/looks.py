"""The report's figures of where answers look: a few questions, each in one forward pass over the answer it had."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from haplovl.data.media import Media
from haplovl.evaluate.attention_figure import attention_figure
from haplovl.evaluate.looking import look, special_in
from haplovl.evaluate.scorers import Outcome

RIGHT, WRONG = 3, 3
"""Right answers, and mistakes, that have a figure."""
LAYERS = 6
"""Most layers of each decoder in a figure of the report; `haplovl look` draws all."""


@dataclass(frozen=True)
class DrawnLook:
    """A figure (PNG) of where an answer looked."""

    outcome: Outcome
    png: bytes


def draw_looks(model: Any, processor: Any, outcomes: Sequence[Outcome], media: Media) -> list[DrawnLook]:
    """Figures of some right answers and of the surest mistakes."""
    tokenizer = processor.tokenizer
    usable = [
        outcome
        for outcome in outcomes
        if outcome.question.images
        and outcome.prediction
        and not special_in(tokenizer, outcome.question.question + outcome.prediction)
    ]
    drawn = []
    for outcome in chosen(usable):
        question = outcome.question
        pictures = [media.open(question.source, image.path) for image in question.images]
        found = look(model, processor, question.question, pictures, outcome.prediction)
        drawn.append(DrawnLook(outcome, attention_figure(found, LAYERS, explained=False)))
    return drawn


def chosen(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Right answers, one of a type, by a hash of the question; then the mistakes that the model was surest of."""
    right: dict[str, Outcome] = {}
    by_hash = sorted(outcomes, key=lambda outcome: hashlib.sha256(outcome.question.id.encode()).hexdigest())
    for outcome in by_hash:
        if outcome.correct and len(right) < RIGHT:
            right.setdefault(outcome.question.kind, outcome)
    wrong = [outcome for outcome in outcomes if not outcome.correct]
    wrong.sort(key=lambda outcome: (-outcome.confidence, outcome.question.id))
    return [*right.values(), *wrong[:WRONG]]
