"""The Prefect flow `haplovl-full`: one task per stage of dvc.yaml, then `publish`; `haplovl-retrain` promotes as well.

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
from typing import Annotated, Any

# Prefect reads its settings when it is imported. A server of the user's own (PREFECT_API_URL) is used as it is.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
if "PREFECT_API_URL" not in os.environ:
    os.environ.setdefault("PREFECT_HOME", str(Path("runs/prefect").absolute()))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes no parents.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90")
    os.environ.setdefault("PREFECT_API_BLOCKS_REGISTER_ON_START", "false")

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from flows.stages import Project, may_help_again, run_stage
from haplovl.errors import UserError
from haplovl.files import METRICS, REPORTS, RUNS, read_json
from haplovl.settings import COMPUTE_FOLDER

PROFILES = sorted(path.stem for path in COMPUTE_FOLDER.glob("*.yaml"))
Compute = Annotated[str, Field(json_schema_extra={"enum": PROFILES} if PROFILES else None)]
"""A compute profile. Prefect's UI offers, and its server takes, those that there were at deployment."""
Place = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
REGISTER_STAGE = "register"
REPORT = REPORTS / "evaluation" / "index.html"
PUBLISHED = RUNS / "published.json"


AGAIN = "Interrupted"
"""Name of the failed state of a stage that may succeed when it is run again as it is."""
AGAIN_AFTER = [10, 60, 300]
"""Seconds before the tries."""


def may_be_retried(_: Any, __: Any, state: State) -> bool:
    """Only what time may mend: never wrong data, settings or code."""
    return state.name == AGAIN


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=len(AGAIN_AFTER),
    retry_delay_seconds=AGAIN_AFTER,
    retry_condition_fn=may_be_retried,
)
def run_or_skip(project: Project, name: str, compute: str) -> State:
    """One DVC stage: Cached when DVC finds it unchanged, else run."""
    if project.is_unchanged(name):
        return Completed(name="Cached", message="DVC finds it unchanged")
    code, last_lines = run_stage(name, compute, get_run_logger().info)
    project.forget()
    if code:
        return Failed(
            name=AGAIN if may_help_again(last_lines) else None,
            message="\n    ".join([f"stage '{name}' failed (exit code {code}); its last lines:", *last_lines]),
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
def haplovl_full(compute: Compute = "laptop") -> State:
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
        show_scores()
    cached = sum(state.name == "Cached" for state in states.values())
    return Completed(message=f"{len(states) - cached} stages run, {cached} cached")


def show_scores() -> None:
    """The scores by question type and where the report is, as an artifact of the flow run in Prefect's UI."""
    if not (METRICS / "evaluation.json").is_file():
        return
    evaluation, published = read_json(METRICS / "evaluation.json"), read_json(PUBLISHED)
    rows = [f"| {' | '.join(row)} |" for row in _score_rows(evaluation)]
    registered = published["version"] or "not registered: " + "; ".join(published["reasons"])
    lines = [
        f"Exact match on held-out questions: **{evaluation['accuracy']:.3f}**. Version: {registered}.",
        "",
        "| question type | accuracy | majority | blank image | questions |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Report: `{REPORT.absolute()}`",
    ]
    create_markdown_artifact("\n".join(lines), key="haplovl-scores", description="Scores of the version")


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def promote_challenger(stage: str) -> State:
    """Puts the published version into a stage unless it is worse than the present one; a refusal is no failure.

    A version that was there before is left alone: somebody rolled it back or replaced it.
    """
    from haplovl.promotion import in_stage, promote, was_in_stage
    from haplovl.promotion_tables import outcome
    from haplovl.settings import load_params
    from haplovl.wandb_registry import follow

    published = read_json(PUBLISHED)
    if published["version"] is None:
        return Completed(name="NotRegistered", message="not registered: " + "; ".join(published["reasons"]))
    settings, version = load_params().register_, published["version"]
    name = settings.name
    if was_in_stage(name, version, stage) and (present := in_stage(name, stage)) != version:
        why = f"{version} was in {stage} before, which holds {present or 'nothing'} now; haplovl promote puts it back"
        return Completed(name="NotPromoted", message=why)
    try:
        verdict = promote(name, version, stage)
    except UserError as error:
        return Failed(message=f"promote failed: {error}")
    if not verdict.reasons:
        follow(settings, version, stage)
    state = "NotPromoted" if verdict.reasons else "Cached" if verdict.champion == verdict.challenger else None
    return Completed(name=state, message=outcome(verdict, stage))


@flow(name="haplovl-retrain", persist_result=False)
def haplovl_retrain(compute: Compute = "laptop", stage: Place = "prod") -> State:
    """As haplovl-full, then the new version takes the production model's place unless it is worse.

    Where nothing changed since the last run, every stage is cached and nothing is trained.

    Args:
        compute: profile of infra/compute/ for the stages that train or evaluate.
        stage: where the version is promoted to.
    """
    full = haplovl_full(compute=compute, return_state=True)
    if not full.is_completed():
        return Failed(message=full.message)
    promoted = promote_challenger(stage, return_state=True)
    if not promoted.is_completed():
        return Failed(message=promoted.message)
    return Completed(message=f"{full.message}; {promoted.message}")


def main() -> None:
    """Runs the flow in the current folder and prints the summary; exits with 1 when a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Runs what changed, then publishes.")
    parser.add_argument("--compute", default=os.environ.get("HAPLOVL_COMPUTE") or "laptop", metavar="PROFILE")
    parser.add_argument("--promote", action="store_true", help="then promote the version unless it is worse")
    arguments = parser.parse_args()
    compute, run = arguments.compute, haplovl_retrain if arguments.promote else haplovl_full
    _check_project(compute)
    logging.getLogger("prefect").addFilter(lambda record: "temporary server" not in record.getMessage())
    # Prefect hands SIGTERM on once the stage has ended; dying of it would leave the temporary server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Shells start background jobs with Ctrl-C ignored, and Python keeps it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start_server()
        state = run(compute=compute, return_state=True)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to go on from the last finished stage or checkpoint")
    if not state.is_completed():
        sys.exit(f"error: {state.message}")
    print_summary(run.name, state.message or "")


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


def print_summary(name: str, outcome: str) -> None:
    """Accuracy per question type, where the report is, the version, and a command that asks the new model."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]{name}[/bold]: {outcome}")
    if not (METRICS / "evaluation.json").is_file():
        return
    console.print(_scores_table(read_json(METRICS / "evaluation.json")))
    if REPORT.is_file():
        console.print(f"report   {REPORT}", markup=False)
    if PUBLISHED.is_file():
        published = read_json(PUBLISHED)
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
    for row in _score_rows(evaluation):
        table.add_row(*row)
    return table


def _score_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    columns = ("accuracy", "majority", "blank_image")
    return [
        [name, *(f"{scores[column]:.3f}" for column in columns), str(scores["n"])]
        for name, scores in evaluation["types"].items()
    ]


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
