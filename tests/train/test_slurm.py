"""Training stages as jobs of a real Slurm cluster of two nodes: followed, stopped, requeued, cancelled, found again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from local_slurm import LocalSlurm, missing
from run_state import complete

from haplovl.files import sha256_of
from haplovl.settings import ComputeProfile
from haplovl.slurm import sbatch_options

LONG = {"steps": 500, "precision": "fp32", "checkpoint_every": 20, "batch": {"rows": 4, "row_tokens": 96}}
SHAPE = {"device": "cpu", "processes": 2, "threads": 1, "zero_stage": 1, "micro_batch_rows": 2}

if reason := missing():
    # Continuous integration installs the packages: a skip for want of them would hide that nothing was tested.
    assert "apt-get" not in reason or "HAPLOVL_REQUIRE_SLURM" not in os.environ, reason
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def cluster():
    made = LocalSlurm()
    yield made
    made.end()


@pytest.fixture(scope="module")
def project(make_project, vision, language, processor, tmp_path_factory):
    """A project with profiles for two ranks: on this machine, as a job, and as a job of a minute."""
    folder = make_project(tmp_path_factory.mktemp("project"), vision, language, processor, LONG)
    slurm = {"nodes": 2, "partition": "gpu"}
    profiles = {
        "local": SHAPE,
        "job": {**SHAPE, "launcher": "slurm", "slurm": slurm},
        "minute": {**SHAPE, "launcher": "slurm", "slurm": {**slurm, "time_limit": "1", "stop_seconds": 40}},
    }
    for name, profile in profiles.items():
        (folder / f"infra/compute/{name}.yaml").write_text(yaml.safe_dump({"name": name, **profile}))
    return folder


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """The weights of both stages after two ranks on this machine."""
    folder = copy_of(project, tmp_path_factory.mktemp("local") / "project")
    for stage in ("stage1", "stage2"):
        done = subprocess.run(train("local", stage), cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return weights_of(folder), weights_of(folder, "stage2")


def copy_of(project, target):
    shutil.copytree(project, target, ignore=shutil.ignore_patterns("runs"))
    return target


def train(profile, stage="stage1"):
    return [sys.executable, "-m", "haplovl", "train", stage, "--compute", profile]


def weights_of(folder, stage="stage1"):
    return sha256_of(folder / "models" / stage / "model.safetensors")


@pytest.fixture
def copy(project, tmp_path):
    return copy_of(project, tmp_path / "project")


class Client:
    """`haplovl train` inside the cluster's namespaces, its output in a file."""

    def __init__(self, cluster, folder, profile="job", stage="stage1"):
        self.cluster, self.folder, self.file = cluster, folder, folder / "client.log"
        with self.file.open("ab") as output:
            self.process = subprocess.Popen(
                cluster.command(*train(profile, stage), folder=folder), env=cluster.environment, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self):
        return self.file.read_text()

    def send(self, number):
        """A signal to the command itself, not to what put it into the namespaces."""
        psutil.Process(self.process.pid).children()[0].send_signal(number)

    @property
    def job(self):
        return json.loads(next(self.folder.glob("runs/slurm/*.json")).read_text())["job"]

    def until(self, condition, seconds=120):
        """Waits; the client must live on meanwhile."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.05)

    def until_step(self, step):
        self.until(lambda: max(complete(self.folder), default=0) >= step)

    def wait(self, seconds=240):
        code = self.process.wait(seconds)
        return code, self.output


def state_of(cluster, job):
    return cluster.run("scontrol", "show", "job", "-o", job).stdout


def jobs(cluster):
    """The ids of all jobs that the controller knows; squeue sorts them by their states."""
    return sorted(cluster.run("squeue", "-h", "-t", "all", "-o", "%i").stdout.split(), key=int)


def test_a_job_on_two_nodes_gives_the_weights_of_two_local_ranks(cluster, copy, undisturbed):
    code, output = Client(cluster, copy).wait()
    assert code == 0, output
    assert weights_of(copy) == undisturbed[0]
    assert "on gpu[1-2], start 1" in output and "stage1: loss" in output
    code, output = Client(cluster, copy, stage="stage2").wait()
    assert code == 0, output
    assert weights_of(copy, "stage2") == undisturbed[1]
    assert not list(copy.glob("runs/training/*/result"))


def test_a_warned_job_saves_queues_again_and_ends(cluster, copy, undisturbed):
    client = Client(cluster, copy)
    client.until_step(20)
    cluster.run("scancel", "--signal=USR1", client.job, check=True)  # as Slurm does before a time limit
    code, output = client.wait()
    assert code == 0, output
    assert "stopped by signal after step" in output and "queueing again" in output
    assert "start 2" in output and "continuing after step" in output
    assert weights_of(copy) == undisturbed[0]


@pytest.mark.slow
def test_before_its_time_limit_a_job_is_warned(cluster, copy):
    params = yaml.safe_load((copy / "params.yaml").read_text())
    params["stage1"].update(steps=8000, checkpoint_every=4000)
    (copy / "params.yaml").write_text(yaml.safe_dump(params))
    client = Client(cluster, copy, "minute")
    client.until(lambda: "start 2" in client.output, seconds=150)
    assert "stopped by signal after step" in client.output and "queueing again" in client.output
    client.until(lambda: "continuing after step" in client.output)
    cluster.run("scancel", client.job, check=True)
    assert client.wait()[0] == 1


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(cluster, copy, undisturbed):
    client = Client(cluster, copy)
    client.until_step(20)
    cluster.kill_node("gpu2")
    client.until(lambda: "JobState=RUNNING" not in state_of(cluster, client.job))
    cluster.revive("gpu2")
    code, output = client.wait()
    assert code == 0, output
    assert "start 2" in output and "continuing after step" in output
    assert weights_of(copy) == undisturbed[0]


def test_a_cancelled_job_is_reported(cluster, copy):
    client = Client(cluster, copy)
    client.until_step(20)
    cluster.run("scancel", client.job, check=True)
    code, output = client.wait()
    assert code == 1, output
    assert f"error: job {client.job} was cancelled" in output
    assert "queueing again" not in output and "JobState=CANCELLED" in state_of(cluster, client.job)


def test_a_stopped_command_takes_its_job_along_and_goes_on_later(cluster, copy, undisturbed):
    client = Client(cluster, copy)
    client.until_step(20)
    client.send(signal.SIGINT)
    code, output = client.wait()
    assert code == 85, output
    assert "stopped by signal after step" in output and "queueing again" not in output
    assert "JobState=RUNNING" not in state_of(cluster, client.job)
    code, output = Client(cluster, copy).wait()
    assert code == 0, output
    assert "continuing after step" in output and weights_of(copy) == undisturbed[0]


def test_a_killed_command_finds_its_job_again(cluster, copy, undisturbed):
    client = Client(cluster, copy)
    client.until_step(20)
    before = jobs(cluster)
    kill(client)
    code, output = Client(cluster, copy).wait()
    assert code == 0, output
    assert f"following job {client.job}, which is running already" in output
    assert jobs(cluster) == before and weights_of(copy) == undisturbed[0]


def test_a_result_that_nobody_waited_for_is_fetched(cluster, copy, undisturbed):
    client = Client(cluster, copy)
    client.until_step(20)
    before = jobs(cluster)
    kill(client)
    end = time.monotonic() + 120
    while "JobState=COMPLETED" not in state_of(cluster, client.job):
        assert time.monotonic() < end
        time.sleep(0.2)
    code, output = Client(cluster, copy).wait()
    assert code == 0, output
    assert jobs(cluster) == before and weights_of(copy) == undisturbed[0]


def kill(client):
    """Kills the waiting command as a machine's end would; the job lives on."""
    client.send(signal.SIGKILL)
    client.process.wait(10)


