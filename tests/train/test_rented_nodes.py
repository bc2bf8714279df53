"""A training stage on nodes that nobody owns: code from git, inputs and results through the DVC remote.

The road is real but for the cloud: a bare repository is origin, a folder the DVC remote, another one the bucket, and
tests/helpers/fake_sky.py runs the task of infra/sky/train.yaml on this machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from run_state import complete

from haplovl.files import sha256_of
from haplovl.train import checkpoint

ROOT = Path(__file__).parents[2]
STAGE = {"steps": 30, "precision": "fp32", "checkpoint_every": 2, "batch": {"rows": 4, "row_tokens": 96}}
DVC_YAML = {
    "stages": {
        "teachers": {"cmd": "true", "outs": ["models/teachers"]},
        "prepare": {"cmd": "true", "outs": ["data/prepared"]},
        "stage1": {
            "cmd": "haplovl train stage1",
            "deps": ["data/prepared", "models/teachers", "recipe.txt"],
            "params": ["seed", "model", "stage1"],
            "outs": ["models/stage1"],
        },
    }
}
PROFILE = {"launcher": "sky", "device": "cpu", "threads": 1, "micro_batch_rows": 2}
IGNORED = "/runs/\n/models/\n/data/\n"


def run(command, folder, check=True, **more):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def git(folder, *words):
    return run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], folder).stdout.strip()


def dvc(folder, *words, **more):
    return run([sys.executable, "-m", "dvc", *words], folder, **more)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Processes find this Python's commands and this checkout's code, and the stand-in for SkyPilot."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HAPLOVL_PYTHON", sys.executable)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("FAKE_SKY_HOME", str(tmp_path / "sky"))
    (tmp_path / "sky").mkdir()
    command = tmp_path / "sky/sky"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/helpers/fake_sky.py "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("HAPLOVL_SKY", str(command))


@pytest.fixture(scope="module")
def made(make_project, vision, language, processor, tmp_path_factory):
    """A project ready for stage 1, with its data in DVC's cache and dvc.lock; not yet in git."""
    folder = make_project(tmp_path_factory.mktemp("made") / "", vision, language, processor, STAGE)
    for path in ("data/raw", "data/validated", "infra/sky"):
        shutil.rmtree(folder / path)
    shutil.copytree(ROOT / "infra/sky", folder / "infra/sky")
    (folder / "dvc.yaml").write_text(yaml.safe_dump(DVC_YAML))
    (folder / "recipe.txt").write_text("a file of git that decides the result\n")
    (folder / ".gitignore").write_text(IGNORED)
    for name, more in {"rented": {"processes": 1}, "rented-two": {"processes": 2}}.items():
        sky = {"state_bucket": "a-bucket", "nodes": more["processes"]}
        profile = {"name": name, **PROFILE, **more, "sky": sky}
        (folder / f"infra/compute/{name}.yaml").write_text(yaml.safe_dump(profile))
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n")  # git comes when it has a remote
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    dvc(folder, "commit", "-q", "-f", "teachers", "prepare")
    return folder


@pytest.fixture
def project(made, tmp_path):
    """The project on the flow's machine: committed and pushed, with a DVC remote."""
    folder, origin = tmp_path / "flow", tmp_path / "origin.git"
    shutil.copytree(made, folder)
    git(tmp_path, "init", "-q", "--bare", origin)
    git(folder, "init", "-q", "-b", "main")
    (folder / ".dvc/config").write_text(
        f"[core]\n    remote = store\n['remote \"store\"']\n    url = {tmp_path}/remote\n"
    )
    # As in a flow: the entries of the stages before are in dvc.lock, which is committed only at the end.
    git(folder, "add", "-A", ".", ":!dvc.lock")
    git(folder, "commit", "-qm", "start")
    git(folder, "remote", "add", "origin", origin)
    git(folder, "push", "-q", "origin", "main")
    return folder


def flow(folder, profile="rented", **more):
    """The flow's stage, as flows.pipeline runs it."""
    code = (
        "import sys; from flows.stages import run_stage;"
        f"code, lines = run_stage('stage1', '{profile}', lambda line: print(line, flush=True));"
        "print(*lines, sep='\\n'); sys.exit(code)"
    )
    return run([sys.executable, "-c", code], folder, check=False, **more)


def results(folder):
    return {
        name: sha256_of(folder / name)
        for name in ("dvc.lock", "models/stage1/model.safetensors", "models/stage1/training_log.jsonl")
    }


def complete_in(state):
    """Steps of the complete checkpoints in the bucket."""
    link = state.parent / "seen/runs"
    if not link.exists():
        link.mkdir(parents=True)
        (link / "training").symlink_to(state / "training")
    return complete(link.parent)


