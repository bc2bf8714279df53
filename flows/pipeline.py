"""The Prefect flow `haplovl-full`: one task per stage of dvc.yaml, then `publish`.

`python -m flows.pipeline` runs it here with a temporary Prefect server; prefect.yaml deploys it. The graph is DVC's
own, so `dvc repro` does the same work and writes the same dvc.lock.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

# Prefect reads its settings when it is imported. A server of the user's own (PREFECT_API_URL) is used as it is.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
if "PREFECT_API_URL" not in os.environ:
    os.environ.setdefault("PREFECT_HOME", str(Path("runs/prefect").absolute()))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes no parents.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90")
    os.environ.setdefault("PREFECT_API_BLOCKS_REGISTER_ON_START", "false")

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.stages import Project, run_stage
from haplovl.errors import UserError
from haplovl.files import METRICS, REPORTS, RUNS, read_json

REGISTER_STAGE = "register"
REPORT = REPORTS / "evaluation" / "index.html"


@task(cache_policy=NO_CACHE, persist_result=False)
def run_or_skip(project: Project, name: str, compute: str) -> State:
    """One DVC stage: Cached when DVC finds it unchanged, else run."""
    if project.is_unchanged(name):
        return Completed(name="Cached", message="DVC finds it unchanged")
    code, last_lines = run_stage(name, compute, get_run_logger().info)
    project.forget()
    if code:
        return Failed(
            message="\n    ".join([f"stage '{name}' failed (exit code {code}); its last lines:", *last_lines])
        )
    return Completed(message="done")


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish_candidate() -> State:
    """Commits dvc.lock and registers the candidate; unchanged candidates make no new version."""
    from haplovl.publish import publish
    from haplovl.settings import load_params

    try:
        result = publish(load_params())
    except UserError as error:
        return Failed(message=f"publish failed: {error}")
    return Completed(name=None if result.new else "Cached", message=result.line())


@flow(name="haplovl-full", persist_result=False)
def haplovl_full(compute: str = "laptop") -> State:
    """Runs every stage of dvc.yaml that changed, then publishes the candidate.

    Args:
        compute: profile of infra/compute/ for the stages that train or evaluate.
    """
    project = Project()
    states: dict[str, State] = {}
    for stage in project.stages:
        stage_task = run_or_skip.with_options(name=stage.name, task_run_name=stage.name)
        state = stage_task(
            project, stage.name, compute, wait_for=[states[up] for up in stage.upstream], return_state=True
        )
        if not state.is_completed():
            return Failed(message=state.message)
        states[stage.name] = state
    project.forget()
    if REGISTER_STAGE in states:
        state = publish_candidate(wait_for=[states[REGISTER_STAGE]], return_state=True)
        if not state.is_completed():
            return Failed(message=state.message)
    cached = sum(state.name == "Cached" for state in states.values())
    return Completed(message=f"{len(states) - cached} stages run, {cached} cached")


def main() -> None:
    """Runs the flow in the current folder and prints the summary; exits with 1 when a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Runs what changed, then publishes.")
    parser.add_argument("--compute", default=os.environ.get("HAPLOVL_COMPUTE") or "laptop", metavar="PROFILE")
    compute = parser.parse_args().compute
    _check_project(compute)
    logging.getLogger("prefect").addFilter(lambda record: "temporary server" not in record.getMessage())
    # Prefect hands SIGTERM on once the stage has ended; dying of it would leave the temporary server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Shells start background jobs with Ctrl-C ignored, and Python keeps it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start_server()
        state = haplovl_full(compute=compute, return_state=True)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to go on from the last finished stage or checkpoint")
    if not state.is_completed():
        sys.exit(f"error: {state.message}")
    print_summary(state.message or "")


def start_server() -> None:
    """Starts Prefect's temporary server where the user has none of their own.

    Ctrl-C reaches every process of the terminal. A server that died of it would leave the flow waiting a minute to
    report its end, so the server is born with the signal blocked; it is stopped with another one.
    """
    if "PREFECT_API_URL" not in os.environ:
        print("starting Prefect's temporary server (some seconds) ...", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _check_project(compute: str) -> None:
    """Says what is wrong with the project before any server starts; exits with 1."""
    try:
        names = [stage.name for stage in Project().stages]
        if REGISTER_STAGE in names:
            from haplovl.settings import load_compute, load_params

            load_params()
            load_compute(compute)
    except UserError as error:
        sys.exit(f"error: {error}")


def print_summary(outcome: str) -> None:
    """Accuracy per question type, where the report is, the version, and a command that asks the new model."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]haplovl-full[/bold]: {outcome}")
    if not (METRICS / "evaluation.json").is_file():
        return
    console.print(_scores_table(read_json(METRICS / "evaluation.json")))
    if REPORT.is_file():
        console.print(f"report   {REPORT}", markup=False)
    if (RUNS / "published.json").is_file():
        published = read_json(RUNS / "published.json")
        console.print(
            f"version  {published['version'] or 'not registered: ' + '; '.join(published['reasons'])}", markup=False
        )
    if example := _ask_command():
        console.print(f"ask it   {example}", markup=False)


def _scores_table(evaluation: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"exact match {evaluation['accuracy']:.3f} on held-out questions", title_justify="left")
    table.add_column("question type")
    for column in ("accuracy", "majority", "blank image", "questions"):
        table.add_column(column, justify="right")
    for name, scores in evaluation["types"].items():
        values = (scores["accuracy"], scores["majority"], scores["blank_image"])
        table.add_row(name, *(f"{value:.3f}" for value in values), str(scores["n"]))
    return table


def _ask_command() -> str | None:
    """A shell command about the first held-out record with one picture; None where there is none."""
    from haplovl.data.media import Media
    from haplovl.data.validated import read_validated
    from haplovl.records import IMAGE_PLACEHOLDER

    media = Media()
    try:
        rows = (row for row in read_validated(split="test") if len(row.images) == 1)
        found = ((row, media.path(row.source, row.images[0].path)) for row in rows)
        row, path = next(((row, path) for row, path in found if path), (None, None))
    except UserError:
        return None
    if row is None:
        return None
    # A short question shows more than the caption that a record may start with.
    turn = next((turn for turn in row.record.turns if turn.kind != "caption"), row.record.turns[0])
    question = turn.question.replace(IMAGE_PLACEHOLDER, "").strip()
    return f".venv/bin/haplovl ask --image {shlex.quote(str(path))} {shlex.quote(question)}"


if __name__ == "__main__":
    main()
