"""`haplovl compare`: the comparison as tables for the terminal, and as a page."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from haplovl.errors import UserError
from haplovl.evaluate.compare.comparison import ALL, UNKNOWN, Comparison, StageFigures, Verdict, compare
from haplovl.evaluate.compare.runs import ComparedRun, read_runs
from haplovl.evaluate.console import wide_console
from haplovl.evaluate.statistics import Interval
from haplovl.files import require_writable

NONE = "–"
FIGURES = ("loss", "held-out loss", "tokens/s", "TFLOP/s", "GiB", "hours")


def show(paths: Sequence[Path], html: Path | None = None) -> None:
    """Compares runs, prints the tables and writes the page.

    Raises:
        UserError: a path holds no run, there is nothing to compare, or the runs were asked different questions: then
            everything but accuracies is shown first. Or the page cannot be where it is wanted: before any work.
    """
    if html is not None:
        require_writable(html, "--html")
    comparison = compare(read_runs(paths))
    console = wide_console()
    for table in tables(comparison):
        console.print(table)
    for note in comparison.notes:
        console.print(note, markup=False)
    if html is not None:
        from haplovl.evaluate.compare.page import write_page

        write_page(html, comparison)
        console.print(f"The page is {html}", markup=False)
    if comparison.refusal:
        raise UserError(comparison.refusal)


def tables(comparison: Comparison) -> list[Table]:
    """The tables that have something to show, in the order of the page."""
    made = [_runs(comparison)]
    if comparison.settings:
        made.append(_settings(comparison))
    if comparison.training:
        made.append(_training(comparison))
    if comparison.kinds:
        made.append(_accuracies(comparison))
    if comparison.verdicts:
        made.append(_differences(comparison))
    return made


def _table(title: str, texts: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in texts:
        table.add_column(Text(name), overflow="fold")
    for name in numbers:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def _add(table: Table, *cells: str, style: str | None = None) -> None:
    table.add_row(*map(Text, cells), style=style)  # names and settings are no markup


def _runs(comparison: Comparison) -> Table:
    table = _table("Runs", ("run", "recipe", "seed", "training data", "code", "commit", "from"))
    for run in comparison.runs:
        _add(table, run.name, *lineage(run))
    return table


def lineage(run: ComparedRun) -> tuple[str, ...]:
    """Recipe, seed, training data, code, commit and place of a run."""
    about = run.about
    seed = UNKNOWN if about.seed is None else str(about.seed)
    told = (about.data[:10], about.code[:10], about.commit)
    return (about.recipe or UNKNOWN, seed, *(text or NONE for text in told), str(run.path))


def _settings(comparison: Comparison) -> Table:
    table = _table("Settings that differ", ("setting", *(group.name for group in comparison.groups)))
    for name, values in comparison.settings:
        _add(table, name, *values)
    return table


def _training(comparison: Comparison) -> Table:
    table = _table("Training", ("run", "stage"), ("steps", *FIGURES))
    for row in comparison.training:
        _add(table, row.run, row.stage, str(row.steps), *measurements(row))
    return table


def measurements(row: StageFigures) -> list[str]:
    """The figures of a stage in the order of FIGURES."""
    return [
        number(value)
        for value in (row.loss, row.validation_loss, row.tokens_per_s, row.tflops, row.memory_gib, row.hours)
    ]


def _accuracies(comparison: Comparison) -> Table:
    groups = [group for group in comparison.groups if group.accuracy]
    names = (*(group.name for group in groups), "questions")
    table = _table("Exact match, with 95 % intervals", ("type",), names)
    for kind in comparison.kinds:
        found = [group.accuracy[kind] for group in groups]
        _add(table, kind, *map(share, found), str(found[0].questions), style="bold" if kind == ALL else None)
    return table


def _differences(comparison: Comparison) -> Table:
    table = _table("Differences in points, paired over the questions", ("of", "type"), ("difference", "95 %", "p"))
    table.add_column("verdict")
    for verdict in comparison.verdicts:
        table.add_row(*map(Text, difference(verdict)), style=_style(verdict))
    return table


def difference(verdict: Verdict) -> tuple[str, ...]:
    """What is compared, on which type, the difference, its interval, the p-value and the verdict."""
    found = verdict.difference
    ends = f"{points(found.low)} … {points(found.high)}"
    names = f"{verdict.name} − {verdict.other}"
    return (names, verdict.kind, points(found.mean), ends, p_value(verdict), verdict.words)


def _style(verdict: Verdict) -> str:
    return ("bold " if verdict.kind == ALL else "") + ("green" if verdict.real else "")


def number(value: float | None) -> str:
    """A measurement with the digits that matter."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(found: Interval) -> str:
    """An accuracy with its interval."""
    return f"{found.mean:.3f} ({found.low:.3f}–{found.high:.3f})"


def points(value: float) -> str:
    """A difference of shares in points, signed."""
    return f"{100 * value:+.1f}"


def p_value(verdict: Verdict) -> str:
    """An adjusted p-value; no smaller than resampling can tell."""
    return "< 0.001" if verdict.p_value < 0.001 else f"{verdict.p_value:.3f}"
