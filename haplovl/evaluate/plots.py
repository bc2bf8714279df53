"""The charts of the report as SVG: the same numbers give the same bytes."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, FAINT, RULE = "#1f2a37", "#6b7684", "#d9dee5"
MODEL, MAJORITY, BLANK = "#1f5f8b", "#c3cad3", "#e3a857"
PARTS = {
    "loss_vision": ("vision $L_{v}$", "#2a7f78", (4, 1.5)),
    "loss_feature": ("text feature $L_{feat}$", "#b2632c", (1, 1)),
    "loss_current_token": ("current token $L_{ctp}$", "#7a5aa6", (6, 1.5, 1, 1.5)),
}
MAX_POINTS = 300
"""Longer curves are averaged over equal spans of steps; a page need not carry forty thousand points."""
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": RULE,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "haplovl",
    "svg.fonttype": "path",
}


def accuracy_bars(metrics: dict[str, Any]) -> str:
    """Accuracy of every question type and overall, with its 95 % interval, beside both baselines, as SVG text."""
    groups = {**metrics["types"], "all": metrics}
    names, places = list(groups), np.arange(len(groups), dtype=float)
    places[-1] += 0.3
    series = (
        ("accuracy", "model", MODEL, "", -0.27),
        ("blank_image", "same model, picture blanked", BLANK, "////", 0.0),
        ("majority", "majority answer", MAJORITY, "....", 0.27),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(10.0, 1.4 * len(names)), 3.4), layout="constrained")
        axes = figure.add_subplot()
        for key, label, colour, hatch, shift in series:
            heights = [groups[name][key] for name in names]
            axes.bar(places + shift, heights, 0.25, label=label, color=colour, hatch=hatch, edgecolor="white", zorder=2)
            tops = heights if key != "accuracy" else [groups[name]["accuracy_high"] for name in names]
            for place, height, top in zip(places + shift, heights, tops, strict=True):
                _label(axes, place, height, top)
        lows = [groups[name]["accuracy_low"] for name in names]
        highs = [groups[name]["accuracy_high"] for name in names]
        axes.vlines(places + series[0][-1], lows, highs, color=INK, linewidth=1.1, zorder=3)
        axes.set_xticks(places, names, color=INK)
        axes.set(
            xlim=(-0.6, max(places[-1] + 0.6, 4.6)),
            ylim=(0, 1.08),
            yticks=[0, 0.25, 0.5, 0.75, 1],
            ylabel="exact match",
        )
        axes.tick_params(length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.spines["left"].set_visible(False)
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
        return as_svg(figure)


def loss_curves(log: Sequence[dict[str, Any]]) -> str:
    """The loss of one training stage over its steps, with its parts where the log has them, as SVG text.

    `log` holds one dictionary per step with `step`, `loss` and, for stage 1, the names in PARTS.
    """
    steps = np.array([line["step"] for line in log], dtype=float)
    parts = [name for name in PARTS if name in log[0]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for name in ["loss", *parts]:
            label, colour, dashes = PARTS.get(name, ("loss" if not parts else "sum $L$", MODEL, None))
            x, y = thinned(steps, np.array([line[name] for line in log], dtype=float))
            style = {"color": colour, "linewidth": 1.6 if name == "loss" else 1.3, "label": label}
            axes.plot(x, y, **style, **({"dashes": dashes} if dashes else {}))
        axes.set(xlabel="step", ylim=(min(0.0, *axes.get_ylim()), None))
        axes.margins(x=0.01)
        axes.tick_params(length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        if parts:
            axes.legend(frameon=False)
        return as_svg(figure)


def _label(axes: Any, place: float, height: float, top: float) -> None:
    axes.text(place, top + 0.015, f"{height:.2f}", ha="center", va="bottom", fontsize=8.5, zorder=3)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays as means over at most MAX_POINTS spans of about equal length."""
    if len(x) <= MAX_POINTS:
        return x, y
    spans = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([x[span].mean() for span in spans]), np.array([y[span].mean() for span in spans])


def as_svg(figure: Figure) -> str:
    """The figure as SVG without the date and the program's version."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
