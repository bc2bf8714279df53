"""Records: reading and writing LLaVA-style JSON and JSONL, damaged files included."""

import json
from pathlib import Path

import pytest

from haplovl.records import ConversationError, Record, RecordError, Turn, parse_record, read_items, write_jsonl

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]


def test_round_trip() -> None:
    turns = (Turn("<image> <image>\nWhich?", "first", "comparison"), Turn("Why?", "Ä €"))
    for record in (
        Record("a", ("x.png", "y.png"), turns, "test", "Be brief."),
        Record("b", ("x.png",), (Turn("<image>", "A cat.", "caption"),)),
        Record("c", (), (Turn("q", "a"),), "train"),
    ):
        assert parse_record(json.loads(json.dumps(record.to_json()))) == record


def test_kind_and_placeholders() -> None:
    caption = Record("a", ("x",), (Turn("<image>", "A cat.", "caption"),))
    assert (caption.kind, caption.placeholders) == ("caption", 1)
    assert Record("a", ("x",), (*caption.turns, Turn("q", "a"))).kind == "instruction"
    assert Record("a", (), (Turn("q", "a"),)).kind == "text"


def test_llava_spellings_are_understood() -> None:
    assert parse_record({"id": 7, "image": None, "conversations": TALK}).id == "7"
    assert parse_record({"id": "a", "image": ["x", "y"], "conversations": TALK}).images == ("x", "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "'id' must be a non-empty string"),
        ({"id": True}, "'id' must be a non-empty string"),
        ({"id": None}, "'id' must be a non-empty string"),
        ({"image": 3}, "'image' must be a path"),
        ({"image": [""]}, "'image' must be a path"),
        ({"split": "dev"}, "'split' must be one of"),
        ({"split": ["train"]}, "'split' must be one of"),
        ({"conversations": "hello"}, "'conversations' must be a list"),
        ({"conversations": [{"from": "human"}]}, "string 'value'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
        ({"id": "\ud800"}, "damaged characters"),
    ],
)
def test_bad_fields(change: dict, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse_record({"id": "a", "image": "x.png", "conversations": TALK, **change})


@pytest.mark.parametrize("talk", [[], TALK[:1], TALK[::-1], TALK + TALK[:1], [{"from": "system", "value": "s"}]])
def test_bad_conversations(talk: list) -> None:
    with pytest.raises(ConversationError):
        parse_record({"id": "a", "conversations": talk})


def test_a_damaged_line_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\n\n{"id": 2\n{"id": "\xff"}\n{"id": 4}\n')
    items = list(read_items(path))
    assert [(item.position, item.data, bool(item.error)) for item in items] == [
        (1, {"id": 1}, False),
        (3, None, True),
        (4, None, True),
        (5, {"id": 4}, False),
    ]
    assert items[1].raw == '{"id": 2\n'


@pytest.mark.parametrize(
    ("text", "good", "error"),
    [
        ('[{"id": 1}, {"id": 2}]', 2, ""),
        ("[]", 0, ""),
        ('\ufeff [{"id": 1}]', 1, ""),
        ('[{"id": 1}, {"id": 2', 1, "not valid JSON from here to the end of the file (8 characters)"),
        ('[{"id": 1}', 1, "ends without ']'"),
        ('[{"id": 1} {"id": 2}]', 2, ""),
        ('[{"id": 1} 7', 1, "lacks a ','"),
        ('[{"id": 1},', 1, "not valid JSON from here to the end of the file (0 characters)"),
        ('{"id": 1}', 0, "must hold a JSON list"),
        ("", 0, "must hold a JSON list"),
        ("[" * 100_000, 0, "not valid JSON from here"),
    ],
)
def test_a_damaged_list_costs_what_follows(tmp_path: Path, text: str, good: int, error: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    items = list(read_items(path))
    assert [item.data["id"] for item in items if not item.error] == list(range(1, good + 1))
    assert [item.position for item in items] == list(range(len(items)))
    assert [item.error for item in items if item.error] == ([] if not error else [items[-1].error])
    assert error in items[-1].error if error else True


def test_damaged_bytes_in_a_list_cost_their_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    records = [{"id": name, "conversations": TALK} for name in ("a", "b~", "c")]
    path.write_bytes(json.dumps(records).encode().replace(b"~", b"\xff"))
    ids = []
    for item in read_items(path):
        try:
            ids.append(parse_record(item.data).id)
        except RecordError as error:
            ids.append(str(error))
    assert ids == ["a", "the text holds damaged characters (no valid Unicode)", "c"]


def test_write_jsonl_takes_what_cannot_be_encoded(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"x": "\ud800"}, {"x": "ä"}])
    assert [item.data["x"] for item in read_items(tmp_path / "a.jsonl")] == ["\ud800", "ä"]
    assert "ä" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")
