"""The comparison as one HTML page that holds all it shows and works without a network."""

from pathlib import Path

from haplovl.evaluate.compare.charts import COLOURS, accuracy_chart, loss_chart
from haplovl.evaluate.compare.comparison import ALL, Comparison
from haplovl.evaluate.compare.show import FIGURES, difference, lineage, measurements, share
from haplovl.evaluate.pages import data_uri, page_templates
from haplovl.files import write_whole


def write_page(target: Path, comparison: Comparison) -> None:
    """Writes the page. The same runs give the same bytes."""
    stages = list(dict.fromkeys(row.stage for row in comparison.training))
    curves = [
        {
            "stage": stage,
            "chart": _picture(loss_chart(comparison, stage)),
            "rows": [(row.run, row.steps, measurements(row)) for row in comparison.training if row.stage == stage],
        }
        for stage in stages
    ]
    groups = [
        {"name": group.name, "colour": COLOURS[number % len(COLOURS)], "accuracy": group.accuracy.get(ALL)}
        for number, group in enumerate(comparison.groups)
    ]
    judged = [group for group in comparison.groups if group.accuracy]
    page = page_templates().get_template("compare.html.j2")
    text = page.render(
        groups=groups,
        runs=[(run.name, lineage(run)) for run in comparison.runs],
        settings=comparison.settings,
        curves=curves,
        figures=FIGURES,
        chart=_picture(accuracy_chart(comparison)) if judged else "",
        judged=[group.name for group in judged],
        accuracies=[
            (kind, [share(group.accuracy[kind]) for group in judged], judged[0].accuracy[kind].questions)
            for kind in comparison.kinds
        ],
        verdicts=[
            {"cells": difference(verdict), "real": verdict.real, "total": verdict.kind == ALL}
            for verdict in comparison.verdicts
        ],
        overall=[verdict for verdict in comparison.verdicts if verdict.kind == ALL],
        refusal=comparison.refusal,
        notes=comparison.notes,
    )
    write_whole(target, text)


def _picture(svg: str) -> str:
    return data_uri(svg.encode(), "image/svg+xml")
