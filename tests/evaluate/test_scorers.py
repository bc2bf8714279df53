"""Exact match, and the arithmetic of accuracy and both baselines on hand-made predictions."""

import pytest

from haplovl.evaluate.questions import Question
from haplovl.evaluate.scorers import Outcome, exact_match, normalise, score


@pytest.mark.parametrize(
    ("text", "normal"),
    [(" Red. ", "red"), ("Top  Left", "top left"), ("top\nleft .", "top left"), ("", ""), (".", ""), ("3.5", "3.5")],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal
    assert normalise(normalise(text)) == normalise(text)


def test_a_longer_answer_that_holds_the_right_one_is_wrong() -> None:
    assert exact_match("Yes.", "yes")
    assert not exact_match("yes, there is", "yes")
    assert not exact_match("", "yes")


def outcome(kind: str, answer: str, prediction: str, blank: str) -> Outcome:
    return Outcome(Question("r#0", "r", kind, (), "?", answer), prediction, blank, -0.1)


def test_accuracy_majority_and_blank_image() -> None:
    outcomes = [
        outcome("colour", "red", "red", "red"),
        outcome("colour", "Red.", "blue", "red"),
        outcome("colour", "blue", "blue", "red"),
        outcome("colour", "green", "green", "red"),
        outcome("presence", "yes", "Yes", "no"),
        outcome("presence", "no", "no", "no"),
    ]
    metrics = score(outcomes)
    assert metrics["types"]["colour"] == {
        "accuracy": 0.75, "accuracy_low": 0.25, "accuracy_high": 1.0, "majority": 0.5, "blank_image": 0.5,
        "margin": 0.25, "n": 4,
    }  # fmt: skip
    presence = metrics["types"]["presence"]
    # Two right answers of two prove little.
    assert presence.pop("accuracy_low") < 0.5 and presence.pop("accuracy_high") == 1.0
    assert presence == {"accuracy": 1.0, "majority": 0.5, "blank_image": 0.5, "margin": 0.5, "n": 2}
    assert 0.3 < metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"] <= 1.0
    assert (metrics["accuracy"], metrics["majority"], metrics["blank_image"]) == (0.8333, 0.5, 0.5)
    assert metrics["n"] == 6
    assert list(metrics["types"]) == ["colour", "presence"]
