"""Where a version comes from, and the same bytes again, in real repositories of git, DVC and GTO, by the commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc_project import git, make_project
from typer.testing import CliRunner

from haplovl.cli import app
from haplovl.files import sha256_of_folder, write_json
from haplovl.machine import differences, environment, machine
from haplovl.publish import publish
from haplovl.settings import load_params

DVC_YAML = """
stages:
  register:
    cmd: python make.py register
    deps: [models/stage2/model.txt, make.py]
    outs: [candidate]
  stage2:
    cmd: python make.py stage2
    deps: [data/raw, words.txt, make.py]
    params: [seed]
    outs: [models/stage2]
  collect:
    cmd: haplovl collect
    deps: [words.txt]
    outs: [data/raw]
"""
# A project with a package `haplovl` of its own, as a real version has: its `collect` is not today's.
PACKAGE = """
import pathlib, sys
def main():
    pathlib.Path("data/raw").mkdir(parents=True)
    pathlib.Path("data/raw/words.txt").write_text(pathlib.Path("words.txt").read_text())
    print(sys.argv[1], "by the version's own code")
"""
MAKE = """
import json, os, pathlib, sys, time
import yaml
time.sleep(float(os.environ.get("SLOW", 0)))
if sys.argv[1] == "stage2":
    profile = os.environ["HAPLOVL_COMPUTE"]
    processes = yaml.safe_load(pathlib.Path(f"infra/compute/{profile}.yaml").read_text())["processes"]
    folder = pathlib.Path("models/stage2"); folder.mkdir(parents=True)
    (folder / "model.txt").write_text(pathlib.Path("data/raw/words.txt").read_text())
    (folder / "config.txt").write_text(f"{processes} processes, {os.environ['OMP_NUM_THREADS']} threads")
else:
    pathlib.Path("candidate").mkdir()
    model = pathlib.Path("models/stage2/model.txt").read_text()
    evaluation = {"accuracy": 0.9, "types": {"colour": {"accuracy": 0.8}}}
    teacher = {"kind": "hub", "id": "someone/clip", "revision": "f" * 40, "sha256": "e" * 64}
    candidate = {
        "recipe": "haplovl", "seed": 17, "params": {"recipe": "haplovl", "seed": 17}, "params_fingerprint": "f1",
        "data": {"sources": {"scenes": {"train": 40, "test": 2}}}, "data_manifest_sha256": "d1", "model_sha256": model,
        "teachers": {"vision": teacher}, "metrics": {"evaluation": evaluation}, "gate": {"passed": True, "reasons": []},
    }
    pathlib.Path("candidate/candidate.json").write_text(json.dumps(candidate))
"""
PROFILE = "name: {}\ndevice: cpu\nprocesses: {}\nmicro_batch_rows: 1\n"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A registered version, trained by two processes of three threads each."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("HAPLOVL_COMPUTE", raising=False)
        root = make_project(tmp_path_factory.mktemp("template"), monkeypatch, DVC_YAML)
        write_project()
        pipeline()
        assert register() == "v0.0.1"
        yield root


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    """A copy of the registered version's repository."""
    root = tmp_path / "project"
    shutil.copytree(template, root, symlinks=True)
    monkeypatch.chdir(root)
    return root


def write_project() -> None:
    files = {
        "words.txt": "red\n", "make.py": MAKE, "haplovl/__init__.py": "", "haplovl/cli.py": PACKAGE,
        "haplovl/__main__.py": "from haplovl.cli import main; main()",
        "infra/compute/laptop.yaml": PROFILE.format("laptop", 1), "infra/compute/pair.yaml": PROFILE.format("pair", 2),
    }  # fmt: skip
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    git("add", "-A")
    git("commit", "-qm", "start")


