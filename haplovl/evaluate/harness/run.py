"""`haplovl harness`: published benchmarks through lmms-eval, each in a process of its own, offline, on local data."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from haplovl.errors import UserError
from haplovl.evaluate.answer import require_haplovl
from haplovl.evaluate.harness.environment import find_environment, probe, variables
from haplovl.evaluate.harness.folders import Folder, check_folder
from haplovl.evaluate.harness.results import Run, collect, summary_table
from haplovl.evaluate.harness.tasks import GQA_PICTURES, find, task_yaml
from haplovl.files import RUNS, sha256_of_folder, write_whole
from haplovl.progress import reporter

WORK = RUNS / "harness"
_ERROR = re.compile(r"(?:\[rank\d+\]: *)?([\w.]*(?:Error|Exception|Interrupt): .*)")
_PROGRESS = re.compile(r"haplovl answered (\d+) of (\d+)")


def run_harness(
    names: Sequence[str], data: Path, model: Path, processes: int = 1, limit: int | None = None, batch: int = 16
) -> None:
    """Runs benchmarks one after the other, and writes metrics and answers of each as soon as it is done.

    Everything is checked before the first one starts.

    Raises:
        UserError: an unknown benchmark, no environment with lmms-eval, no such model, data that are not whole, more
            processes than GPUs where there are some, or lmms-eval failed.
    """
    tasks = find(names)
    require_haplovl(model)
    environment = find_environment()
    folders = [check_folder(task, data, limit) for task in tasks]
    facts = probe(environment)
    if facts["gpus"] and processes > facts["gpus"]:
        raise UserError(f"{processes} processes need as many GPUs, but there are {facts['gpus']}")
    run = Run(model, sha256_of_folder(model), processes, limit, batch, environment, facts)
    written = []
    for folder in folders:
        output = _run_task(run, folder)
        written.append(collect(run, folder, output))
    from rich.console import Console

    Console().print(summary_table(written))


def _run_task(run: Run, folder: Folder) -> Path:
    """Runs lmms-eval on one benchmark; gives the folder of what it wrote."""
    task, work = folder.task, (WORK / folder.task.name).absolute()
    shutil.rmtree(work, ignore_errors=True)
    yaml = task_yaml(task, run.environment.tasks, [path.absolute() for path in folder.files])
    write_whole(work / "tasks" / f"{task.local}.yaml", yaml)
    (work / "model").symlink_to(run.model.absolute())  # a path of its own could hold commas
    own = {GQA_PICTURES: str(folder.path.absolute())} if folder.picture_files else {}
    if not run.facts["gpus"]:
        own["ACCELERATE_USE_CPU"] = "true"
    status = _follow(command(run, task.local), work, variables(own, folder.sha256), task.title, run.asked(folder))
    log = WORK / task.name / "log.txt"
    if status or not list((work / "output").rglob("*_results.json")):
        raise UserError(f"lmms-eval failed on {task.title}: {_reason(work / 'log.txt')} (all it said is in {log})")
    return work / "output"


def command(run: Run, task: str) -> list[str]:
    """What is started in the folder of a task's run, where `model` and `tasks` are."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}"]
    return [
        str(run.environment.python),
        *(several if run.processes > 1 else []),
        *("-m", "lmms_eval", "--model", "haplovl", "--model_args", "pretrained=model"),
        *("--tasks", task, "--include_path", "tasks", "--batch_size", str(run.batch)),
        *("--output_path", "output", "--log_samples", "--seed", run.seeds),
        # In threads, MMMU's random guesses would fall differently from run to run.
        *("--process_docs_parallel", "1"),
        # Otherwise an error ends with exit code 0.
        *("--verbosity", "DEBUG"),
        *(() if run.limit is None else ("--limit", str(run.limit))),
    ]


def _follow(command: list[str], work: Path, env: dict[str, str], title: str, total: int) -> int:
    """Runs a command, its output in log.txt; shows the progress that the adapter reports. Gives the exit code."""
    print(f"{title}: {total} questions", flush=True)
    write_whole(work / "command.txt", " ".join(command) + "\n")
    program = subprocess.Popen(
        command,
        cwd=work,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert program.stdout is not None
    try:
        with (work / "log.txt").open("w", encoding="utf-8") as log, reporter(title, total) as report:
            for line in program.stdout:
                log.write(line)
                found = _PROGRESS.search(line)
                if found:
                    report.update(int(found[1]) * total // int(found[2]))
        return program.wait()
    finally:
        if program.poll() is None:
            program.terminate()
            program.wait()


def _reason(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := _ERROR.match(line))]
    last = (errors or lines or ["it said nothing"])[-1]
    return last.removeprefix("haplovl.errors.UserError: ")[:300]
