"""The comparison's report: a page that holds all it shows, and the same numbers as CSV and Markdown."""

import base64
import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from haplovl.comparison.plots import MOST_SERIES, TERA, accuracy_chart, lead_chart, learning_curves, looks
from haplovl.comparison.results import ALL, Result, Summary, finished, summarise
from haplovl.comparison.runs import GROUPS, Run, planned
from haplovl.comparison.tables import markdown
from haplovl.errors import UserError
from haplovl.files import REPORTS, whole_folder, write_whole
from haplovl.settings import CompareSettings, load_compare

REPORT = REPORTS / "comparison"
TITLES = {
    "compute": "Equal compute",
    "samples": "Equal samples",
    "ablations": "Ablations: one switch each, at equal compute",
}


def write_report(groups: Sequence[str] | None = None) -> None:
    """Writes reports/comparison/ from the finished runs and prints the summaries.

    `groups` limits it to some of compute, samples and ablations; by default all that have a finished run.

    Raises:
        UserError: params.yaml names no comparison, no run is finished, or runs do not belong together.
    """
    settings = load_compare()
    if unknown := sorted(set(groups or ()) - set(GROUPS)):
        raise UserError(f"there is no group '{unknown[0]}'; choose {', '.join(GROUPS)}")
    reference = finished([Run("compute", settings.recipes[0], seed) for seed in settings.seeds])
    views = {group: _view(settings, group, reference) for group in groups or GROUPS}
    views = {name: view for name, view in views.items() if groups or len(view) > 1}
    with whole_folder(REPORT) as folder:
        _write_csv(folder / "runs.csv", _once(row for view in views.values() for row in _run_rows(view)))
        _write_csv(folder / "summary.csv", [row for name, view in views.items() for row in _summary_rows(name, view)])
        _write_csv(folder / "curves.csv", _once(row for view in views.values() for row in _curve_rows(view)))
        tables = [markdown(TITLES[name], view, settings.recipes[0]) for name, view in views.items()]
        write_whole(folder / "tables.md", "\n".join(tables))
        write_whole(folder / "index.html", _page(settings, views))
    console = Console()
    for name, view in views.items():
        console.print(summary_table(TITLES[name], view))
    console.print(f"The report is {REPORT / 'index.html'}")


def _once(rows: Iterable[Any]) -> list[Any]:
    """Rows without repetition: the reference is part of every view."""
    known: list[Any] = []
    for row in rows:
        if row not in known:
            known.append(row)
    return known


def _view(settings: CompareSettings, group: str, reference: list[Result]) -> list[Summary]:
    """The summaries of a group; the reference comes first, whose compute and samples are everybody's."""
    own = [run for run in planned(settings, group) if run.recipe != settings.recipes[0]]
    results = finished([*(result.run for result in reference), *own])
    return summarise(results, reference)


