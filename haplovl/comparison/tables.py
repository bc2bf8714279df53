"""The comparison's tables as Markdown, for docs/results.md and papers."""

from collections.abc import Iterable, Sequence

from haplovl.comparison.results import ALL, TERA, Summary
from haplovl.evaluate.statistics import Interval


def markdown(title: str, view: Sequence[Summary], reference: str) -> str:
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
    return f"## {title}\n\n{overall}\n\n{by_kind}\n"


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
