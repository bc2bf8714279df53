"""What stops a stage before any node is rented, in one sentence, and what a job's end means for the flow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows import sky
from flows.node import Place
from flows.stages import rented
from flows.travel import inputs_of, open_repo, packed_lock, unpack_lock
from haplovl.cli import app
from haplovl.errors import UserError
from haplovl.settings import ComputeProfile, SettingsError, load_compute

ROOT = Path(__file__).parents[2]
PROFILE = {"name": "rented", "launcher": "sky", "micro_batch_rows": 1, "sky": {"state_bucket": "a-bucket"}}
DVC_YAML = """
stages:
  teachers: {cmd: 'true', outs: [models/teachers]}
  stage1:
    cmd: haplovl train stage1
    deps: [models/teachers/teachers.json, code.txt]
    params: [seed]
    outs: [models/stage1]
"""


def git(folder, *words):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
    subprocess.run([str(word) for word in command], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A project whose commit is on origin and whose DVC has a remote."""
    root = tmp_path_factory.mktemp("pushed")
    folder = root / "project"
    (folder / "models/teachers").mkdir(parents=True)
    (folder / "models/teachers/teachers.json").write_text("{}")
    (folder / "infra/compute").mkdir(parents=True)
    (folder / "infra/compute/rented.yaml").write_text(yaml.safe_dump(PROFILE))
    for name, text in {
        "dvc.yaml": DVC_YAML,
        "code.txt": "1",
        "params.yaml": "seed: 1\n",
        ".gitignore": "/models\n",
    }.items():
        (folder / name).write_text(text)
    git(root, "init", "-q", "--bare", "-b", "main", root / "origin.git")
    git(folder, "init", "-q", "-b", "main")
    for words in (
        ["init", "-q"],
        ["remote", "add", "-q", "-d", "store", root / "remote"],
        ["commit", "-q", "-f", "teachers"],
    ):
        subprocess.run([sys.executable, "-m", "dvc", *map(str, words)], cwd=folder, check=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    git(folder, "remote", "add", "origin", root / "origin.git")
    git(folder, "push", "-q", "origin", "main")
    return folder


@pytest.fixture
def project(pushed, tmp_path, monkeypatch):
    """A clone of it to spoil, with the stand-in for SkyPilot."""
    git(tmp_path, "clone", "-q", pushed.parent / "origin.git", tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    (tmp_path / "sky").write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/helpers/fake_sky.py "$@"\n')
    (tmp_path / "sky").chmod(0o755)
    monkeypatch.setenv("HAPLOVL_SKY", str(tmp_path / "sky"))
    monkeypatch.setenv("FAKE_SKY_HOME", str(tmp_path))
    return tmp_path / "clone"


def test_a_pushed_commit_is_taken(project):
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert sky.pushed_commit("stage1") == done.stdout.strip()
    assert sky.find_sky() == os.environ["HAPLOVL_SKY"]


def test_a_changed_lock_or_note_does_not_matter(project):
    (project / "dvc.lock").write_text((project / "dvc.lock").read_text() + "\n")
    (project / "notes.txt").write_text("mine")
    assert sky.pushed_commit("stage1")


@pytest.mark.parametrize("name", ["code.txt", "params.yaml", "infra/compute/rented.yaml"])
def test_uncommitted_files_that_decide_the_result_are_refused(project, name):
    (project / name).write_text("seed: 2\n")
    with pytest.raises(UserError, match=rf"committed files only; commit and push {name} first"):
        sky.pushed_commit("stage1")


def test_a_commit_that_is_not_on_origin_is_refused(project):
    git(project, "commit", "-q", "--allow-empty", "-m", "mine")
    with pytest.raises(UserError, match="is not on origin, where rented nodes fetch it; 'git push' sends it"):
        sky.pushed_commit("stage1")


def test_a_project_without_remotes_is_refused(project):
    git(project, "remote", "set-url", "origin", "https://ghp_secret@example.org/x.git")
    with pytest.raises(UserError, match="address of origin holds a password"):
        sky.pushed_commit("stage1")
    git(project, "remote", "remove", "origin")
    with pytest.raises(UserError, match="'origin', which there is none of"):
        sky.pushed_commit("stage1")
    (project / ".dvc/config").write_text("")
    with pytest.raises(UserError, match="need a DVC remote .* 'dvc remote add -d store s3://BUCKET/haplovl'"):
        sky.pushed_commit("stage1")


def test_a_missing_sky_and_one_without_a_cloud_are_refused(project, monkeypatch):
    monkeypatch.setenv("FAKE_SKY_CLOUDS", "{}")
    with pytest.raises(UserError, match="no cloud enabled; '.*/sky check' says what each of them needs"):
        sky.find_sky()
    monkeypatch.setenv("HAPLOVL_SKY", "")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="SkyPilot is not installed; 'make infra-env'"):
        sky.find_sky()


def test_the_flow_tells_the_reason_and_rents_nothing(project):
    (project / "code.txt").write_text("2")
    code, lines = sky.run_on_rented_nodes("stage1", rented("rented"), print)
    assert code == 1 and lines == ["rented nodes see committed files only; commit and push code.txt first"]
    assert "launch" not in (project.parent / "calls.jsonl").read_text()


def test_inputs_are_told_from_code(project):
    repo = open_repo()
    assert inputs_of(repo, "stage1") == (["models/teachers/teachers.json"], ["code.txt"])
    with pytest.raises(UserError, match="there is no stage 'stage9' to run"):
        inputs_of(repo, "stage9")


def test_the_lock_travels_as_a_word(project):
    before = (project / "dvc.lock").read_bytes()
    word = packed_lock()
    (project / "dvc.lock").unlink()
    unpack_lock(word)
    assert (project / "dvc.lock").read_bytes() == before and word == packed_lock()
    with pytest.raises(UserError, match="HAPLOVL_LOCK does not hold a packed dvc.lock"):
        unpack_lock(word[:-8])


def test_the_job_is_launched_with_names_not_values_of_secrets(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    settings = {"state_bucket": "b", "nodes": 2, "secrets": ["HF_TOKEN", "NOT_SET"]}
    profile = ComputeProfile.model_validate(PROFILE | {"processes": 16, "sky": settings})
    command = sky.launch_command("sky", "stage1", profile, "a" * 40)
    assert command[:4] == ["sky", "jobs", "launch", "infra/sky/train.yaml"]
    assert "very-secret" not in " ".join(command)
    assert command[-2:] == ["--secret", "HF_TOKEN"] and command[command.index("--num-nodes") + 1] == "2"
    name = sky.job_name("stage1", profile, "a" * 40)
    assert name in command and name != sky.job_name("stage1", profile, "b" * 40)


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        ("SUCCEEDED", None, 0),
        ("FAILED", "Job exited with exit code 3. Please check", 3),
        ("FAILED", "Job exited with exit codes [1, 137]", 1),
        ("FAILED_NO_RESOURCE", "no spot nodes", 1),
        ("CANCELLED", None, 1),
    ],
)
def test_the_status_of_a_job(status, reason, code):
    assert sky._status({"status": status, "failure_reason": reason}) == code


