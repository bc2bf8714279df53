"""Champion and challenger, in a real repository of git, DVC and GTO: who gets into production, and the way back."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import wandb
import wandb_client
from dvc.repo import Repo
from dvc_project import git, make_project
from typer.testing import CliRunner

from haplovl.cli import app
from haplovl.errors import UserError
from haplovl.files import write_json
from haplovl.promotion import get, in_stage, judge, promote, registered, rollback
from haplovl.publish import publish
from haplovl.settings import load_params

DVC_YAML = """
stages:
  train:
    cmd: "true"
    outs: [models/stage2]
  evaluate:
    cmd: "true"
    outs: [reports/evaluation]
  register:
    cmd: "true"
    outs: [candidate]
artifacts:
  haplovl:
    path: models/stage2
    type: model
"""
KINDS = ("colour", "count")
PER_KIND = 300


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = make_project(tmp_path, monkeypatch, DVC_YAML)
    git("add", "-A")
    git("commit", "-qm", "start")
    return root


def train(weights: str, **wrong: int) -> str:
    """A new registered version whose model answers so many questions of each kind wrong; returns its name."""
    rows = [answer(kind, number, number >= wrong.get(kind, 0)) for kind in KINDS for number in range(PER_KIND)]
    write(rows, weights)
    Repo(".").commit(force=True)
    return publish(load_params()).version


def answer(kind: str, number: int, right: bool) -> dict:
    return {
        "id": f"{kind}{number}", "kind": kind, "source": "scenes", "question": f"Which {kind}?", "answer": "red",
        "prediction": "red" if right else "blue", "images": ["file:a.png"], "image_sha256": ["0" * 64],
        "confidence": -0.1,
    }  # fmt: skip


def write(rows: list[dict], weights: str) -> None:
    for name in ("models/stage2", "reports/evaluation", "candidate"):
        Path(name).mkdir(parents=True, exist_ok=True)
    Path("models/stage2/model.safetensors").write_text(weights)
    Path("reports/evaluation/predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy = sum(row["prediction"] == row["answer"] for row in rows) / len(rows)
    candidate = {
        "recipe": "haplovl", "seed": 17, "params": {}, "gate": {"passed": True, "reasons": []},
        "model_sha256": weights, "data_manifest_sha256": "d",
        "metrics": {"evaluation": {"accuracy": accuracy, "types": {}}},
    }  # fmt: skip
    write_json(Path("candidate/candidate.json"), candidate)


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_a_better_version_takes_over_and_a_worse_one_does_not(project):
    first = train("first", colour=40, count=40)
    assert (first, in_stage("haplovl", "prod")) == ("v0.0.1", None)
    assert not promote("haplovl").reasons and in_stage("haplovl", "prod") == "v0.0.1"

    better = train("better", colour=20, count=20)
    verdict = promote("haplovl")
    assert (verdict.champion, verdict.challenger, verdict.reasons) == ("v0.0.1", better, ())
    assert verdict.differences["all"].mean == pytest.approx(40 / 600) and verdict.differences["all"].real
    assert in_stage("haplovl", "prod") == better

    worse = train("worse", colour=60, count=60)
    refused = run("promote")
    assert refused.exit_code == 1 and f"{worse} is not promoted, prod stays {better}" in refused.output
    assert "worse than v0.0.2 on all questions: -13.3 points" in refused.output
    assert in_stage("haplovl", "prod") == better
    assert [(v.name, v.stages) for v in registered("haplovl")] == [("v0.0.1", ()), (better, ("prod",)), (worse, ())]

    assert run("promote", worse, "--force").exit_code == 0
    assert in_stage("haplovl", "prod") == worse


def test_a_loss_on_one_kind_refuses_what_is_better_on_the_whole(project):
    train("first", colour=100, count=10)
    promote("haplovl")
    train("second", colour=0, count=40)
    verdict = promote("haplovl")
    assert verdict.differences["all"].mean > 0
    assert len(verdict.reasons) == 1 and "on 'count': -10.0 points" in verdict.reasons[0]


def test_a_few_answers_less_are_noise(project):
    train("first", colour=10, count=10)
    promote("haplovl")
    train("second", colour=12, count=11)
    assert promote("haplovl").differences["all"].mean < 0
    assert in_stage("haplovl", "prod") == "v0.0.2"


def test_every_rollback_goes_one_further_back(project):
    for number in range(3):
        train(f"weights {number}", colour=30 - 10 * number)
        promote("haplovl")
    assert in_stage("haplovl", "prod") == "v0.0.3"
    assert rollback("haplovl") == ("v0.0.3", "v0.0.2")
    assert run("rollback").output == "prod: v0.0.2 → v0.0.1\n"
    assert in_stage("haplovl", "prod") == "v0.0.1"
    with pytest.raises(UserError, match=r"nothing was in 'prod' before v0\.0\.1"):
        rollback("haplovl")
    promote("haplovl", "v0.0.3")
    assert rollback("haplovl") == ("v0.0.3", "v0.0.1")
    assert git("tag", "--list", "haplovl#prod#*").count("\n") == 6, "nothing is forgotten: seven assignments"


def test_the_files_of_a_version_are_fetched_by_us_and_by_dvc(project, tmp_path, monkeypatch):
    train("first", colour=9)
    promote("haplovl")
    train("second")
    promote("haplovl")
    assert get("haplovl", Path("got")) == "v0.0.2"
    assert Path("got/model.safetensors").read_text() == "second"
    assert run("get", "--version", "haplovl@v0.0.1", "-o", "got1").exit_code == 0
    assert Path("got1/model.safetensors").read_text() == "first"
    with pytest.raises(UserError, match="got exists already"):
        get("haplovl", Path("got"))
    rollback("haplovl")
    # From another repository, as somebody who serves the model does.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Repo.init(".", no_scm=True)
    command = [
        sys.executable,
        "-m",
        "dvc",
        "artifacts",
        "get",
        str(project),
        "haplovl",
        "--stage",
        "prod",
        "-o",
        "served",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (elsewhere / "served/model.safetensors").read_text() == "first"


def test_a_stage_of_its_own_and_the_list(project):
    train("first", colour=30)
    train("second", colour=20)
    promote("haplovl", "haplovl@v0.0.1")
    promote("haplovl", stage="canary")
    rows = json.loads(run("models", "--json").output)
    assert [(row["version"], row["stages"]) for row in rows] == [("v0.0.1", ["prod"]), ("v0.0.2", ["canary"])]
    assert [row["accuracy"] for row in rows] == [0.95, pytest.approx(1 - 20 / 600)]
    assert rows[0]["model_sha256"] == "first" and rows[0]["commit"] == git("rev-parse", "haplovl@v0.0.1^{commit}")
    assert "prod" in run("models").output and "canary" in run("models").output


def test_what_cannot_be_compared_is_refused(project):
    with pytest.raises(UserError, match="no version of haplovl is registered yet"):
        promote("haplovl")
    with pytest.raises(UserError, match="no version of haplovl is in 'prod'"):
        rollback("haplovl")
    train("first")
    promote("haplovl")
    with pytest.raises(UserError, match=r"no version 'v9', only v0\.0\.1"):
        promote("haplovl", "v9")
    write([answer("colour", number, True) for number in range(20)], "second")
    Repo(".").commit(force=True)
    publish(load_params())
    with pytest.raises(UserError, match="answer different questions: 580 only v0.0.1"):
        judge("haplovl", "v0.0.2", "v0.0.1")
    assert in_stage("haplovl", "prod") == "v0.0.1"


@pytest.mark.parametrize("way", ["../", "../../", "{outside}/"])
def test_a_listing_that_leads_out_of_its_folder_writes_nothing_there(project, way):
    """DVC's remote is not ours: a listing that was changed there must not decide where files land."""
    train("weights")
    way = way.format(outside=project.parent)
    for listing in Path(".dvc/cache/files/md5").rglob("*.dir"):
        listing.chmod(0o644)
        listing.write_text(listing.read_text().replace('"relpath": "', f'"relpath": "{way}escaped-'))
    with suppress(UserError):  # refused in one sentence, or such files are left out
        get("haplovl", Path("got/deep/model"), "v0.0.1")
    assert not list(project.parent.rglob("escaped-*"))


