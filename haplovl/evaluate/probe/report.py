"""The page of the probe: one HTML file that holds all it shows and works without a network."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from haplovl.evaluate.probe.charts import cka_map, layer_curves, zero_shot_bars
from haplovl.files import write_whole
from haplovl.settings import Params


def write_report(target: Path, params: Params, metrics: dict[str, Any], cka: list[list[float]] | None) -> None:
    """Writes the page; `cka` is that of `probe.vision.at_resolution` in the trained resolution."""
    alone = metrics["vision"].get("alone")
    questions = zero_shot_questions(metrics)
    environment = Environment(
        loader=PackageLoader("haplovl.evaluate.probe", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        recipe=params.recipe,
        settings=params.probe,
        metrics=metrics,
        trained=next((own for own in alone.values() if own["trained"]), None) if alone else None,
        curves=_chart(layer_curves(alone)) if alone else None,
        cka=_chart(cka_map(cka)) if cka else None,
        questions=questions,
        bars=_chart(zero_shot_bars(questions)) if questions else None,
    )
    write_whole(target, page)


def zero_shot_questions(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of all questions, named `scenes: colour`, `imagenet: class` …; empty where there are none."""
    return {
        f"{shown}: {name}": question
        for shown, own in metrics["zero_shot"].items()
        if isinstance(own, dict)
        for name, question in own.items()
        if isinstance(question, dict)
    }


def _chart(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
