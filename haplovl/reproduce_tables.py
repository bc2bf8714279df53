"""What came out of a reproduction, as a table in the terminal."""

from rich.console import Console
from rich.table import Table

from haplovl.reproduce import Reproduction, reproduce, some
from haplovl.settings import load_params


def print_reproduction(version: str, stages: list[str], keep: bool) -> bool:
    """Reproduces a version and prints recorded and found hashes; False where they part."""
    result = reproduce(load_params().register_.name, version, stages, keep)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table(title=f"{result.version}, recorded and found (DVC's hashes)", title_justify="left")
    for column in ("stage", "out", "recorded", "found"):
        table.add_column(column, no_wrap=True)
    for out in result.outs:
        mark = "" if out.same else "  parts"
        table.add_row(out.stage, out.path, _short(out.recorded), _short(out.found) + mark)
    console.print(table)
    same = sum(out.same for out in result.outs)
    console.print(f"{result.version}: {same} of {len(result.outs)} outs are as recorded")
    if result.parted is not None:
        _print_parting(console, result)
    if result.kept:
        console.print(f"the worktree is {result.kept}; git worktree remove --force takes it away")
    return result.parted is None


def _print_parting(console: Console, result: Reproduction) -> None:
    console.print(f"{result.version} parts first at '{result.parted}':")
    for out, lines in result.files.items():
        for line in some([f"{out}: {line}" for line in lines] or [f"{out} differs"]):
            console.print(f"  {line}")
    console.print("probable reasons:")
    for line in some(result.reasons):
        console.print(f"  {line}")


def _short(digest: str) -> str:
    return digest[:12] or "none"
