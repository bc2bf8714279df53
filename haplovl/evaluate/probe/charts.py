"""The charts of the probe's page as SVG."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from haplovl.evaluate.plots import BLANK, FAINT, INK, MAJORITY, MODEL, RULE, STYLE, as_svg

COLOURS = (MODEL, BLANK, "#2a7f78", "#7a5aa6")
SERIES = (
    ("teacher", "the teacher itself", "#2a7f78", "", -0.32),
    ("fitted", "distilled, by a fitted map", MODEL, "", -0.16),
    ("vision_head", "by the vision head", "#7a5aa6", "\\\\\\\\", 0.0),
    ("direct", "last layer as it is", BLANK, "////", 0.16),
    ("chance", "chance", MAJORITY, "....", 0.32),
)


def layer_curves(alone: dict[str, Any]) -> str:
    """Cosine and CKA of every pre-decoder layer with the teacher's of the same number, by resolution, as SVG text."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, own), colour in zip(alone.items(), COLOURS, strict=False):
            numbers = [int(number) for number in own["layers"]]
            style = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.5}
            label = f"{name} px" + (" (trained)" if own["trained"] else "")
            for axes, key in ((left, "cosine"), (right, "cka")):
                values = [layer.get(key) for layer in own["layers"].values()]
                if None not in values:
                    axes.plot(numbers, values, label=label, **style)
            constants = [layer.get("constant") for layer in own["layers"].values()]
            if own["trained"] and None not in constants:
                left.plot(numbers, constants, color=FAINT, linewidth=1.1, dashes=(4, 2), label="the best constant")
        for axes, title in ((left, "mean cosine of patches"), (right, "linear CKA of patches")):
            axes.set(xlabel="hidden state (0: input of the first layer)", title=title)
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(length=0)
            axes.grid(axis="y", color=RULE, linewidth=0.7)
            if axes.lines:
                axes.legend(frameon=False, fontsize=9)
            else:
                axes.text(0.5, 0.5, "undefined: the widths differ", ha="center", transform=axes.transAxes, color=FAINT)
        return as_svg(figure)


def cka_map(cka: Sequence[Sequence[float]]) -> str:
    """CKA of every hidden state of the pre-decoder (rows) with every one of the teacher, as SVG text."""
    rows, columns = len(cka), len(cka[0])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.9 + 0.42 * max(columns, 6), 1.2 + 0.42 * max(rows, 5)), layout="constrained")
        axes = figure.add_subplot()
        shown = axes.pcolormesh(cka, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
        if rows * columns <= 100:
            for row, values in enumerate(cka):
                for column, value in enumerate(values):
                    colour = "white" if value > 0.55 else INK
                    place = {"ha": "center", "va": "center"}
                    axes.text(column + 0.5, row + 0.5, f"{value:.2f}", fontsize=7.5, color=colour, **place)
        axes.set(xlabel="hidden state of the teacher", ylabel="hidden state of the pre-decoder", aspect="equal")
        every = max(1, max(rows, columns) // 12)
        axes.set_xticks([i + 0.5 for i in range(0, columns, every)], range(0, columns, every))
        axes.set_yticks([i + 0.5 for i in range(0, rows, every)], range(0, rows, every))
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(shown, ax=axes, shrink=0.8)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        return as_svg(figure)


def zero_shot_bars(questions: dict[str, dict[str, float]]) -> str:
    """Accuracy of every question by every way, and chance, as SVG text."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for key, label, colour, hatch, shift in SERIES:
            there = [(place, own[key]) for place, own in enumerate(questions.values()) if key in own]
            if there:
                places, heights = [place + shift for place, _ in there], [height for _, height in there]
                axes.bar(places, heights, 0.15, label=label, color=colour, hatch=hatch, edgecolor="white", zorder=2)
                for place, height in zip(places, heights, strict=True):
                    axes.text(place, height + 0.015, f"{height:.2f}", ha="center", va="bottom", fontsize=8.5)
        names = [f"{name}, {own['classes']} classes" for name, own in questions.items()]
        axes.set_xticks(range(len(names)), names, color=INK)
        axes.set(xlim=(-0.6, max(len(names) - 0.4, 2.6)), ylim=(0, 1.08), ylabel="zero-shot accuracy")
        axes.tick_params(length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.spines["left"].set_visible(False)
        axes.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
        return as_svg(figure)