def kill_tree(pid):
    """Kills a process and everything it started, as a machine that is switched off does."""
    process = psutil.Process(pid)
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def start_flow(folder, profile="rented"):
    code = f"from flows.stages import run_stage; print('ended:', run_stage('stage1', '{profile}', print))"
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(process, home, step):
    deadline = time.monotonic() + 120
    while max(complete_in(home / "buckets/haplovl-state"), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    return json.loads((home / "job-1.json").read_text())["pids"]


def sky_calls(tmp_path):
    path = tmp_path / "sky/calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [" ".join(json.loads(line)[:2]) for line in lines]


@pytest.fixture(scope="module")
def straight(made, tmp_path_factory):
    """What the stage comes to when `dvc repro` runs it on one machine."""
    folder = tmp_path_factory.mktemp("straight") / "project"
    shutil.copytree(made, folder)
    git(folder, "init", "-q")
    local = {**PROFILE, "name": "here", "launcher": "local"}
    (folder / "infra/compute/here.yaml").write_text(yaml.safe_dump(local))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "HAPLOVL_COMPUTE": "here", "PATH": path}
    dvc(folder, "repro", "--single-item", "stage1", **more)
    return results(folder)


def train_with_a_kill(project, home):
    """The flow's stage on a node that is taken away in the middle; what the flow said, and the last node's folder."""
    process = start_flow(project)
    kill_tree(wait_for_step(process, home, 4)[0])
    output = process.communicate(timeout=200)[0]
    log = (home / "log-1").read_text()
    assert "ended: (0, [" in output, output + log
    assert log.count("stage1: starting") == 1 and "stage1: continuing after step" in log, log
    attempt = json.loads((home / "job-1.json").read_text())["recovery_count"]
    return output, home / f"node-1-{attempt}-0/haplovl"


def test_a_rented_node_is_taken_away_and_the_results_come_home(project, tmp_path):
    """The next node goes on from the bucket; the flow restores what came out and trains nothing."""
    output, node = train_with_a_kill(project, tmp_path / "sky")
    assert "Stage 'stage1' is cached - skipping run" in output and not (project / "runs/training").exists()
    before = results(project)
    assert before == results(node)

    # Somebody else's checkout, or this one after its cache was cleared: the results are fetched, not made again.
    shutil.rmtree(project / "models/stage1")
    shutil.rmtree(project / ".dvc/cache/runs")
    again = flow(project)
    assert again.returncode == 0 and "nothing is rented" in again.stdout, again.stdout + again.stderr
    assert results(project) == before and sky_calls(tmp_path).count("jobs launch") == 1


@pytest.mark.slow
def test_the_results_are_those_of_dvc_repro_on_one_machine(project, straight, tmp_path):
    train_with_a_kill(project, tmp_path / "sky")
    assert results(project) == straight


@pytest.mark.slow
def test_two_nodes_stopped_by_a_signal_go_on_in_another_attempt(project, tmp_path):
    """Two ranks on two nodes, one bucket; a stop signal to one of them ends both with 85, and the job starts anew."""
    home = tmp_path / "sky"
    process = start_flow(project, "rented-two")
    os.kill(wait_for_step(process, home, 4)[1], signal.SIGTERM)
    output = process.communicate(timeout=250)[0]
    log = (home / "log-1").read_text()
    assert "ended: (0, [" in output, output + log
    assert "stopped by signal after step" in log and "continuing after step" in log
    attempt = json.loads((home / "job-1.json").read_text())["recovery_count"]
    rows = (project / "models/stage1/training_log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, STAGE["steps"] + 1))
    assert results(project)["dvc.lock"] == sha256_of(home / f"node-1-{attempt}-0/haplovl/dvc.lock")
    assert not (home / f"node-1-{attempt}-1/haplovl/models/stage1").exists()  # results come from rank 0 alone


@pytest.mark.slow
def test_a_killed_flow_finds_its_job_again_and_an_interrupted_one_cancels_it(project, tmp_path):
    home = tmp_path / "sky"
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["stage1"]["steps"] = 5000  # nobody waits for its end
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    git(project, "commit", "-qam", "longer")
    git(project, "push", "-q", "origin", "main")
    process = start_flow(project)
    wait_for_step(process, home, 2)
    process.kill()
    process = start_flow(project)
    seen = ""
    while "is running already as job 1" not in seen:
        seen = process.stdout.readline()
        assert seen, "the flow ended without following the job"
    wait_for_step(process, home, 4)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert "cancelling haplovl-stage1-" in output
    assert json.loads((home / "job-1.json").read_text())["status"] == "CANCELLED"
    assert sky_calls(tmp_path).count("jobs launch") == 1


def test_all_ranks_go_on_from_a_checkpoint_that_all_of_them_see(tmp_path, monkeypatch):
    """A bucket shows one node the newest checkpoint before another one: both take the one before it."""
    for step in (2, 4):
        (tmp_path / f"step-{step}").mkdir()
        marker = {
            "step": step,
            "rank": 0,
            "world": 1,
            "file": "rank-0.safetensors",
            "validation_loss": None,
            "sha256": "",
        }
        (tmp_path / f"step-{step}/rank-0.json").write_text(json.dumps(marker))

    def gather(everywhere, mine):
        everywhere[:] = [mine, [2]]

    monkeypatch.setattr(checkpoint, "_world", lambda: 2)
    monkeypatch.setattr(checkpoint.dist, "all_gather_object", gather)
    assert [found.step for found in checkpoint.RunFolder(tmp_path, {})._seen_by_all()] == [2]
