"""The charts of the comparison as SVG text."""

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from haplovl.comparison.results import ALL, TERA, Summary
from haplovl.evaluate.plots import FAINT, INK, RULE, STYLE, as_svg

MOST_SERIES = 8
"""Recipes that one chart can tell apart."""
COLOURS = ("#1f5f8b", "#c4663c", "#2a7f78", "#7a5aa6", "#a8862a", "#9c2f4f", "#4d6b2f", "#5b6470")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def panels(summaries: Sequence[Summary]) -> list[list[Summary]]:
    """The recipes in groups that a chart can tell apart, the first one in each."""
    first, *others = summaries
    starts = range(0, len(others), MOST_SERIES - 1) if others else [0]
    return [[first, *others[start : start + MOST_SERIES - 1]] for start in starts]


def looks(recipes: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each recipe, so that it looks the same in every chart."""
    own = enumerate(dict.fromkeys(recipes))
    return {recipe: (COLOURS[number % MOST_SERIES], MARKERS[number % MOST_SERIES]) for number, recipe in own}


def accuracy_chart(summaries: Sequence[Summary], look: dict[str, tuple[str, str]]) -> str:
    """Accuracy of every recipe by question type with 95 % intervals; a dot for every seed where there are several."""
    kinds = [*(kind for kind in summaries[0].accuracy if kind != ALL), ALL]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(10.0, 1.6 * len(kinds)), 4.2), layout="constrained")
        axes = figure.add_subplot()
        shifts = np.linspace(-0.34, 0.34, len(summaries)) if len(summaries) > 1 else [0.0]
        for summary, shift in zip(summaries, shifts, strict=True):
            colour, marker = look[summary.recipe]
            means = [summary.accuracy[kind].mean for kind in kinds]
            ends = [(summary.accuracy[kind].low, summary.accuracy[kind].high) for kind in kinds]
            spread = np.array([(m - low, high - m) for m, (low, high) in zip(means, ends, strict=True)]).T
            axes.errorbar(
                np.arange(len(kinds)) + shift, means, yerr=spread, fmt=marker, markersize=5.5, color=colour,
                elinewidth=1.5, capsize=2.5, label=summary.recipe, zorder=3,
            )  # fmt: skip
            for result in summary.results if len(summary.results) > 1 else ():
                seed = [result.right(kind).mean() for kind in kinds]
                axes.scatter(np.arange(len(kinds)) + shift, seed, s=15, color=colour, alpha=0.5, linewidths=0, zorder=2)
        axes.set_xticks(np.arange(len(kinds)), kinds, color=INK)
        axes.set(ylabel="exact match", xlim=(-0.6, len(kinds) - 0.4))
        axes.axvline(len(kinds) - 1.5, color=RULE, linewidth=1)
        axes.tick_params(length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
        return as_svg(figure)


def learning_curves(summaries: Sequence[Summary], look: dict[str, tuple[str, str]], with_teachers: bool = False) -> str:
    """Held-out loss of stage 2 against the operations spent: mean over seeds, and the range between them.

    Stage 1 is spent before the first point. `with_teachers` adds what the training of the recipe's teachers took,
    which must be known.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for summary in summaries:
            curves = [np.array(result.curve) for result in summary.results if result.curve]
            if not curves:
                continue
            points = min(map(len, curves))
            spent = np.mean([curve[:points, 0] for curve in curves], axis=0)
            spent = (spent + ((summary.teachers_flops or 0.0) if with_teachers else 0.0)) / TERA
            losses = np.stack([curve[:points, 1] for curve in curves])
            colour, marker = look[summary.recipe]
            axes.fill_between(spent, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                spent, losses.mean(axis=0), color=colour, marker=marker, markersize=4, linewidth=1.6,
                label=summary.recipe,
            )  # fmt: skip
        what = "teachers' training, both stages" if with_teachers else "both stages"
        axes.set(xlabel=f"operations spent, TFLOP ({what})", ylabel="held-out loss, nats per token")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.tick_params(length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.legend(frameon=False)
        return as_svg(figure)


def lead_chart(summaries: Sequence[Summary], reference: str) -> str:
    """Lead of every recipe over the reference in points, over all questions, with 95 % intervals."""
    others = [summary for summary in summaries if summary.lead]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.42 * len(others) + 1.1), layout="constrained")
        axes = figure.add_subplot()
        for place, summary in enumerate(reversed(others)):
            lead = summary.lead[ALL]
            spread = [[100 * (lead.mean - lead.low)], [100 * (lead.high - lead.mean)]]
            colour = COLOURS[0] if summary.p_adjusted < 0.05 else FAINT
            axes.errorbar([100 * lead.mean], [place], xerr=spread, fmt="o", color=colour, capsize=3, elinewidth=1.6)
        axes.set_yticks(range(len(others)), [summary.recipe for summary in reversed(others)], color=INK)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set(
            xlabel=f"points of exact match above {reference} (95 %; grey: p of 0.05 or more, Holm)",
            ylim=(-0.6, len(others) - 0.4),
        )
        axes.tick_params(length=0)
        axes.grid(axis="x", color=RULE, linewidth=0.7)
        axes.spines["left"].set_visible(False)
        return as_svg(figure)
