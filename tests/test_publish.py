import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from haplovl.errors import UserError
from haplovl.promotion import registered
from haplovl.publish import publish
from haplovl.settings import Params, load_params

ROOT = Path(__file__).parents[1]
DVC_YAML = """
stages:
  register:
    cmd: haplovl register
    outs: [candidate]
artifacts:
  haplovl:
    path: models/stage2
    type: model
"""


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def recorded(folder: str) -> dict[str, str]:
    """A folder with one file as dvc.lock has it: md5 over a listing with the file's."""
    (path,) = Path(folder).iterdir()
    listing = json.dumps([{"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.name}])
    return {"path": folder, "md5": hashlib.md5(listing.encode()).hexdigest() + ".dir"}


def write_candidate(recipe: str, passed: bool = True) -> None:
    """What `register` and DVC leave behind for a candidate."""
    Path("candidate").mkdir(exist_ok=True)
    candidate = {
        "params": {"seed": 17, "recipe": recipe},
        "metrics": {"evaluation": {"accuracy": 0.95}},
        "gate": {"passed": passed, "reasons": [] if passed else ["accuracy 0.500 is below 0.900"]},
    }
    Path("candidate/candidate.json").write_text(json.dumps(candidate))
    stages = {"register": ["candidate"], "stage2": ["models/stage2"]}
    lock = {name: {"cmd": "x", "outs": [recorded(folder) for folder in outs]} for name, outs in stages.items()}
    Path("dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": lock}))


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A repository whose user has configured no git identity, with a first candidate; W&B off."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "WANDB_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name, value in (("HOME", home), ("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_CONFIG_SYSTEM", "/dev/null")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "notes.txt").write_text("one\n")
    (root / ".gitignore").write_text("/runs/\n/candidate/\n/models/\n")
    git("init", "-q")
    git("add", "-A")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start")
    (root / "models/stage2").mkdir(parents=True)
    (root / "models/stage2/model.safetensors").write_bytes(b"weights")
    write_candidate("first")
    return root


def test_only_lock_and_lineage_are_committed_and_other_changes_are_named(project, params, capsys):
    (project / "notes.txt").write_text("two\n")
    (project / "staged.txt").write_text("new\n")
    git("add", "staged.txt")
    result = publish(params)
    assert (result.version, result.new, result.committed) == ("v0.0.1", True, True)
    assert git("show", "--name-only", "--format=", "HEAD").split() == ["dvc.lock", "lineage.json"]
    assert git("diff", "--cached", "--name-only") == "staged.txt"
    assert sorted(result.dirty) == ["notes.txt", "staged.txt"]
    said = capsys.readouterr().out
    assert (
        "tree is dirty" in said
        and "notes.txt" in said
        and "committed dvc.lock and lineage.json, and nothing else" in said
    )
    assert git("tag", "--list") == "haplovl@v0.0.1"
    assert git("rev-list", "-n", "1", "haplovl@v0.0.1") == git("rev-parse", "HEAD") == result.commit


def test_an_unchanged_candidate_makes_no_new_version_and_a_changed_one_does(project, params):
    publish(params)
    head = git("rev-parse", "HEAD")
    again = publish(params)
    assert (again.version, again.new, again.committed) == ("v0.0.1", False, False)
    assert git("rev-parse", "HEAD") == head

    write_candidate("second")
    assert publish(params).version == "v0.0.2"
    # Back to the first recipe: its version exists already, only the lock is new.
    write_candidate("first")
    back = publish(params)
    assert (back.version, back.new, back.committed) == ("v0.0.1", False, True)
    assert git("show", "--name-only", "--format=", "HEAD") == "dvc.lock"
    assert git("tag", "--list").split() == ["haplovl@v0.0.1", "haplovl@v0.0.2"]


def test_a_detached_head_is_fine(project, params):
    git("checkout", "-q", "--detach")
    assert publish(params).version == "v0.0.1"


def test_the_users_own_identity_is_used(project, params):
    git("config", "user.name", "Ada")
    git("config", "user.email", "ada@example.org")
    publish(params)
    assert git("log", "-1", "--format=%an %ae %cn") == "Ada ada@example.org Ada"
    assert "Ada <ada@example.org>" in git("for-each-ref", "--format=%(tagger)", "refs/tags")


def test_a_failed_gate_commits_and_registers_nothing(project, params):
    write_candidate("first", passed=False)
    head = git("rev-parse", "HEAD")
    result = publish(params)
    assert result.version is None and result.line() == "not registered: accuracy 0.500 is below 0.900"
    assert git("rev-parse", "HEAD") == head and not git("tag", "--list")


def test_what_a_stage_run_by_hand_left_is_not_published(project, params):
    """The version's commit would name the files of dvc.lock, not these."""
    kept = Path("candidate/candidate.json").read_text()
    write_candidate("second", passed=False)  # what dvc.lock records
    Path("candidate/candidate.json").write_text(kept)
    with pytest.raises(UserError, match="^candidate is not what dvc.lock records"):
        publish(params)
    write_candidate("second")
    Path("models/stage2/model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="^models/stage2 is not what dvc.lock records"):
        publish(params)
    assert not git("tag", "--list")


def test_a_version_that_was_taken_back_is_none_and_its_number_is_not_given_again(project, params):
    import gto.api

    assert publish(params).version == "v0.0.1"
    write_candidate("second")
    assert publish(params).version == "v0.0.2"
    gto.api.deregister(".", "haplovl", version="v0.0.2", author="t", author_email="t@t")
    git("tag", "haplovl@v0.1.0")  # a name alone, made by hand
    assert publish(params).line() == "not registered: this candidate was v0.0.2, which was taken back"
    write_candidate("third")
    assert publish(params).line() == "registered as v0.1.1"
    write_candidate("first")
    assert publish(params).line() == "already registered as v0.0.1"
    assert [version.name for version in registered("haplovl")] == ["v0.0.1", "v0.1.1"]


def test_an_upload_that_was_interrupted_is_tried_again(project, params, monkeypatch):
    from haplovl import publish as module

    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patched:
        patched.setattr(module, "_wandb_artifact", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(params)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    again = publish(params)
    assert (again.version, again.new, again.wandb) == ("v0.0.1", False, "disabled")
    assert publish(params).wandb == "disabled"


def test_a_hook_that_refuses_is_heard(project, params):
    hook = project / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho no commits on Friday >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(UserError, match="no commits on Friday"):
        publish(params)
    assert not git("tag", "--list")


def test_no_lock_and_no_repository_are_one_sentence(project, params, tmp_path, monkeypatch):
    (project / "dvc.lock").unlink()
    with pytest.raises(UserError, match="dvc.lock is missing"):
        publish(params)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs a git repository"):
        publish(params)


def test_wandb_offline_holds_the_artifact_and_writes_nothing_into_the_home_folder(project, params, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    result = publish(params)
    run_folder = project / result.wandb
    assert run_folder.parent == project / "runs/wandb" and run_folder.name.startswith("offline-run-")
    facts = (b"candidate/candidate.json", b"model/model.safetensors", b"dvc_lock_sha256", result.commit.encode())
    log, deadline = next(run_folder.glob("*.wandb")), time.monotonic() + 30
    # Offline, W&B's own process writes the end of its file after the run has finished here.
    while not all(fact in log.read_bytes() for fact in facts):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not [path for path in Path(os.environ["HOME"]).rglob("*") if path.is_file()]
    assert publish(params).wandb == result.wandb


def test_a_wandb_failure_keeps_the_version_and_is_tried_again(project, params, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    result = publish(params)
    assert result.version == "v0.0.1" and result.wandb.startswith("failed")
    assert "the version is registered all the same" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "disabled")
    again = publish(params)
    assert (again.version, again.new, again.wandb) == ("v0.0.1", False, "disabled")
