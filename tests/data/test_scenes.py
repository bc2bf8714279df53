"""The embedded data set: disjoint scans, balanced answers, questions that the picture decides."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from haplovl.data.scenes import KEYS, QUESTION_KINDS, SCAN_SHARES, SceneMaker, generate
from haplovl.records import SPLITS, Record
from haplovl.settings import load_params

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """The test split of the repo's params.yaml, with little of the other splits."""
    params = load_params(REPO / "params.yaml")
    source = params.collect.sources[0].model_copy(update={"train_records": 50, "validation_records": 10})
    return list(generate(source, params.seed, tmp_path_factory.mktemp("scenes")))


def answers(records: list[Record]) -> dict[str, Counter]:
    """Answers by question kind in the test split."""
    found = defaultdict(Counter)
    for record in records:
        for turn in record.turns:
            if record.split == "test":
                found[turn.kind][turn.answer] += 1
    return found


def test_splits_use_disjoint_scans() -> None:
    assert set(SCAN_SHARES) == set(SPLITS)
    scans = {s: [scan.tobytes() for own in SceneMaker(s, 0, 32).scans.values() for scan in own] for s in SPLITS}
    assert sum(map(len, scans.values())) == 1797
    for split, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(scans[split]) & set(scans[other])
    assert all(len(own) >= 10 for own in SceneMaker("validation", 0, 32).scans.values())


def test_no_question_kind_is_answered_by_its_majority(records: list[Record]) -> None:
    found = answers(records)
    assert set(QUESTION_KINDS) <= set(found)
    for kind in (*QUESTION_KINDS, "reading"):
        assert sum(found[kind].values()) >= 100, kind
        assert found[kind].most_common(1)[0][1] / sum(found[kind].values()) < 0.60, (kind, found[kind])


def test_yes_and_no_balance(records: list[Record]) -> None:
    counts = answers(records)["presence"]
    assert set(counts) == {"yes", "no"}
    assert abs(counts["yes"] - counts["no"]) <= 1
    assert abs(answers(records)["comparison"]["first"] - answers(records)["comparison"]["second"]) <= 1


def test_records_are_well_formed(records: list[Record]) -> None:
    assert len({record.id for record in records}) == len(records)
    for record in records:
        assert record.placeholders == len(record.images)
        assert len({turn.question for turn in record.turns}) == len(record.turns)
        assert all(turn.answer and turn.kind for turn in record.turns)
    assert {len(record.images) for record in records} == {0, 1, 2}


def test_scene_digits_and_colours_are_unambiguous() -> None:
    maker = SceneMaker("train", 3, 32)
    for _ in range(200):
        scene = maker.scene()
        for name in ("digit", "colour", "cell"):
            assert len({getattr(item, name) for item in scene.items}) == len(scene.items)
        for key in KEYS:
            caption = scene.caption(key)
            assert all(word in caption for item in scene.items for word in item.words.values())
            assert caption.startswith(tuple(item.words[key] for item in scene.items))


def test_no_turn_gives_a_later_answer_away(records: list[Record]) -> None:
    """No question names a digit, colour or place that another one asks for; the caption is last."""
    asked = 0
    for record in records:
        if len(record.images) != 1:
            continue
        *questions, last = record.turns
        assert last.kind == "caption" and all(turn.kind != "caption" for turn in questions)
        told = {word for item in last.answer.rstrip(".").split(", ") for word in item.split()}
        for turn in questions:
            if turn.kind in ("digit", "colour", "position"):
                others = " ".join(other.question for other in questions)
                assert not set(turn.answer.split()) & set(others.replace("?", "").split()), (record.id, turn)
                assert set(turn.answer.split()) <= told
                asked += 1
    assert asked > 500
