"""What W&B is told about a run, what it is never told, and that nobody needs it."""

import subprocess

import pytest
from made_runs import settings

from haplovl import tracking
from haplovl.redaction import without_secrets
from haplovl.settings import Params
from haplovl.tracking import TrackedRun, code_version, description, grouping


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def params(**changes) -> Params:
    return Params.model_validate(settings(**changes))


def test_a_description_tells_settings_and_data_but_not_the_gate(tmp_path):
    assert description(params())["data"] == {}
    (tmp_path / "data/prepared").mkdir(parents=True)
    (tmp_path / "data/prepared/manifest.json").write_text('{"sources": {"scenes": {"train": 7}}}')
    told = description(params(seed=3))
    assert (told["recipe"], told["seed"]) == ("haplovl", 3)
    assert told["params"]["stage2"]["optimizer"]["learning_rate"] == 8e-4
    assert told["data"]["sources"] == {"scenes": {"train": 7}} and len(told["data"]["manifest_sha256"]) == 64
    assert not {"register", "compare", "probe"} & set(told["params"])
    # What an out of evaluate holds must not depend on what the stage does not depend on.
    assert description(params(seed=3, register__min_accuracy=0.1, probe__records=7)) == told


def test_runs_are_grouped_by_recipe_and_tagged_by_seed():
    assert grouping(params(recipe="llava", seed=4), "stage2") == {
        "group": "recipe-llava", "name": "llava-stage2-seed-4", "job_type": "stage2", "tags": ["stage2", "seed-4"],
    }  # fmt: skip
    long = grouping(params(recipe="x" * 300), "stage1")
    assert len(long["group"]) <= 128 and len(long["name"]) <= 128


def test_the_code_is_told_by_commit_and_state(tmp_path):
    assert code_version("abc") == {"sha256": "abc"}  # no repository

    def git(*words):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    clean = code_version()
    assert len(clean["git_commit"]) == 40 and clean["git_dirty"] is False
    (tmp_path / "file").write_text("2")
    assert code_version() == {**clean, "git_dirty": True}


def test_without_git_the_commit_is_left_out(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code_version("abc") == {"sha256": "abc"}


def test_no_secret_reaches_a_configuration(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("SOME_API_KEY", "yes")  # too short to be one
    config = {
        "params": {
            "sources": [{"files": ["https://me:pass@host/a.parquet", "https://host/b?x=1&X-Amz-Signature=beef&y=2"]}],
            "prepare": {"row_tokens": 128, "class_token": True},
            "hub": {"token": "mine", "api_key": "k", "id": "openai/clip"},
        },
        "note": "use hf_abcdefghij, yes",
    }
    hidden = without_secrets(config)
    assert hidden["params"]["sources"][0]["files"] == [
        "https://***@host/a.parquet", "https://host/b?x=1&X-Amz-Signature=***&y=2",
    ]  # fmt: skip
    assert hidden["params"]["prepare"] == {"row_tokens": 128, "class_token": True}
    assert hidden["params"]["hub"] == {"token": "***", "api_key": "***", "id": "openai/clip"}
    assert hidden["note"] == "use ***, yes"
    assert config["note"] == "use hf_abcdefghij, yes"


def test_the_settings_that_ship_hold_nothing_that_is_hidden():
    whole = description(params())
    assert without_secrets(whole) == whole


def test_a_switched_off_or_missing_wandb_costs_nothing(monkeypatch, capsys, tmp_path):
    def use(run):
        run.log({"step": 1})
        run.summarise({"accuracy": 1.0})
        run.table("t", ["a"], lambda wandb: pytest.fail("no row is made for nobody"))
        run.finish()
        assert not run.alive

    use(TrackedRun("p", "k", {}))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    use(TrackedRun("p", "k", {}))
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_what_fails_is_told_once_and_the_run_is_given_up(monkeypatch, capsys):
    class Broken:
        def log(self, *_, **__):
            raise OSError("disk\nfull on https://me:5ecre7@host")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    monkeypatch.setattr(tracking, "start_wandb", lambda *_, **__: Broken())
    run = TrackedRun("p", "k", {}, goes_on="all is well")
    for step in (1, 2):
        run.log({"step": step})
    run.finish()
    assert capsys.readouterr().out == "W&B could not log; all is well: disk full on https://***@host\n"
