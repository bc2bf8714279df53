"""What Prefect costs beside plain DVC, how fast an event becomes a run, and how many faults are survived.

    python benchmarks/orchestration.py [--json FILE] [--full] [--pairs N] [--drills FILE]

Flow and `dvc repro` run in turns, each on a copy of one project with nothing trained yet: the small recipe of the
drills on one core and, with --full, the committed one on all of them (14 minutes each on two). A cached flow is taken
apart: Prefect's own start is what an empty flow takes in the same environment.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drill import DRILLS, PORT, Outcome, drill, show, undisturbed
from drill_project import Project, Server, end, make_project, until
from rich.console import Console
from rich.table import Table

EMPTY_FLOW = """
from flows.pipeline import Completed, flow, start_server
start_server()
flow(name="empty")(lambda: Completed(message="done"))()
"""
STAGES = ("collect", "validate", "teachers", "prepare", "stage1", "probe", "stage2", "evaluate", "register")


def timed(project: Project, *command: str) -> float:
    """Wall time of a command in the project.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    if project.start(*command).wait():
        raise SystemExit(f"error: {' '.join(command)} failed; see {project.log}")
    return time.perf_counter() - began


def against_dvc(base: Project, pairs: int) -> dict[str, Any]:
    """The whole flow (without publish, which DVC has not) and `dvc repro` on copies, in turns."""
    flow, dvc = [], []
    for number in range(pairs):
        one, other = (base.copy(f"{base.folder.name}-{way}-{number}") for way in ("flow", "dvc"))
        began = time.perf_counter()
        process = one.flow()
        until(lambda one=one: "Task run 'register' - Finished" in one.said(), process, seconds=7200)
        flow.append(time.perf_counter() - began)
        process.wait()
        dvc.append(timed(other, sys.executable, "-m", "dvc", "repro", *STAGES))
        if one.outs() != other.outs():
            raise SystemExit("error: flow and dvc repro came to other outs")
    ratio = statistics.median(a / b for a, b in zip(flow, dvc, strict=True)) - 1
    return {"flow_s": flow, "dvc_repro_s": dvc, "flow_overhead": ratio,
            "flow_overhead_s": statistics.median(a - b for a, b in zip(flow, dvc, strict=True))}  # fmt: skip


def when_cached(project: Project, repeats: int = 3) -> dict[str, Any]:
    """A flow where nothing changed, `dvc repro` likewise, and an empty flow: Prefect's own start."""
    ways = {
        "cached_flow_s": (sys.executable, "-m", "flows.pipeline"),
        "cached_dvc_s": (sys.executable, "-m", "dvc", "repro", *STAGES),
        "empty_flow_s": (sys.executable, "-c", EMPTY_FLOW),
    }
    found = {name: [timed(project, *command) for _ in range(repeats)] for name, command in ways.items()}
    medians = {name: statistics.median(values) for name, values in found.items()}
    beyond = medians["cached_flow_s"] - medians["cached_dvc_s"] - medians["empty_flow_s"]
    return {**medians, "flow_overhead_cached_s": beyond}


def event_to_running(base: Project, repeats: int = 3) -> dict[str, Any]:
    """Seconds from `haplovl.data.changed` to the state Running of the run that it starts."""
    project = base.copy("event")
    server, found = Server(project, PORT), []
    try:
        for number in range(repeats):
            server.emit("haplovl.data.changed", "haplovl.data")
            began = time.monotonic()
            until(lambda number=number: sum(bool(run["start_time"]) for run in server.runs()) > number, server.process)
            found.append(time.monotonic() - began)
            until(lambda number=number: server.states().count("COMPLETED") > number, server.process)
    finally:
        end(server.process)
    return {"event_to_running_all_s": found, "event_to_running_s": statistics.median(found)}


def faults(base: Project, earlier: Path | None) -> dict[str, Any]:
    """All drills, or those of an earlier call: survived over injected, and the median of the times to resume."""
    if earlier:
        outcomes = [Outcome(**told) for told in json.loads(earlier.read_text())]
    else:
        outcomes = [drill(base, name) for name in DRILLS]
    show(outcomes)
    run = [outcome for outcome in outcomes if outcome.survived is not None]
    resumed = [outcome.seconds_to_resume for outcome in run if outcome.survived and outcome.seconds_to_resume]
    killed = {outcome.fault: outcome.seconds_to_resume for outcome in run}
    survived = sum(bool(outcome.survived) for outcome in run)
    return {"drills": [asdict(outcome) for outcome in outcomes], "faults_injected": len(run),
            "faults_survived": survived / len(run) if run else None,
            "kill_to_resumed_s": killed.get("machine_dies"),
            "resumed_median_s": statistics.median(resumed) if resumed else None}  # fmt: skip


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--full", action="store_true", help="compare flow and dvc repro on the committed recipe, too")
    parser.add_argument("--pairs", type=int, default=2, help="of flow and dvc repro")
    parser.add_argument(
        "--drills", type=Path, metavar="FILE", help="take what drill.py --json wrote; default: drill now"
    )
    parser.add_argument("--folder", type=Path, help="where the projects are made; default: a new temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="orchestration-"))
    base = undisturbed(folder)
    result = {
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        **against_dvc(base, options.pairs),
        **when_cached(base),
        **event_to_running(base),
        **faults(base, options.drills),
    }
    if options.full:
        project = make_project(folder / "full", {}, machine={})
        timed(project, sys.executable, "-m", "dvc", "repro", "prepare")
        result["full"] = against_dvc(project, 1)
        result["flow_overhead_full"] = result["full"]["flow_overhead"]
    _show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _show(result: dict[str, Any]) -> None:
    table = Table(title="Orchestration", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
