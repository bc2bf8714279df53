"""Files are written whole or not at all, and JSON lines that were written here can be read here."""

import json

import pytest

from haplovl.errors import UserError
from haplovl.files import read_jsonl, write_whole


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path) -> None:
    rows = [{"answer": f"one{sign}two"} for sign in "\u2028\u2029\x85"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_jsonl(path) == rows


def test_damaged_lines_are_refused(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"answer": "one"}\n{"answer": ')
    with pytest.raises(UserError, match="rows.jsonl does not hold JSON lines"):
        read_jsonl(path)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder is a folder and cannot be written as a file"):
        write_whole(tmp_path / "folder", "text")
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "page.html", "new \ud800")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page.html"]
    assert (tmp_path / "page.html").read_text() == "old"
