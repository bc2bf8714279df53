"""Files of answered records: JSON with `records`, a JSON list, or JSON lines."""

from pathlib import Path
from typing import Any

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.catalogue import find
from haplovl.evaluate.benchmarks.rules import LMMS_EVAL
from haplovl.evaluate.benchmarks.scoring import score_records
from haplovl.records import decode_unique


def score_file(name: str, path: Path, by: str = LMMS_EVAL) -> dict[str, Any]:
    """Scores a file of answered records, as `score_records` does.

    Raises:
        UserError: the file is missing, empty, damaged or says that it belongs to another benchmark, and all that
            `score_records` refuses.
    """
    benchmark = find(name)
    content = read_json_or_lines(path)
    if isinstance(content, dict):
        said = content.get("benchmark", name)
        if said != name:
            raise UserError(f"{path} says that it belongs to the benchmark {said!r}, not to {name!r}")
        if not isinstance(content.get("records"), list):
            raise UserError(f"{path} is an object without a list 'records'")
        content = content["records"]
    if not isinstance(content, list):
        raise UserError(f"{path} holds {type(content).__name__}, not a list of records of {benchmark.title}")
    return score_records(name, content, by, str(path))


def read_json_or_lines(path: Path) -> Any:
    """The value of a JSON file; a list of values where it has one per line.

    Raises:
        UserError: it is missing, empty, not UTF-8 text, neither of both, or has a key twice in one object.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    # Not splitlines(): it would also cut at U+2028 and the like, which JSON allows inside a string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        whole = decode_unique(text)
    except ValueError as error:
        if len(lines) < 2 or not _is_object(lines[0][1]):
            raise UserError(f"{path} is not valid JSON: {error}") from None
        return [_line(path, number, line) for number, line in lines]
    # One line of JSON lines is valid JSON as well.
    alone = isinstance(whole, dict) and "records" not in whole and len(lines) == 1
    return [whole] if alone else whole


def _is_object(line: str) -> bool:
    try:
        return isinstance(decode_unique(line), dict)
    except ValueError:
        return False


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return decode_unique(line)
    except ValueError as error:
        raise UserError(f"line {number} of {path} is not valid JSON: {error}") from None
