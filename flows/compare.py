"""The Prefect flow `haplovl-compare`: the stages of comparison/dvc.yaml, several at once, then the report.

`python -m flows.compare` runs it here, as flows.pipeline does with the main pipeline. Runs that are finished are cached
by DVC; one that was killed goes on from its last checkpoint.
"""

import argparse
import os
import signal
import sys
from threading import Event, Lock

from prefect.task_runners import ThreadPoolTaskRunner

from flows.pipeline import (
    AGAIN,
    NO_CACHE,
    Completed,
    Failed,
    State,
    flow,
    get_run_logger,
    may_be_retried,
    start_server,
    task,
)
from flows.stages import Project, Stage, end_all, may_help_again, run_stage
from haplovl.comparison.recipes import load_recipe
from haplovl.comparison.runs import planned
from haplovl.errors import UserError
from haplovl.settings import load_compare, load_compute

FILE = "comparison/dvc.yaml"
GROUPS = {"compare": ("compute", "samples"), "ablations": ("ablations",)}
TRIES = 20
"""Tries of a stage that finds DVC's lock taken, or that a temporary fault ended."""
STOPPING = Event()
"""Set by an interruption: nothing new is started."""


class SharedProject:
    """A DVC project that several threads ask; DVC itself serves one at a time."""

    def __init__(self) -> None:
        self._project, self._lock = Project(), Lock()

    def stages(self, what: str, jobs: int = 1) -> list[Stage]:
        """The stages of `compare` or `ablations`, with what they need and are compared with, in order.

        A run's evaluation comes `jobs` trainings after its own: soon, and without a thread that waits for it.
        """
        by_name = {stage.name: stage for stage in self._project.all_stages}
        settings = load_compare()
        reference = [f"{FILE}:compute-evaluate@{settings.recipes[0]}-{seed}" for seed in settings.seeds]
        own = tuple(f"{FILE}:{group}-" for group in GROUPS[what])
        needed: set[str] = set()
        waiting = [*reference, *(name for name in by_name if name.startswith(own))]
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting.extend(by_name[name].upstream)
        ordered = [stage for stage in self._project.all_stages if stage.name in needed]
        evaluations = {stage.name: up for stage in ordered for up in stage.upstream if up.startswith(FILE)}
        others = [stage.name for stage in ordered if stage.name not in evaluations]
        place: dict[str, float] = {name: number for number, name in enumerate(others)}
        place |= {name: place[training] + jobs + 0.5 for name, training in evaluations.items()}
        return sorted(ordered, key=lambda stage: place[stage.name])

    def is_unchanged(self, name: str) -> bool:
        """Whether DVC would skip the stage."""
        with self._lock:
            self._project.forget()
            return self._project.is_unchanged(name)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=TRIES,
    retry_delay_seconds=1,
    retry_condition_fn=may_be_retried,
)
def run_or_skip(project: SharedProject, name: str, compute: str) -> State:
    """One DVC stage: Cached when DVC finds it unchanged, else run."""
    if STOPPING.is_set():
        return Failed(message="interrupted")
    if project.is_unchanged(name):
        return Completed(name="Cached", message="DVC finds it unchanged")
    short = name.rpartition(":")[2]
    code, last_lines = run_stage(name, compute, lambda line: get_run_logger().info(f"{short}: {line}"))
    if code:
        again = may_help_again(last_lines) and not STOPPING.is_set()
        return Failed(
            name=AGAIN if again else None,
            message="\n    ".join([f"'{name}' failed (exit code {code}); its last lines:", *last_lines]),
        )
    return Completed(message="done")


@flow(name="haplovl-compare", persist_result=False)
def haplovl_compare(what: str = "compare", compute: str = "one-core", jobs: int = 1) -> State:
    """Runs what changed of the comparison; a run that fails does not keep the others from running.

    Args:
        what: `compare` (equal compute, equal samples) or `ablations`.
        compute: profile of infra/compute/ of every run.
        jobs: how many stages the flow's task runner runs at once.
    """
    project = SharedProject()
    futures = {}
    for stage in project.stages(what, jobs):
        own = run_or_skip.with_options(name=stage.name, task_run_name=stage.name)
        futures[stage.name] = own.submit(project, stage.name, compute, wait_for=[futures[up] for up in stage.upstream])
    try:
        states = {name: future.wait() or future.state for name, future in futures.items()}
    except BaseException:  # Prefect takes SIGTERM for itself; its runner would wait until what runs has ended
        _stop()
        raise
    failed = [state.message for state in states.values() if not state.is_completed()]
    if failed:
        return Failed(message=f"{len(failed)} of {len(states)} stages failed or could not start; first: {failed[0]}")
    cached = sum(state.name == "Cached" for state in states.values())
    return Completed(message=f"{len(states) - cached} stages run, {cached} cached")


def _stop(*_: object) -> None:
    """Ends what runs in the flow's threads, which no exception reaches; the flow then ends by itself."""
    STOPPING.set()
    end_all()


def _jobs(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs, 1 or more")
    return int(text)


def main() -> None:
    """Runs the flow in the current folder, then writes the report; exits with 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="python -m flows.compare", description="Compares recipes on equal terms.")
    parser.add_argument("what", choices=sorted(GROUPS), nargs="?", default="compare")
    parser.add_argument("--compute", default=os.environ.get("HAPLOVL_COMPUTE") or "one-core", metavar="PROFILE")
    parser.add_argument("--jobs", type=_jobs, default=len(os.sched_getaffinity(0)), help="runs at once; default: cores")
    options = parser.parse_args()
    try:
        if load_compute(options.compute).launcher == "sky":
            raise UserError(f"'{options.compute}' rents nodes for stages of the pipeline, not for runs of a comparison")
        for group in ("compute", *GROUPS[options.what]):
            for run in planned(load_compare(), group):
                load_recipe(run.recipe_file, run.seed)  # a recipe that is wrong is found before an hour of training
        SharedProject().stages(options.what)
    except UserError as error:
        sys.exit(f"error: {error}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // options.jobs)))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        start_server()
        runner = ThreadPoolTaskRunner(max_workers=options.jobs)
        flow_here = haplovl_compare.with_options(task_runner=runner)
        state = flow_here(options.what, options.compute, options.jobs, return_state=True)
    except BaseException:
        if not STOPPING.is_set():
            raise
    finally:
        end_all()
    if STOPPING.is_set():
        sys.exit("\ninterrupted; run the same command again to go on from the last finished run or checkpoint")
    said = f"haplovl-compare: {state.message}" if state.is_completed() else f"error: {state.message}"
    print(said, file=sys.stdout if state.is_completed() else sys.stderr, flush=True)
    from haplovl.comparison.report import write_report

    try:
        write_report()  # of what is finished, also where a run failed
    except UserError as error:
        sys.exit(f"error: {error}")
    if not state.is_completed():
        sys.exit(1)


if __name__ == "__main__":
    main()
