"""`haplovl benchmark` on a tiny untrained model: all eleven from local stand-ins, and its file scored again."""

import json
import sys

import pytest
from golden_scores import golden
from small_benchmarks import write_json_folder, write_parquet_folder

from haplovl import cli
from haplovl.evaluate.answer import load_model, scored_answers
from haplovl.evaluate.benchmarks import ask, find, names, score_file
from haplovl.files import sha256_of_folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, tiny_model_dir):
    """Runs the command in an empty folder; returns what it printed, or the error's sentence."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        chosen = () if "--model" in arguments else ("--model", tiny_model_dir)
        monkeypatch.setattr(sys, "argv", ["haplovl", "benchmark", *map(str, (*arguments, *chosen))])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return str(end.value.code) if end.value.code else capsys.readouterr().out

    return command


@pytest.mark.parametrize("name", names())
def test_every_benchmark_is_asked_and_scored(name, run, tmp_path, tiny_model_dir):
    write_parquet_folder(name, tmp_path / "data", 4)
    shown = run(name, "data", "--max-new-tokens", 3, "--batch", 3)
    path = tmp_path / "reports/benchmarks" / f"{name}.json"
    result = json.loads(path.read_text())
    assert find(name).title in shown and str(path.relative_to(tmp_path)) in shown
    assert [record["prompt"] for record in result["records"]] == [
        item["prompt"]["lmms_eval"] for item in golden(name)["records"][:4]
    ]
    assert result["n"] == 4 and result["max_new_tokens"] == 3 and result["prompts"] == "lmms-eval 0.7.3"
    assert result["model"]["sha256"] == sha256_of_folder(tiny_model_dir)
    again = score_file(name, path)
    assert again["scores"] == [record["score"] for record in result["records"]]
    assert again["aggregate"] == result["aggregate"]


def test_the_answers_are_those_of_the_model_whatever_the_batch(run, tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(ask, "ROWS_AT_A_TIME", 3)
    folder = write_json_folder("pope", tmp_path / "data", 8)
    run("pope", folder, "--max-new-tokens", 4, "--batch", 2, "--output", "two.json")
    run("pope", folder / "pope.json", "--max-new-tokens", 4, "--batch", 1, "--output", "one.json")
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    model, processor = load_model(tiny_model_dir)
    prompts = [record["prompt"] for record in two["records"]]
    images = [[folder / f"images/{i}_0.png"] for i in range(8)]
    said = [answer.text for answer in scored_answers(model, processor, prompts, images, 1, 4)]
    assert [record["prediction"] for record in two["records"]] == said
    assert [record["prediction"] for record in one["records"]] == said
    assert len(set(said)) > 1, "the model says the same everywhere: the order cannot be tested"
    assert one["data"]["sha256"] == two["data"]["sha256"]


def test_the_same_run_writes_the_same_bytes_and_a_limit_other_data(run, tmp_path):
    write_json_folder("gqa", tmp_path / "data", 5)
    run("gqa", "data", "--max-new-tokens", 2, "--output", "a.json")
    run("gqa", "data", "--max-new-tokens", 2, "--output", "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    run("gqa", "data", "--max-new-tokens", 2, "--limit", 2, "--output", "c.json")
    whole, part = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "c.json"))
    assert part["n"] == 2 and part["data"]["limit"] == 2
    assert part["data"]["sha256"] != whole["data"]["sha256"]


def test_a_part_of_the_questions_takes_no_full_result_s_place(run, tmp_path):
    write_json_folder("gqa", tmp_path / "data", 3)
    shown = run("gqa", "data", "--max-new-tokens", 2, "--limit", 2)
    assert [path.name for path in (tmp_path / "reports/benchmarks").iterdir()] == ["gqa.first-2.json"]
    assert "gqa.first-2.json" in shown and "over 2 answers (12578 questions are published)" in shown


def test_a_model_in_training_is_evaluated_without_files(model, processor, tmp_path):
    write_json_folder("pope", tmp_path / "data", 3)
    result = ask.evaluate_benchmark(model, processor, "pope", tmp_path / "data", limit=2)
    assert result["n"] == len(result["records"]) == 2
    assert set(result["headline"]) == {"metric", "value"}


def test_bad_data_and_models_are_refused(run, tmp_path):
    assert "did you mean pope?" in run("popes", "data")
    assert "there is no file or folder data" in run("pope", "data")
    write_json_folder("gqa", tmp_path / "data", 2)
    assert "(gqa)" in run("pope", "data")
    assert "--output names a file to write, and data is a folder" in run("gqa", "data", "--output", "data")
    (tmp_path / "file").write_text("")
    assert "file is no folder" in run("gqa", "data", "--output", "file/gqa.json")
    assert "there is no model folder none" in run("gqa", "data", "--model", "none")