def test_a_failing_job_shows_its_own_error(cluster, copy):
    params = yaml.safe_load((copy / "params.yaml").read_text())
    params["stage1"]["optimizer"]["learning_rate"] = 1e30
    (copy / "params.yaml").write_text(yaml.safe_dump(params))
    client = Client(cluster, copy)
    code, output = client.wait()
    assert code == 1, output
    assert "error: stage1 stopped before step" in output
    assert f"error: job {client.job} failed with exit status 1; its log is runs/slurm/stage1-" in output


def test_without_slurm_the_profile_says_so(copy):
    environment = {**os.environ, "PATH": str(copy)}
    done = subprocess.run(train("job"), cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "sbatch is not installed here" in done.stderr


def test_a_profile_becomes_options_of_sbatch():
    slurm = {"nodes": 4, "partition": "gpu", "account": "vision", "time_limit": "1-12", "options": ["--exclusive"]}
    profile = ComputeProfile.model_validate(
        {"name": "x", "device": "cuda", "processes": 32, "micro_batch_rows": 1, "launcher": "slurm", "slurm": slurm}
    )
    assert sbatch_options(profile) == [
        "--nodes=4", "--ntasks-per-node=8", "--signal=USR1@120", "--partition=gpu", "--account=vision", "--time=1-12",
        "--gpus-per-node=8", "--exclusive",
    ]  # fmt: skip