def test_a_job_that_fails_gives_its_status_and_reason(project, monkeypatch):
    jobs = [{"job_id": 1, "job_name": "j", "status": "FAILED", "failure_reason": "Job exited with exit code 7."}]
    (project.parent / "job-1.json").write_text(json.dumps(jobs[0]))
    (project.parent / "log-1").write_text("step 1\n")
    lines = []
    code, last = sky._follow(os.environ["HAPLOVL_SKY"], "j", lines.append)
    assert code == 7 and lines == ["step 1"] and last[-1] == "job 1 ended as FAILED: Job exited with exit code 7."


def test_a_node_knows_its_place(monkeypatch):
    profile = ComputeProfile.model_validate(PROFILE | {"processes": 4})
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "1")
    monkeypatch.setenv("SKYPILOT_NODE_IPS", "10.0.0.1\n10.0.0.2")
    ranks = Place.here().ranks(profile)
    assert [(rank["RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [("2", "0"), ("3", "1")]
    assert {(rank["MASTER_ADDR"], rank["WORLD_SIZE"]) for rank in ranks} == {("10.0.0.1", "4")}
    monkeypatch.delenv("SKYPILOT_NODE_RANK")
    for name, value in {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    assert Place.here() == Place(3, 4, "head", "29500")
    monkeypatch.setenv("PET_NNODES", "3")
    with pytest.raises(UserError, match="has 4 processes, which 3 nodes cannot share evenly"):
        Place.here().ranks(profile)


def test_profiles_that_cannot_be_rented_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "infra/compute/rented.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(PROFILE | {"sky": None}))
    with pytest.raises(SettingsError, match="launcher: sky and a section sky need each other"):
        load_compute("rented")
    path.write_text(yaml.safe_dump(PROFILE | {"processes": 8, "sky": {"state_bucket": "b", "nodes": 3}}))
    with pytest.raises(SettingsError, match="sky.nodes: 3 nodes cannot share 8 processes evenly"):
        load_compute("rented")


def test_training_by_hand_with_such_a_profile_is_refused(project):
    result = CliRunner().invoke(app, ["train", "stage1", "--compute", "rented"])
    assert isinstance(result.exception, UserError)
    assert "trains on rented nodes: 'make pipeline COMPUTE=rented' launches them" in str(result.exception)
