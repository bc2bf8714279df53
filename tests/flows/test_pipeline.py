"""The flow on a small DVC project, a real temporary Prefect server, and the command that `make pipeline` runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.stages import Project, may_help_again, stream
from haplovl.errors import UserError

DVC_YAML = """
stages:
  last:
    cmd: cat middle/words.txt first.txt > last.txt
    deps: [first.txt, middle]
    outs: [last.txt]
  first:
    cmd: tr a-z A-Z < source.txt > first.txt; echo "first ran on $HAPLOVL_COMPUTE"
    deps: [source.txt]
    outs: [first.txt]
  middle:
    cmd: sh middle.sh
    deps: [first.txt, middle.sh]
    outs: [middle]
"""
PASSES = "mkdir -p middle && cat first.txt first.txt > middle/words.txt\n"
FAILS = "echo reading; echo 'the disk is full' >&2; exit 3\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A git and DVC project whose dvc.yaml lists its stages out of order."""
    root = tmp_path_factory.mktemp("flow") / "project"
    root.mkdir()
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "source.txt").write_text("abc\n")
    (root / "middle.sh").write_text(PASSES)
    (root / ".gitignore").write_text("/runs/\n/first.txt\n/middle\n/last.txt\n")
    run(["git", "init", "-q"], root)
    run([sys.executable, "-m", "dvc", "init", "-q"], root)
    run(["git", "add", "-A"], root)
    run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"], root)
    return root