# --- W&B's registry --------------------------------------------------------------------------------------------------
# No server of W&B's can run here: its client is real where it fails, and stood in for elsewhere.
COLLECTION = "wandb-registry-model/haplovl"


def said(*arguments: str) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def asked(tmp_path, monkeypatch) -> Path:
    """The file of what a process that follows asks W&B's client, once it has asked anything."""
    log = tmp_path / "asked.jsonl"
    monkeypatch.setenv("ASKED", str(log))
    monkeypatch.setattr("haplovl.wandb_registry.LINK", [sys.executable, wandb_client.__file__])
    return log


def test_stages_are_aliases_of_the_registry(project, asked, monkeypatch):
    for weights in ("first", "second"):
        train(weights, colour=10, count=10)
    promote("haplovl", "v0.0.1")
    said("promote", "v0.0.2")
    assert not asked.exists()  # offline
    monkeypatch.setenv("WANDB_MODE", "online")
    assert f"W&B's registry: canary of {COLLECTION} is v0.0.2" in said("promote", "v0.0.2", "--stage", "canary")
    said("rollback")
    assert [json.loads(line) for line in asked.read_text().splitlines()] == [
        {"artifact": "haplovl/haplovl:v0.0.2", "place": COLLECTION, "aliases": ["canary"]},
        {"artifact": "haplovl/haplovl:v0.0.1", "place": COLLECTION, "aliases": ["prod"]},
    ]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("no registry at https://me:s3cret-0123456789@wandb.example", "no registry at https://"),
        ("hang", "no answer within 5 seconds"),
    ],
)
def test_what_fails_at_wandb_is_told_and_git_goes_on(project, asked, monkeypatch, what, why):
    train("first")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("FAILS", what)
    monkeypatch.setattr("haplovl.wandb_registry.TIMEOUT", 5 if what == "hang" else 60)
    output = said("promote")
    assert f"git has v0.0.1 in prod; W&B's registry was not updated: {why}" in output and "s3cret" not in output
    assert in_stage("haplovl", "prod") == "v0.0.1"


