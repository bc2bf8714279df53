"""The comparison's tables as Markdown, for docs/results.md and papers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from haplovl.comparison.results import ALL, TERA, Summary
from haplovl.errors import UserError
from haplovl.evaluate.statistics import Interval
from haplovl.files import require, write_whole

MARK = re.compile(r"(<!-- tables: (\w+) -->\n).*?(<!-- end of tables -->)", re.DOTALL)
"""Where a document has a view's tables; what stands between the marks is replaced."""


def fill(path: Path, tables: Mapping[str, str]) -> None:
    """Puts the tables of views into a document, between its marks for them; words around stay.

    Raises:
        UserError: there is no such document, it has a mark for none of the views, or for a view that is not there.
    """
    text = require(path).read_text(encoding="utf-8")
    wanted = [match[2] for match in MARK.finditer(text)]
    if not wanted:
        raise UserError(f"{path} has no lines '<!-- tables: compute -->' and '<!-- end of tables -->' to write between")
    if missing := next((name for name in wanted if name not in tables), None):
        raise UserError(f"{path} wants the tables of '{missing}', of which no run is finished")
    write_whole(path, MARK.sub(lambda match: f"{match[1]}{tables[match[2]]}{match[3]}", text))


def markdown(view: Sequence[Summary], reference: str) -> str:
    """A view's two tables: all questions, with lead and cost; and accuracy by question type."""
    seeds = ", ".join(str(result.run.seed) for result in view[0].results)
    kinds = [kind for kind in view[0].accuracy if kind != ALL]
    overall = _table(
        [
            "recipe",
            "exact match (95 %)",
            f"seeds {seeds}",
            f"lead over `{reference}` (95 %)",
            "p, Holm",
            "steps",
            "TFLOP",
            "with teachers",
            "s a step",
        ],
        [_overall(summary) for summary in view],
    )
    by_kind = _table(
        ["recipe", *kinds],
        [[f"`{own.recipe}`", *(_interval(own.accuracy[kind]) for kind in kinds)] for own in view],
    )
    return f"{overall}\n\n{by_kind}\n"


def _overall(summary: Summary) -> list[str]:
    own, lead, seconds = summary.accuracy[ALL], summary.lead.get(ALL), summary.mean_measured("step_seconds")
    flops, teachers = summary.mean("total_flops"), summary.teachers_flops
    return [
        f"`{summary.recipe}`",
        f"{own.mean:.3f} ({own.low:.2f} to {own.high:.2f})",
        ", ".join(f"{result.right(ALL).mean():.2f}" for result in summary.results),
        f"{100 * lead.mean:+.0f} points ({100 * lead.low:+.0f} to {100 * lead.high:+.0f})" if lead else "",
        p_value(summary.p_adjusted) if lead else "",
        " + ".join(str(count) for count in summary.results[0].steps.values()),
        f"{flops / TERA:.1f}",
        "" if teachers is None else f"{(flops + teachers) / TERA:.1f}",
        "" if seconds is None else f"{seconds:.2f}",
    ]


def p_value(p: float) -> str:
    """A p-value in words that fit a table."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _interval(own: Interval) -> str:
    return f"{own.mean:.2f} ({own.low:.2f} to {own.high:.2f})"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