def run(command: list[str], root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DVC_NO_ANALYTICS": "1", **environment}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def run_flow(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # One database for all runs: building it takes longer than the runs.
    home = str(root.parent / "prefect")
    done = run([sys.executable, "-m", "flows.pipeline", *arguments], root, PREFECT_HOME=home)
    done.stdout += done.stderr
    return done


def test_the_flow_runs_every_stage_then_finds_all_cached_and_stops_at_a_failure(project):
    clone = project.parent / "clone"
    shutil.copytree(project, clone)

    done = run_flow(project, "--compute", "elsewhere")
    assert done.returncode == 0, done.stdout
    assert "3 stages run, 0 cached" in done.stdout
    assert "first ran on elsewhere" in done.stdout
    assert (project / "last.txt").read_text() == "ABC\nABC\nABC\n"

    # DVC alone does the same work and writes the same lock.
    alone = run([sys.executable, "-m", "dvc", "repro"], clone)
    assert alone.returncode == 0, alone.stderr
    assert (clone / "dvc.lock").read_bytes() == (project / "dvc.lock").read_bytes()

    done = run_flow(project)
    assert done.returncode == 0, done.stdout
    assert "0 stages run, 3 cached" in done.stdout
    for name in ("first", "middle", "last"):
        assert f"Task run '{name}' - Finished in state Cached" in done.stdout

    (project / "middle.sh").write_text(FAILS)
    (project / "last.txt").unlink()
    done = run_flow(project)
    assert done.returncode != 0
    message = done.stdout[done.stdout.index("error: stage 'middle' failed") :]
    assert "the disk is full" in message
    assert "Task run 'first' - Finished in state Cached" in done.stdout
    assert "Task run 'last'" not in done.stdout and not (project / "last.txt").exists()


def test_a_stage_that_was_stopped_is_tried_again(project, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    (copy / "middle.sh").write_text(f"test -f tried || {{ touch tried; exit 85; }}\n{PASSES}")
    done = run_flow(copy)
    assert done.returncode == 0, done.stdout
    assert "Retry 1/3 will start" in done.stdout
    assert (copy / "last.txt").is_file()


@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("ERROR: failed to reproduce 'collect': failed to run: haplovl collect, exited with 75", True),
        ("ERROR: failed to reproduce 'collect': failed to run: haplovl collect, exited with 1", False),
        ("ERROR: Unable to acquire lock. Most likely another DVC process is running", True),
        ("error: No space left on device: data/raw.partial", False),
    ],
)
def test_only_what_time_may_mend_is_tried_again(line, again):
    assert may_help_again(["reading", line]) is again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_flow_stage_and_server_at_once(project, tmp_path, number):
    shutil.copytree(project, tmp_path / "copy")
    (tmp_path / "copy/middle.sh").write_text("echo $$ > pid; exec sleep 300\n")
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.pipeline"],
        cwd=tmp_path / "copy",
        env={**os.environ, "PREFECT_HOME": str(project.parent / "prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    pid = tmp_path / "copy/pid"
    while not (pid.exists() and pid.read_text()):
        assert flow.poll() is None, flow.communicate()[0]
        time.sleep(0.1)
    # Ctrl-C on a terminal reaches the whole group, the temporary server too; a supervisor ends the one process.
    (os.killpg if number == signal.SIGINT else os.kill)(flow.pid, number)
    output, _ = flow.communicate(timeout=40)
    assert flow.returncode in (1, 143) and "Traceback" not in output
    for is_gone, target in ((os.kill, int(pid.read_text())), (os.killpg, flow.pid)):
        with pytest.raises(ProcessLookupError):
            is_gone(target, 0)


def test_stages_come_in_dependency_order_with_their_upstream(project, monkeypatch):
    monkeypatch.chdir(project)
    stages = {stage.name: set(stage.upstream) for stage in Project().stages}
    assert list(stages) == ["first", "middle", "last"]
    assert stages == {"first": set(), "middle": {"first"}, "last": {"first", "middle"}}


def test_a_folder_without_a_project_is_one_sentence_and_starts_no_server(tmp_path):
    began = time.monotonic()
    done = run([sys.executable, "-m", "flows.pipeline"], tmp_path)
    assert done.returncode == 1
    assert "no usable DVC project here" in done.stderr and "Traceback" not in done.stderr
    assert "temporary server" not in done.stdout
    assert time.monotonic() - began < 60


def test_a_broken_graph_names_dvc_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages:\n  a: {cmd: x, outs: [o]}\n  b: {cmd: y, outs: [o]}\n")
    with pytest.raises(UserError, match="dvc.yaml cannot be used"):
        _ = Project()


def test_output_comes_line_by_line_and_the_tail_is_what_a_person_saw_last():
    seen: list[str] = []
    bar = r"printf '\033[32m10%%\r50%%\r100%%\033[0m\n\nfor one\n'"
    script = f"{bar}; i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo $i; done; printf unfinished; exit 7"
    code, tail = stream(["sh", "-c", script], dict(os.environ), seen.append)
    assert code == 7
    assert seen[:2] == ["100%", "for one"] and seen[-1] == "unfinished"
    assert tail == [*(str(i) for i in range(12, 31)), "unfinished"]


def test_on_a_terminal_the_stage_has_a_terminal_and_its_bytes_pass_untouched(capfdbinary):
    code, tail = stream(["sh", "-c", r"test -t 1 && printf 'bar\rBAR'"], dict(os.environ), None)
    assert (code, tail) == (0, ["BAR"])
    assert capfdbinary.readouterr().out == b"bar\rBAR"


def test_an_interrupt_ends_the_stage_and_its_children():
    pids: list[int] = []

    def stop(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    # The shell ignores the interrupt, as DVC does while its command runs; the grandchild dies from it.
    child = "import os, signal, time; signal.signal(2, signal.default_int_handler); print(os.getpid(), flush=True)"
    script = f"trap '' INT; {sys.executable} -c '{child}; time.sleep(100)' 2>/dev/null; exit 1"
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stream(["sh", "-c", script], dict(os.environ), stop)
    assert time.monotonic() - began < 15
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], signal.SIG_DFL)


def test_a_daemon_left_behind_does_not_hold_the_stage(tmp_path):
    began = time.monotonic()
    code, tail = stream(["sh", "-c", "sleep 20 & echo done"], dict(os.environ), lambda line: None)
    assert (code, tail) == (0, ["done"])
    assert time.monotonic() - began < 10
