"""Questions are fresh, hold no caption, and are balanced over their answers."""

from collections import Counter
from dataclasses import replace

import pytest

from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.evaluate.questions import Question, balanced, digest, held_out_questions, questions_of
from haplovl.records import Record, Turn

PICTURE = ImageFile("test/a.png", "00" * 32, 32, 32)
SCENE_TURNS = (
    Turn("<image>\nDescribe the picture.", "a red 3 at the top left.", "caption"),
    Turn("What colour is the 3?", "red", "colour"),
    Turn("Is there a 4?", "no", "presence"),
)


def validated(id_: str, turns: tuple[Turn, ...], pictures: int = 1, split: str = "test") -> ValidatedRecord:
    images = (PICTURE,) * pictures
    return ValidatedRecord(Record(id_, tuple(i.path for i in images), turns, split), images, "scenes.jsonl")


def question(number: int, answer: str) -> Question:
    return Question(f"r{number}#0", f"r{number}", "colour", (PICTURE,), "What colour?", answer)


def test_every_turn_is_a_question_of_its_own_without_the_caption() -> None:
    questions = questions_of(validated("r", SCENE_TURNS))
    assert [(q.id, q.kind, q.question, q.answer) for q in questions] == [
        ("r#1", "colour", "What colour is the 3?", "red"),
        ("r#2", "presence", "Is there a 4?", "no"),
    ]
    assert all(q.images == (PICTURE,) and "<image>" not in q.question for q in questions)


def test_records_of_two_sources_with_one_id_are_two_questions(tmp_path) -> None:
    records = [
        replace(validated(id_, SCENE_TURNS[1:2]), source=name) for name in ("shop", "street") for id_ in ("1", name)
    ]
    write_validated(tmp_path, records)
    found = held_out_questions(10, tmp_path)
    assert sorted(q.id for q in found) == ["shop#0", "shop/1#0", "street#0", "street/1#0"]


def test_placeholders_leave_the_text_wherever_they_stand() -> None:
    turns = (Turn("<image> <image>\nWhich has more, <image>?", "first", "comparison"),)
    assert questions_of(validated("r", turns, pictures=3))[0].question == "Which has more, ?"


def test_records_without_kinds_ask_every_turn_as_answer() -> None:
    turns = (Turn("<image>\nWhat is this?", "A cat."), Turn("Where?", "On a mat."), Turn("<image>", "nothing asked"))
    questions = questions_of(validated("llava", turns, pictures=2))
    assert [(q.kind, q.question) for q in questions] == [("answer", "What is this?"), ("answer", "Where?")]


def test_records_without_pictures_ask_nothing() -> None:
    assert questions_of(validated("text", (Turn("Who?", "me", "reading"),), pictures=0)) == []


def test_a_type_called_as_the_total_is_refused_by_name() -> None:
    turns = (Turn("<image>\nWhat colour?", "red", "all"),)
    with pytest.raises(UserError, match=r"^record 'r' of scenes.jsonl: 'all' names all questions together"):
        questions_of(validated("r", turns))


def test_balanced_takes_answers_in_turns() -> None:
    questions = [question(i, answer) for i, answer in enumerate(["red"] * 50 + ["Blue."] * 5 + ["blue"] * 5)]
    chosen = balanced(questions, 20)
    assert Counter(q.answer.lower().strip(".") for q in chosen) == {"red": 10, "blue": 10}
    assert chosen == balanced(reversed(questions), 20)
    assert len(balanced(questions, 30)) == 30
    assert len(balanced(questions, 1000)) == 60
    assert balanced([], 5) == []


def test_held_out_questions_come_from_one_split_with_a_limit_per_kind(tmp_path) -> None:
    rows = [validated(f"test-{i}", SCENE_TURNS) for i in range(6)]
    rows += [validated(f"train-{i}", SCENE_TURNS, split="train") for i in range(6)]
    write_validated(tmp_path, rows)
    questions = held_out_questions(4, folder=tmp_path)
    assert Counter(q.kind for q in questions) == {"colour": 4, "presence": 4}
    assert all(q.record_id.startswith("test-") for q in questions)
    assert questions == held_out_questions(4, folder=tmp_path)


def test_digest_tells_exams_apart() -> None:
    assert digest([question(1, "red")]) == digest([question(1, "red")])
    assert digest([question(1, "red")]) != digest([question(1, "blue")])
