"""Scores of answered records, their aggregate, and how other references would have counted."""

from collections.abc import Callable, Sequence
from typing import Any

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.catalogue import find, reference
from haplovl.evaluate.benchmarks.checking import check_records, name_of
from haplovl.evaluate.benchmarks.rules import LMMS_EVAL, Benchmark, Judgement, Record

ROUNDING = 1e-9
"""Scores that differ by less are the same: references sum in different orders."""


def score_records(name: str, records: Sequence[Any], by: str = LMMS_EVAL, where: str = "") -> dict[str, Any]:
    """Scores answered records of a benchmark by one of its references.

    Every record is an object with the benchmark's fields and `prediction`, or one with `record` and `prediction`.
    `where` names their file in messages.

    Returns `benchmark`, `reference` and its `source`, `n` and how many records the `published` data set has, `headline`
    (the figure that is usually quoted), `aggregate`, the number of `unparsed` answers, `scores` (0…1, or None where the
    reference defines none) and `parsed` (what was read in every answer) in the order of the records, and `beside`: the
    headline by the other references, and with every record scored by the strictest (`strict`) or the loosest
    (`lenient`) of all.

    Raises:
        UserError: no such benchmark or reference, no records, a prediction is missing or no string, and all that
            `check_records` refuses.
    """
    benchmark, chosen = find(name), reference(find(name), by)
    rows, answers = split(benchmark, records, where)
    judged = {other: judge(benchmark, rows, answers, other) for other in benchmark.references}
    judgements = judged[by]
    aggregate = benchmark.aggregate(rows, judgements)
    return {
        "benchmark": benchmark.name,
        "reference": by,
        "source": chosen.source,
        "n": len(rows),
        "published": benchmark.published,
        "headline": {"metric": ".".join(benchmark.headline), "value": _inside(aggregate, benchmark.headline)},
        "aggregate": aggregate,
        "unparsed": sum(judgement.parsed is None for judgement in judgements if judgement.score is not None),
        "beside": _beside(benchmark, rows, judged, by),
        "scores": [judgement.score for judgement in judgements],
        "parsed": [judgement.parsed for judgement in judgements],
    }


def judge(benchmark: Benchmark, rows: Sequence[Record], answers: Sequence[str], by: str) -> list[Judgement]:
    """The judgements of one reference, in the order of the rows."""
    rule = benchmark.references[by].rule
    return benchmark.settle(rows, [rule(row, answer) for row, answer in zip(rows, answers, strict=True)])


def split(benchmark: Benchmark, records: Sequence[Any], where: str = "") -> tuple[list[Record], list[str]]:
    """Records and predictions apart.

    Raises:
        UserError: as `score_records`.
    """
    rows, answers, names = [], [], []
    for number, item in enumerate(records, 1):
        nested = isinstance(item, dict) and "record" in item
        row = item["record"] if nested else item
        name = name_of(benchmark, row, number, where)
        names.append(name)
        if not isinstance(row, dict):
            raise UserError(f"{name} is no object with the fields of {benchmark.title}")
        if "prediction" not in item:
            raise UserError(f"{name} has no field 'prediction': the model's answer is missing")
        if not isinstance(item["prediction"], str):
            kind = "null" if item["prediction"] is None else type(item["prediction"]).__name__
            raise UserError(f"{name}: the field 'prediction' is {kind}, not a string")
        rows.append(row if nested else {key: value for key, value in item.items() if key != "prediction"})
        answers.append(item["prediction"])
    check_records(benchmark, rows, names, where)
    return rows, answers


def _beside(
    benchmark: Benchmark, rows: Sequence[Record], judged: dict[str, list[Judgement]], by: str
) -> dict[str, Any]:
    """The headline by the other references, and on how many records each is stricter or looser than the chosen one."""

    def headline(judgements: Sequence[Judgement]) -> Any:
        return _inside(benchmark.aggregate(rows, judgements), benchmark.headline)

    beside: dict[str, Any] = {}
    for name, judgements in judged.items():
        pairs = [(a.score, b.score) for a, b in zip(judged[by], judgements, strict=True)]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        if name != by:
            beside[name] = {
                "value": headline(judgements),
                "n": sum(judgement.score is not None for judgement in judgements),
                "stricter": sum(b < a - ROUNDING for a, b in pairs),
                "looser": sum(b > a + ROUNDING for a, b in pairs),
            }
    beside["strict"] = {"value": headline([_extreme(row, min) for row in zip(*judged.values(), strict=True)])}
    beside["lenient"] = {"value": headline([_extreme(row, max) for row in zip(*judged.values(), strict=True)])}
    return beside


def _extreme(row: Sequence[Judgement], least_or_most: Callable[..., Judgement]) -> Judgement:
    """The strictest or the loosest of the references that define a score for one record."""
    scored = [judgement for judgement in row if judgement.score is not None]
    return least_or_most(scored, key=lambda judgement: judgement.score) if scored else row[0]


def _inside(aggregate: dict[str, Any], path: Sequence[str]) -> Any:
    for name in path:
        aggregate = aggregate[name]
    return aggregate
