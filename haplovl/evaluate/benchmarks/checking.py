"""Whether records are whole and belong to the benchmark; a wrong file must not give a number that looks right."""

from collections.abc import Hashable, Sequence
from typing import Any

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.catalogue import BENCHMARKS
from haplovl.evaluate.benchmarks.rules import Benchmark, Record

SHOWN = 60
"""Characters of a wrong value that an error shows."""


def check_records(benchmark: Benchmark, records: Sequence[Record], where: str = "") -> None:
    """Looks at every record's fields, ids and, where rows belong together, their company.

    `where` names the file in messages; records are counted from 1.

    Raises:
        UserError: there are no records, a field is missing or of the wrong type, an id comes twice, or the records are
            those of another benchmark.
    """
    if not records:
        raise UserError(f"{where or benchmark.name} holds no records")
    seen: dict[Hashable, int] = {}
    for number, record in enumerate(records, 1):
        problem = problem_of(benchmark, record)
        if problem:
            others = [other.title for other in BENCHMARKS.values() if problem_of(other, record) is None]
            hint = f"; it looks like one of {' or '.join(others)}" if others else ""
            raise UserError(f"{name_of(benchmark, record, number, where)}: {problem}{hint}")
        other = better_fit(benchmark, record)
        if other:
            raise UserError(
                f"{name_of(benchmark, record, number, where)} is a record of {other.title} ({other.name}), "
                f"not of {benchmark.title}: it has the field {_telling(benchmark, other)!r}"
            )
        key = benchmark.key(record)
        if key is not None and key in seen:
            raise UserError(
                f"{name_of(benchmark, record, number, where)} has the same id as record {seen[key]}: every question "
                "may be answered once"
            )
        seen[key] = number
    together = benchmark.check_all(records)
    if together:
        raise UserError(f"{where or benchmark.name}: {together}")


def problem_of(benchmark: Benchmark, record: Any) -> str | None:
    """What keeps a record from being one of a benchmark, as the end of a sentence about it; None if nothing does."""
    if not isinstance(record, dict):
        return f"it is {_shown(record)}, not an object with fields"
    for name, check in benchmark.fields.items():
        if name not in record:
            return f"it has no field {name!r}, which {benchmark.title} needs"
        wanted = check(record[name])
        if wanted:
            return f"the field {name!r} is {_shown(record[name])}, not {wanted}"
    wanted = benchmark.check(record)
    return f"it is not {wanted}" if wanted else None


def better_fit(benchmark: Benchmark, record: Record) -> Benchmark | None:
    """Another benchmark whose fields the record has beyond this one's, while nothing speaks for this one in turn.

    A row of POPE also has the question and the answer that RealWorldQA needs; scored so, it would give a number.
    """
    for other in BENCHMARKS.values():
        foreign = set(other.fields) - benchmark.columns
        own = set(benchmark.fields) - other.columns
        if other is not benchmark and foreign and not own and problem_of(other, record) is None:
            return other
    return None


def name_of(benchmark: Benchmark, record: Any, number: int, where: str = "") -> str:
    """How messages call a record: its number, the file, and its id where it has one."""
    named = f"record {number} of {where}" if where else f"record {number}"
    if isinstance(record, dict):
        for field in ("question_id", "index", "Index", "id"):
            if field in record and (field in benchmark.columns):
                return f"{named} ({field} {_shown(record[field])})"
    return named


def _telling(benchmark: Benchmark, other: Benchmark) -> str:
    return next(name for name in other.fields if name not in benchmark.columns)


def _shown(value: Any) -> str:
    text = repr(value) if value is not None else "null"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