@pytest.fixture
def client(monkeypatch):
    """W&B's client in this process, with its own signatures."""
    api = wandb_client.stand_in()
    monkeypatch.setattr("wandb.Api", api)
    return api.return_value


def test_a_published_version_is_linked(project, client, monkeypatch):
    publishing = create_autospec(wandb.Run, instance=True)
    publishing.url, publishing.summary = "https://wandb.example/run", {}
    monkeypatch.setattr("haplovl.publish.start_wandb", lambda *_, **__: publishing)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert train("first") == "v0.0.1"
    publishing.log_artifact.return_value.wait.assert_called_once_with()
    client.artifact.assert_called_once_with("haplovl/haplovl:v0.0.1", type="model")
    client.artifact.return_value.link.assert_called_once_with(COLLECTION, aliases=["v0.0.1"])
    client.artifact.side_effect = wandb.errors.CommError("no registry at https://me:s3cret-0123456789@wandb.example")
    assert train("second") == "v0.0.2"
    result = publish(load_params())
    assert result.version == "v0.0.2" and result.wandb.startswith("failed: no registry at https://")
    assert "s3cret" not in result.wandb


def test_no_registry_is_asked_where_none_is_wanted(project, asked, monkeypatch):
    train("first")
    monkeypatch.setenv("WANDB_MODE", "online")
    (project / "params.yaml").write_text(
        (project / "params.yaml").read_text().replace("register:\n", "register:\n  wandb_registry: null\n")
    )
    said("promote")
    assert not asked.exists()


def test_without_a_network_git_decides_all_the_same(project):
    train("first")
    nowhere = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "haplovl", "promote"]
    done = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "git has v0.0.1 in prod; W&B's registry was not updated: " in done.stderr
    assert in_stage("haplovl", "prod") == "v0.0.1"
