"""Whether records are whole and belong to the benchmark; a wrong file must not give a number that looks right."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.catalogue import BENCHMARKS
from haplovl.evaluate.benchmarks.rules import Benchmark, Record

SHOWN = 60
"""Characters of a wrong value that an error shows."""


def check_records(benchmark: Benchmark, records: Sequence[Record], names: Sequence[str], where: str = "") -> None:
    """Looks at every record's fields, ids and, where rows belong together, their company.

    `names` is how messages call the records, and `where` their file or folder.

    Raises:
        UserError: there are no records or more than the benchmark has, a field is missing or of the wrong type, an id
            comes twice, or the records are those of another benchmark.
    """
    if not records:
        raise UserError(f"{where or benchmark.name} holds no records")
    if len(records) > benchmark.published:
        raise UserError(
            f"{where or 'there'} holds {len(records):,} records, but {benchmark.title} has {benchmark.published:,} "
            "questions: some must be there twice, or be others"
        )
    seen: dict[Hashable, str] = {}
    for name, record in zip(names, records, strict=True):
        problem = problem_of(benchmark, record)
        if problem:
            other = best_fit(record)
            hint = f"; it looks like one of {other.title} ({other.name})" if other else ""
            raise UserError(f"{name}: {problem}{hint}")
        other = better_fit(benchmark, record)
        if other:
            telling = next(field for field in other.fields if field not in benchmark.columns)
            raise UserError(f"{name} is one of {other.title} ({other.name}), not of {benchmark.title}: see {telling!r}")
        key = benchmark.key(record)
        if key is not None and key in seen:
            raise UserError(f"{name} has the same id as {seen[key]}, but every question counts once")
        seen[key] = name
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
    for name, check in benchmark.optional.items():
        wanted = check(record[name]) if name in record else None
        if wanted:
            return f"the field {name!r} is {_shown(record[name])}, not {wanted}"
    wanted = benchmark.check(record)
    return f"it is not {wanted}" if wanted else None


def best_fit(record: Any, among: Iterable[Benchmark] = BENCHMARKS.values()) -> Benchmark | None:
    """The benchmark that a record could be one of; of several, the one that asks for the most fields."""
    fits = [benchmark for benchmark in among if problem_of(benchmark, record) is None]
    # Any question with an answer has the fields that RealWorldQA asks for: only its own words tell.
    fits = [benchmark for benchmark in fits if len(benchmark.fields) > 2 or benchmark.check_all([record]) is None]
    return max(fits, key=lambda benchmark: len(benchmark.fields), default=None)


def better_fit(benchmark: Benchmark, record: Record) -> Benchmark | None:
    """Another benchmark whose fields the record has beyond this one's, while nothing speaks for this one in turn.

    A row of POPE also has the question and the answer that RealWorldQA needs; scored so, it would give a number.
    """
    others = (other for other in BENCHMARKS.values() if other is not benchmark)
    return best_fit(
        record,
        (
            other
            for other in others
            if set(other.fields) - benchmark.columns and not set(benchmark.fields) - other.columns
        ),
    )


def name_of(benchmark: Benchmark, record: Any, number: int, where: str = "") -> str:
    """How messages call a record: its number from 1, the file, and its id where it has one."""
    named = f"record {number} of {where}" if where else f"record {number}"
    if isinstance(record, dict):
        for field in ("question_id", "index", "Index", "id"):
            if field in record and (field in benchmark.columns):
                return f"{named} ({field} {_shown(record[field])})"
    return named


def _shown(value: Any) -> str:
    text = repr(value) if value is not None else "null"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
