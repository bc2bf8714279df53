"""The charts of a comparison as SVG text: the same numbers give the same bytes."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from haplovl.evaluate.compare.comparison import ALL, Comparison
from haplovl.evaluate.plots import FAINT, INK, RULE, STYLE, as_svg, thinned

COLOURS = ("#1f5f8b", "#c4663c", "#2a7f78", "#7a5aa6", "#a8862a", "#9c2f4f", "#4d6b2f", "#5b6470")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDE = 8.0
"""Losses whose largest is more than this many times the smallest are drawn on a logarithmic axis."""


def accuracy_chart(comparison: Comparison) -> str:
    """Accuracy of every group by question type with 95 % intervals."""
    kinds = comparison.kinds
    groups = [(number, group) for number, group in enumerate(comparison.groups) if group.accuracy]
    places = np.arange(len(kinds), dtype=float)
    shifts = np.linspace(-0.3, 0.3, len(groups)) if len(groups) > 2 else [-0.1, 0.1] if len(groups) == 2 else [0.0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for (number, group), shift in zip(groups, shifts, strict=True):
            found = [group.accuracy[kind] for kind in kinds]
            ends = np.array([(one.mean - one.low, one.high - one.mean) for one in found]).T
            axes.errorbar(
                places + shift, [one.mean for one in found], yerr=ends, fmt=_marker(number), markersize=5.5,
                color=_colour(number), elinewidth=1.6, capsize=2.5, label=_label(group.name), zorder=3,
            )  # fmt: skip
        axes.set_xticks(places, kinds, color=INK)
        axes.set(ylabel="exact match", xlim=(-0.6, len(kinds) - 0.4))
        if kinds[-1] == ALL and len(kinds) > 1:
            axes.axvline(len(kinds) - 1.5, color=RULE, linewidth=1)
        return _finish(figure, axes)


def loss_chart(comparison: Comparison, stage: str) -> str:
    """The losses of one stage of all runs over its steps; points are losses on the held-out records."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 3.8), layout="constrained")
        axes, values = figure.add_subplot(), []
        for number, group in enumerate(comparison.groups):
            label = _label(group.name)
            for run in (run for run in group.runs if stage in run.logs):
                rows = run.logs[stage]
                steps = np.array([row["step"] for row in rows], dtype=float)
                x, y = thinned(steps, np.array([row["loss"] for row in rows], dtype=float))
                axes.plot(x, y, color=_colour(number), linewidth=1.4, alpha=0.9, label=label)
                scored = [row for row in rows if row.get("validation_loss") is not None]
                held_out = [row["validation_loss"] for row in scored]
                axes.plot(
                    [row["step"] for row in scored], held_out, linestyle="", marker=_marker(number), markersize=5,
                    color=_colour(number), markeredgecolor="white", markeredgewidth=0.7, zorder=3,
                )  # fmt: skip
                values += [*y[y > 0], *(value for value in held_out if value > 0)]
                label = None  # one entry for all seeds
        if values and max(values) > WIDE * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="step", ylabel="loss")
        axes.margins(x=0.01)
        return _finish(figure, axes)


def _finish(figure: Figure, axes: Any) -> str:
    axes.tick_params(length=0, which="both")
    axes.yaxis.label.set_color(FAINT)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
    return as_svg(figure)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _label(name: str) -> str:
    """A name as it stands: neither mathematics ($) nor hidden from the legend (_ at its beginning)."""
    return name.replace("$", r"\$").removeprefix("_") or "run"
