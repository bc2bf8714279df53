"""`haplovl harness` refuses in one sentence what would end in a wrong number, before anything runs."""

import sys

import pytest
from published_benchmarks import write_benchmark

from haplovl import cli
from haplovl.evaluate.harness.environment import variables


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Runs the command in an empty folder; gives what it says on its way out."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["haplovl", "harness", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        message = str(stopped.value.code)
        assert message.startswith("error: ") and "\n" not in message
        assert not (tmp_path / "metrics").exists() and not (tmp_path / "runs").exists()
        return message

    return run


def fake_environment(folder, version):
    packages = folder / "lib/python3.11/site-packages"
    (packages / f"lmms_eval-{version}.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(sys.executable)


def test_an_unknown_benchmark(refusal) -> None:
    assert "there is no benchmark 'mme'" in refusal("mme", "--data", "data")


def test_no_model(refusal, tmp_path) -> None:
    assert "there is no model folder models/stage2" in refusal("pope", "--data", "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    assert "other is not a HaploVL model" in refusal("pope", "--data", "data", "--model", "other")


def test_no_data(refusal, tiny_model_dir, tmp_path) -> None:
    write_benchmark("gqa", tmp_path / "data")
    fake_environment(tmp_path / ".venv-eval", "0.7.3")
    message = refusal("gqa", "pope", "--data", "data", "--model", tiny_model_dir)
    assert message == "error: data has no folder pope; put the data set lmms-lab/POPE there"


def test_a_limit_that_cuts_a_pair(refusal, tiny_model_dir, tmp_path) -> None:
    for name in ("pope", "mmvp"):
        write_benchmark(name, tmp_path / "data")
    fake_environment(tmp_path / ".venv-eval", "0.7.3")
    message = refusal("pope", "mmvp", "--limit", 3, "--data", "data", "--model", tiny_model_dir)
    assert message == "error: --limit 3 cuts a pair of MMVP; the nearest limits without a cut are 2 and 4 (all)"


def test_no_environment(refusal, tiny_model_dir) -> None:
    message = refusal("pope", "--data", "data", "--model", tiny_model_dir)
    assert message == "error: there is no .venv-eval with lmms-eval 0.7.3; run 'make eval-env'"


def test_another_version_of_the_harness(refusal, tiny_model_dir, tmp_path) -> None:
    fake_environment(tmp_path / ".venv-eval", "0.7.2")
    message = refusal("pope", "--data", "data", "--model", tiny_model_dir)
    assert message == "error: .venv-eval holds lmms-eval 0.7.2, but 0.7.3 is needed; run 'make eval-env'"


def test_an_environment_that_cannot_load_the_project(refusal, tiny_model_dir, tmp_path) -> None:
    write_benchmark("pope", tmp_path / "data")
    fake_environment(tmp_path / ".venv-eval", "0.7.3")
    python = tmp_path / ".venv-eval/bin/python"
    python.unlink()
    python.write_text('#!/bin/sh\necho "ImportError: no torch" >&2\nexit 1\n')
    python.chmod(0o755)
    message = refusal("pope", "--data", "data", "--model", tiny_model_dir)
    assert "cannot load this project and its libraries (ImportError: no torch); run 'make eval-env'" in message


def test_what_others_set_does_not_reach_the_harness(monkeypatch) -> None:
    for name in ("NUM_IMAGE", "OPENAI_API_KEY", "HF_TOKEN", "LMMS_EVAL_PLUGINS", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = variables({"OWN": "1"})
    assert found["HF_HUB_OFFLINE"] == found["HF_DATASETS_OFFLINE"] == found["OWN"] == "1"
    assert not {"NUM_IMAGE", "OPENAI_API_KEY", "HF_TOKEN", "LMMS_EVAL_PLUGINS", "WANDB_API_KEY"} & set(found)
    assert "PATH" in found
