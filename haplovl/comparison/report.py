"""The comparison's report: a page that holds all it shows, and the same numbers as CSV and Markdown."""

import base64
import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table

from haplovl.comparison.plots import MOST_SERIES, accuracy_chart, lead_chart, learning_curves, looks, panels
from haplovl.comparison.results import ALL, TERA, Result, Summary, finished, summarise
from haplovl.comparison.runs import GROUPS, Run, planned
from haplovl.comparison.tables import fill, markdown, p_value
from haplovl.comparison.terms import objection
from haplovl.errors import UserError
from haplovl.evaluate.console import wide_console
from haplovl.files import REPORTS, whole_folder, write_whole
from haplovl.settings import CompareSettings, load_compare

REPORT = REPORTS / "comparison"
TITLES = {
    "compute": "Equal compute",
    "samples": "Equal samples",
    "ablations": "Ablations: one switch each, at equal compute",
}


@dataclass(frozen=True)
class View:
    """What a group's runs came to: the reference's summary first, then the others'."""

    summaries: list[Summary]
    missing: list[str]
    """Recipes that are not finished, with their seeds unless it is all of them."""
    left_out: list[str]
    """Runs that are finished and not on equal terms, with the reason."""


def write_report(groups: Sequence[str] | None = None, into: Path | None = None) -> None:
    """Writes reports/comparison/ from the finished runs and prints the summaries.

    `groups` limits it to some of compute, samples and ablations; by default all that have a finished run. `into` is a
    document with marks for tables (`haplovl.comparison.tables.fill`), which are brought up to date.

    Raises:
        UserError: params.yaml names no comparison, no run is finished, runs do not belong together, or the document
            lacks marks.
    """
    settings = load_compare()
    if unknown := sorted(set(groups or ()) - set(GROUPS)):
        raise UserError(f"there is no group '{unknown[0]}'; choose {', '.join(GROUPS)}")
    reference = _reference(settings)
    found = {group: _view(settings, group, reference) for group in groups or GROUPS}
    shown = {name: view for name, view in found.items() if groups or len(view.summaries) > 1 or view.left_out}
    views = {name: view.summaries for name, view in shown.items()}
    with whole_folder(REPORT) as folder:
        _write_csv(folder / "runs.csv", _once(row for view in views.values() for row in _run_rows(view)))
        _write_csv(folder / "summary.csv", [row for name, view in views.items() for row in _summary_rows(name, view)])
        _write_csv(folder / "curves.csv", _once(row for view in views.values() for row in _curve_rows(view)))
        tables = {name: markdown(view, settings.recipes[0]) for name, view in views.items()}
        write_whole(folder / "tables.md", "\n".join(f"## {TITLES[name]}\n\n{own}" for name, own in tables.items()))
        write_whole(folder / "index.html", _page(settings, shown))
    console = wide_console()
    for name, view in views.items():
        console.print(summary_table(TITLES[name], view))
        for line in shown[name].left_out:
            console.print(f"left out: {line}", markup=False)
    console.print(f"The report is {REPORT / 'index.html'}")
    if into is not None:
        fill(into, tables)
        console.print(f"Its tables are in {into}", markup=False)


def _once(rows: Iterable[Any]) -> list[Any]:
    """Rows without repetition: the reference is part of every view."""
    known: list[Any] = []
    for row in rows:
        if row not in known:
            known.append(row)
    return known


def _reference(settings: CompareSettings) -> list[Result]:
    """The first recipe's runs, whose compute and samples are everybody's; one that is out of date has no say."""
    results = finished([Run("compute", settings.recipes[0], seed) for seed in settings.seeds])
    for result in results:
        if reason := objection(result, "compute", [result]):
            raise UserError(f"{result.run.folder} {reason}; 'make compare' trains it again")
    return results


def _view(settings: CompareSettings, group: str, reference: list[Result]) -> View:
    own = [run for run in planned(settings, group) if run.recipe != settings.recipes[0]]
    results = finished([*(result.run for result in reference), *own])
    reasons = {result.run: objection(result, group, reference) for result in results}
    left_out = [f"{run.folder} {reason}" for run, reason in reasons.items() if reason]
    results = [result for result in results if not reasons[result.run]]
    return View(summarise(results, reference), _missing(settings, group, set(reasons)), left_out)


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
            leads = (points, p_value(summary.p_adjusted))
        accuracy = f"{own.mean:.3f} ({own.low:.2f}–{own.high:.2f})"
        table.add_row(summary.recipe, accuracy, *leads, f"{summary.mean('total_flops') / TERA:.1f}")
    return table


def _page(settings: CompareSettings, views: dict[str, View]) -> str:
    environment = Environment(
        loader=PackageLoader("haplovl.comparison", "."), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    sections = [_section(settings, name, view) for name, view in views.items()]
    return environment.get_template("report.html.j2").render(
        sections=sections, reference=settings.recipes[0], seeds=settings.seeds, all=ALL, tera=TERA, p_value=p_value
    )


def _section(settings: CompareSettings, name: str, view: View) -> dict[str, Any]:
    """What the page shows of a view; charts in several panels where one cannot tell all recipes apart."""
    summaries = view.summaries
    parts = [(part, _look(settings, name, part)) for part in panels(summaries)]
    known = all(summary.teachers_flops is not None for summary in summaries)  # else the axis would be wrong
    return {
        "name": name,
        "title": TITLES[name],
        "summaries": summaries,
        "kinds": [*(kind for kind in summaries[0].accuracy if kind != ALL), ALL],
        "accuracy": [_uri(accuracy_chart(part, look)) for part, look in parts],
        "leads": _uri(lead_chart(summaries, settings.recipes[0])) if len(summaries) > 1 else None,
        "curves": [_uri(learning_curves(part, look)) for part, look in parts],
        "curves_with_teachers": [
            _uri(learning_curves(part, look, with_teachers=True)) for part, look in parts if name == "compute" and known
        ],
        "stage1": list(
            dict.fromkeys(name for summary in summaries for result in summary.results for name in result.stage1)
        ),
        "missing": view.missing,
        "left_out": view.left_out,
    }


def _look(settings: CompareSettings, name: str, part: list[Summary]) -> dict[str, tuple[str, str]]:
    """Colours and markers: a recipe keeps its own in all charts where there are enough of them."""
    own = [summary.recipe for summary in part]
    constant = list(dict.fromkeys([*settings.recipes, *settings.samples]))
    return looks(own if name == "ablations" or len(constant) > MOST_SERIES else constant)


def _missing(settings: CompareSettings, group: str, finished_runs: set[Run]) -> list[str]:
    """Recipes of the group that are not finished, with the seeds that are not, unless it is all of them."""
    done = {(run.recipe, run.seed) for run in finished_runs}
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
            accuracy = {kind: round(float(result.right(kind).mean()), 4) for kind in kinds}
            yield {
                "group": result.run.group,
                "recipe": result.run.recipe,
                "seed": result.run.seed,
                ALL: round(float(result.correct.mean()), 4),
                **accuracy,
                **{f"{stage}_steps": steps for stage, steps in result.steps.items()},
                **{f"{stage}_flops": flops for stage, flops in result.flops.items()},
                **{name: result.stage1.get(name, "") for name in STAGE1},
                "teachers_flops": "" if summary.teachers_flops is None else summary.teachers_flops,
                "records": result.records,
                **{name: round(result.measured.get(name, float("nan")), 4) for name in MEASURED},
            }


STAGE1 = ("cosine to the teacher", "current token")
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
                "p_holm": round(summary.p_adjusted, 5) if lead and kind == ALL else "",
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