def pipeline() -> None:
    """`dvc repro` in the project, as two processes trained it."""
    paths = {"PYTHONPATH": str(Path.cwd()), "HAPLOVL_COMPUTE": "pair", "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], env={**os.environ, **path_of_python(), **paths}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def path_of_python() -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def register(**noted) -> str:
    """Publishes what lies there, with the note of a training that ended in it."""
    run = Path("runs/training/stage2-abc")
    place = {"after_step": 0, "world_size": 2, "machine": {**machine(), "threads": 3}, "compute": {"name": "pair"}}
    place["compute"] |= {"device": "cpu", "processes": 1, "micro_batch_rows": 1}  # two by the launcher's word
    wandb = {"project": "haplovl", "id": "stage2-abc", "path": "runs/wandb/offline-run-1-stage2-abc"}
    write_json(run / "run.json", {"code": {"sha256": "c0de"}, "places": [place], "wandb": wandb, **noted})
    write_json(run / "finished.json", {"result_sha256": sha256_of_folder(Path("models/stage2"))})
    return publish(load_params()).version


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def worktrees() -> int:
    return git("worktree", "list", "--porcelain").count("worktree ") - 1


def test_a_version_comes_out_again_whatever_the_project_looks_like_now(project, capfd):
    for name in ("words.txt", "make.py", "haplovl/cli.py", "infra/compute/pair.yaml"):
        Path(name).write_text("something else\n")
    shutil.rmtree("models")
    before = git("status", "--porcelain")
    done = run("reproduce", "v0.0.1")
    assert done.exit_code == 0, done.output
    said = done.output + capfd.readouterr().out
    assert "collect by the version's own code" in said
    assert "v0.0.1: 3 of 3 outs are as recorded" in done.output and "hashes may differ" not in done.output
    lines = [line.split("│")[1].strip() for line in done.output.splitlines() if line.startswith("│")]
    assert lines == ["collect", "stage2", "register"]
    assert git("status", "--porcelain") == before and worktrees() == 0 and not list(Path("runs/reproduce").iterdir())


def test_a_stage_alone_runs_on_its_recorded_inputs_and_can_stay(project):
    for name in ("models", "data", "candidate"):
        shutil.rmtree(name)
    done = run("reproduce", "haplovl@v0.0.1", "--stage", "register", "--keep")
    assert done.exit_code == 0, done.output
    assert "1 of 1 outs are as recorded" in done.output
    (kept,) = Path("runs/reproduce").glob("v0.0.1-*")
    assert str(kept) in done.output and worktrees() == 1
    assert (kept / "models/stage2/model.txt").is_file() and not (kept / "data/raw").exists()


def test_what_is_not_deterministic_is_named_with_its_file(project):
    Path("make.py").write_text(MAKE.replace('f"{processes}', 'f"{time.time_ns()} {processes}'))
    git("commit", "-qam", "a clock")
    pipeline()
    Path("candidate/candidate.json").write_text(Path("candidate/candidate.json").read_text() + "\n")
    Repo(".").commit(force=True)  # another candidate, which `register` never wrote
    assert register() == "v0.0.2"
    done = run("reproduce", "v0.0.2")
    assert done.exit_code == 1
    assert "collect: as recorded" in done.output and "stage2: parts from the record" in done.output
    assert "v0.0.2 parts first at 'stage2'" in done.output
    assert "models/stage2: config.txt differs" in done.output and "model.txt differs" not in done.output
    assert "'stage2' does not give the same bytes twice" in done.output
    assert "parts" in next(line for line in done.output.splitlines() if line.startswith("│ register"))
    assert worktrees() == 1, "it stays to be looked at"


def test_code_that_was_never_committed_is_told_from_chance(project):
    Path("words.txt").write_text("blue\n")
    Path("make.py").write_text(MAKE.replace("processes, ", "PROCESSES, "))
    pipeline()
    assert register() == "v0.0.2"
    assert "not committed then: make.py, words.txt" in " ".join(run("lineage", "v0.0.2").output.split())
    git("commit", "-qam", "too late")
    done = run("reproduce", "v0.0.2", "--stage", "collect")
    assert done.exit_code == 1 and "v0.0.2 parts first at 'collect'" in done.output
    assert "data/raw: words.txt differs" in done.output
    assert "words.txt is not what the version was made with" in done.output
    assert "not committed when it was published: make.py, words.txt" in done.output


def test_another_machine_is_told_before_anything_runs(project, monkeypatch):
    record = json.loads(Path("lineage.json").read_text())
    record["environment"]["packages"] = ["torch==1.0", "gone==2.0", *record["environment"]["packages"]]
    place = record["training"]["stage2"]["places"][0]
    place["machine"] |= {"cpu": "Another CPU", "instructions": ["moon_bf16", *place["machine"]["instructions"]]}
    write_json(Path("lineage.json"), record)
    git("commit", "-qam", "from elsewhere")
    git("tag", "-d", "haplovl@v0.0.1")
    git("tag", "-a", "haplovl@v0.0.1", "-m", "again")
    done = run("reproduce", "v0.0.1", "--stage", "stage2")
    assert done.exit_code == 0, "the bytes are the same all the same"
    told = done.output[: done.output.index("recorded and found")]
    for line in ("hashes may differ", "gone: recorded 2.0, here none", "cpu: recorded Another CPU, here"):
        assert line in told
    assert "instruction sets: moon_bf16 only recorded" in told and "threads" not in told


def test_lineage_tells_all_of_it(project):
    found = json.loads(run("lineage", "haplovl@v0.0.1", "--json").output)
    assert (found["version"], found["commit"]) == ("v0.0.1", git("rev-parse", "haplovl@v0.0.1^{commit}"))
    assert found["code"] == {"haplovl": git("rev-parse", "haplovl@v0.0.1:haplovl"), "uncommitted": []}
    assert set(found["data"]["outs"]) == {"data/raw"}
    assert found["data"]["sources"] == {"scenes": {"train": 40, "test": 2}}
    assert found["environment"] == environment() and found["machine"] == machine()
    assert found["training"]["stage2"]["places"][0]["world_size"] == 2
    assert found["training"]["stage1"] == {"note": "unknown: models/stage1 is not here"}
    assert found["wandb"]["stage2"]["id"] == "stage2-abc" and found["metrics"]["accuracy"] == 0.9
    shown = run("lineage", "v0.0.1").output
    for text in ("profile pair, 2 processes of 3 threads", "someone/clip at fff", "0.900", "haplovl/stage2-abc"):
        assert text in " ".join(shown.split()), shown


def test_a_version_from_before_there_were_records_is_unknown_not_guessed(project):
    git("rm", "-q", "lineage.json")
    git("commit", "-qm", "as of old")
    git("tag", "-d", "haplovl@v0.0.1")
    git("tag", "-a", "haplovl@v0.0.1", "-m", "again")
    assert "this version has no lineage.json" in run("lineage", "v0.0.1").output
    assert json.loads(run("lineage", "v0.0.1", "--json").output)["environment"] is None
    done = run("reproduce", "v0.0.1", "--stage", "register")
    assert done.exit_code == 0 and "environment, machine and compute profile are unknown" in done.output


def test_what_cannot_be_reproduced_is_one_sentence(project):
    assert str(run("reproduce", "v9").exception) == "haplovl has no version 'v9', only v0.0.1"
    assert str(run("lineage", "v9").exception) == "haplovl has no version 'v9', only v0.0.1"
    alone = ("reproduce", "v0.0.1", "--stage")
    unknown = "v0.0.1 has no stage 'bake'; it has collect, stage2, register"
    assert str(run(*alone, "bake").exception) == unknown
    shutil.rmtree(".dvc/cache")
    gone = str(run(*alone, "stage2").exception)
    assert "what 'stage2' of v0.0.1 reads (data/raw) is neither in DVC's cache nor in the default remote" in gone
    assert worktrees() == 0


def test_a_stage_that_fails_stays_to_be_looked_at(project, monkeypatch):
    monkeypatch.setenv("SLOW", "no number")
    told = str(run("reproduce", "v0.0.1", "--stage", "stage2").exception)
    assert "'stage2' of v0.0.1 failed (exit code" in told and worktrees() == 1
    assert Path(told.rsplit(" ", 1)[1], "dvc.yaml").is_file()


def test_interrupted_reproductions_leave_nothing_behind(project):
    # -P: the package `haplovl` of this folder is the version's.
    command = [sys.executable, "-P", "-c", "from haplovl.cli import main; main()", "reproduce", "v0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "SLOW": "100"}
    both = [subprocess.Popen([*command, "--stage", "stage2"], env=environment) for _ in range(2)]  # side by side
    deadline = time.monotonic() + 100
    while len(list(Path("runs/reproduce").glob("*/data/raw/words.txt"))) < 2:  # next is the stage, which sleeps
        assert not any(process.poll() for process in both) and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)
    for process, number in zip(both, (signal.SIGINT, signal.SIGTERM), strict=True):
        process.send_signal(number)
    assert all(process.wait(timeout=40) != 0 for process in both)
    assert worktrees() == 0 and not list(Path("runs/reproduce").iterdir())


def test_machines_and_environments_are_told_apart_line_by_line():
    one = {"python": "3.11.2", "packages": ["a==1", "b==2"], "gpus": ["H100"], "instructions": ["avx", "avx2"]}
    other = {"python": "3.11.2", "packages": ["a==1", "b==3", "c==1"], "gpus": [], "instructions": ["avx", "fma"]}
    assert differences(one, one) == []
    assert differences(one, other) == [
        "b: recorded 2, here 3",
        "c: recorded none, here 1",
        "gpus: recorded H100, here none",
        "instruction sets: avx2 only recorded; fma only here",
    ]


def test_gpus_are_named_as_nvidias_tool_names_them(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for said, expected in (("NVIDIA H100 80GB HBM3, 570.86.15", ["NVIDIA H100 80GB HBM3 (driver 570.86.15)"]),
                           ("No devices were found", [])):  # fmt: skip
        tool.write_text(f"#!/bin/sh\necho '{said}'\n")
        tool.chmod(0o755)
        assert machine()["gpus"] == expected
