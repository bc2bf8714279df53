"""Damaged and degenerate texts are told from unusual ones."""

import pytest

from haplovl.data.text_checks import degenerate, encoding_damage, question_key


@pytest.mark.parametrize(
    "text",
    ["cafÃ©", "itâ€™s", "ðŸ˜€ nice", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚ Ð¼Ð¸Ñ€", "Â£5", "a\0b", "bell\a", "lost \ufffd here", "\x1b[31mred"],
)
def test_damage_is_seen(text: str) -> None:
    assert encoding_damage(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "café",
        "CAFÉ»",
        "IRMÃO",
        "NOËL «x»",
        "naïve 😀",
        "привет мир",
        "日本語",
        "عربى",
        "5 µm ± 2°",
        "a\tb\r\n\fc",
        "“q” — …",
    ],
)
def test_unusual_text_is_no_damage(text: str) -> None:
    assert encoding_damage(text) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("...", "only punctuation"),
        (" ?! - _", "only punctuation"),
        ("the " * 8, "one word repeated"),
        ("No no NO no no no no no", "one word repeated"),
        ("a" * 33, "one character repeated"),
        ("the " * 7, None),
        ("yes", None),
        ("+", None),
        ("😀", None),
        ("7", None),
        ("是", None),
        ("no no no no no no no no, it is a cat", None),
        ("1" * 32, None),
        ("", None),  # blank: another check's
    ],
)
def test_degenerate_answers(answer: str, reason: str | None) -> None:
    assert degenerate(answer, repeats=8) == reason


def test_questions_are_compared_by_their_words() -> None:
    asked = question_key("<image>\nWhat is the capital city of the country France?", 8)
    assert asked == question_key("what IS the capital-city of the country FRANCE", 8) != None  # noqa: E711
    assert asked != question_key("What is the capital city of the country Spain?", 8)
    assert question_key("What is this?", 8) is None