def summary_table(title: str, view: list[Summary]) -> Table:
    """Accuracy and lead over the reference as a table for the terminal."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("recipe", no_wrap=True)
    for name in ("exact match", "lead, points", "p, Holm", "TFLOP"):
        table.add_column(name, justify="right", no_wrap=True)
    for summary in view:
        own, lead = summary.accuracy[ALL], summary.lead.get(ALL)
        leads = ("", "")
        if lead:
            points = f"{100 * lead.mean:+.0f} ({100 * lead.low:+.0f}…{100 * lead.high:+.0f})"
            leads = (points, f"{summary.p_adjusted:.3f}")
        accuracy = f"{own.mean:.3f} ({own.low:.2f}–{own.high:.2f})"
        table.add_row(summary.recipe, accuracy, *leads, f"{summary.mean('total_flops') / TERA:.1f}")
    return table


def _page(settings: CompareSettings, views: dict[str, list[Summary]]) -> str:
    environment = Environment(
        loader=PackageLoader("haplovl.comparison", "."), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    named = {name: [summary.recipe for summary in view] for name, view in views.items()}
    look = {name: looks(own if name == "ablations" else [*settings.recipes, *own]) for name, own in named.items()}
    sections = [
        {
            "name": name,
            "title": TITLES[name],
            "summaries": view,
            "kinds": [*(kind for kind in view[0].accuracy if kind != ALL), ALL],
            "accuracy": _uri(accuracy_chart(view, look[name])) if len(view) <= MOST_SERIES else None,
            "leads": _uri(lead_chart(view, settings.recipes[0])) if len(view) > 1 else None,
            "curves": _uri(learning_curves(view, look[name])) if len(view) <= MOST_SERIES else None,
            "curves_with_teachers": _with_teachers(view, look[name]) if name == "compute" else None,
            "missing": _missing(settings, name, view),
        }
        for name, view in views.items()
    ]
    return environment.get_template("report.html.j2").render(
        sections=sections, reference=settings.recipes[0], seeds=settings.seeds, all=ALL, tera=TERA
    )


def _with_teachers(view: list[Summary], look: dict[str, tuple[str, str]]) -> str:
    """Learning curves with the teachers' training; empty where that of one is unknown, as the axis would be wrong."""
    known = all(summary.teachers_flops is not None for summary in view)
    return _uri(learning_curves(view, look, with_teachers=True)) if known else ""


def _missing(settings: CompareSettings, group: str, view: list[Summary]) -> list[str]:
    """Recipes of the group that are not finished, with the seeds that are not, unless it is all of them."""
    done = {(result.run.recipe, result.run.seed) for summary in view for result in summary.results}
    seeds: dict[str, list[str]] = {}
    for run in planned(settings, group):
        if (run.recipe, run.seed) not in done:
            seeds.setdefault(run.recipe, []).append(str(run.seed))
    some = {recipe: f" (seed {', '.join(own)})" for recipe, own in seeds.items() if len(own) < len(settings.seeds)}
    return [recipe + some.get(recipe, "") for recipe in seeds]


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _run_rows(view: list[Summary]) -> Iterator[dict[str, Any]]:
    for summary in view:
        for result in summary.results:
            kinds = sorted(set(result.kinds))
            accuracy = {kind: round(float(result.answers(kind).mean()), 4) for kind in kinds}
            yield {
                "group": result.run.group,
                "recipe": result.run.recipe,
                "seed": result.run.seed,
                ALL: round(float(result.correct.mean()), 4),
                **accuracy,
                **{f"{stage}_steps": steps for stage, steps in result.steps.items()},
                **{f"{stage}_flops": flops for stage, flops in result.flops.items()},
                "teachers_flops": "" if summary.teachers_flops is None else summary.teachers_flops,
                "records": result.records,
                **{name: round(result.measured.get(name, float("nan")), 4) for name in MEASURED},
            }


MEASURED = ("step_seconds", "tokens_per_s", "memory_gib")


def _summary_rows(group: str, view: list[Summary]) -> Iterator[dict[str, Any]]:
    for summary in view:
        for kind, own in summary.accuracy.items():
            lead = summary.lead.get(kind)
            yield {
                "group": group,
                "recipe": summary.recipe,
                "type": kind,
                "questions": own.questions,
                "seeds": own.seeds,
                "accuracy": round(own.mean, 4),
                "low": round(own.low, 4),
                "high": round(own.high, 4),
                "lead": round(lead.mean, 4) if lead else "",
                "lead_low": round(lead.low, 4) if lead else "",
                "lead_high": round(lead.high, 4) if lead else "",
                "p_value": round(lead.p_value, 5) if lead else "",
            }


def _curve_rows(view: list[Summary]) -> Iterator[dict[str, Any]]:
    for summary in view:
        for result in summary.results:
            for spent, loss in result.curve:
                run = result.run
                yield {
                    "group": run.group,
                    "recipe": run.recipe,
                    "seed": run.seed,
                    "flops": spent,
                    "held_out_loss": loss,
                }
