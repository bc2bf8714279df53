"""lmms-eval's output → metrics and answers of one benchmark."""

import json
from pathlib import Path

import pytest
from published_benchmarks import write_benchmark

from haplovl.errors import UserError
from haplovl.evaluate.harness.environment import Environment
from haplovl.evaluate.harness.folders import check_folder
from haplovl.evaluate.harness.results import Run, collect
from haplovl.evaluate.harness.tasks import find

FACTS = {"device": "cpu", "gpus": 0, "torch": "2.13.0", "transformers": "5.23.0"}


@pytest.fixture
def pope(tmp_path, tiny_model_dir, monkeypatch):
    """A run of POPE with three of its four questions answered, as lmms-eval writes it."""
    monkeypatch.chdir(tmp_path)
    write_benchmark("pope", tmp_path / "data")
    stock = tmp_path / "stock"
    for path in ("pope/pope.yaml", "pope/utils.py", "_task_utils/vqa.py"):
        (stock / path).parent.mkdir(parents=True, exist_ok=True)
        (stock / path).write_text(path)
    folder = check_folder(find(["pope"])[0], tmp_path / "data")
    output = tmp_path / "output/model"
    output.mkdir(parents=True)
    (tmp_path / "log.txt").write_text("loading\nhaplovl computes in bfloat16\n")
    results = {
        "results": {"pope_local": {"alias": "pope", "pope_accuracy,none": 0.5, "pope_accuracy_stderr,none": 0.1}},
        "configs": {"pope_local": {"generation_kwargs": {"max_new_tokens": 128, "until": ["\n\n"]}}},
        "date": "20261125",
        "config": {"model_args": f"pretrained={tmp_path}"},
    }
    (output / "20261125_results.json").write_text(json.dumps(results))

    def write(numbers):
        samples = [
            {
                "doc_id": number,
                "input": f"Question {number}?",
                "target": "yes",
                "resps": ["Yes."],
                "filtered_resps": ["yes"],
                "token_counts": [{"input_tokens": 30, "output_tokens": 2}],
                "pope_accuracy": {"question_id": str(number + 1), "score": 1.0, "prediction": "yes."},
            }
            for number in numbers
        ]
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (output / "20261125_samples_pope_local.jsonl").write_text(text)

    def run(limit=None):
        environment = Environment(Path("python"), stock)
        return Run(tiny_model_dir, "m" * 64, 2, limit, 16, environment, FACTS), folder, tmp_path / "output"

    return write, run, stock


def test_metrics_say_what_was_run_and_hold_no_paths_or_dates(pope, tmp_path) -> None:
    write, run, _ = pope
    write([2, 0, 3, 1])  # as several processes leave them
    metrics = collect(*run())
    written = (tmp_path / "metrics/benchmarks/pope.json").read_text()
    assert json.loads(written) == metrics
    assert metrics["score"] == 0.5 and metrics["metric"] == "pope_accuracy"
    assert metrics["results"] == {"pope_accuracy,none": 0.5}
    assert (metrics["questions"], metrics["published_questions"], metrics["limit"]) == (4, 9000, None)
    assert metrics["harness"]["version"] == "0.7.3"
    assert metrics["generation"] == {"max_new_tokens": 128, "until": ["\n\n"]}
    assert {len(metrics[f"{name}_sha256"]) for name in ("task", "data", "model")} == {64}
    assert metrics["prompt"]["first"] == "<|user|><image>\nQuestion 0?<|assistant|>"
    assert (metrics["device"], metrics["precision"], metrics["processes"]) == ("cpu", "bfloat16", 2)
    answers = (tmp_path / "reports/benchmarks/pope.jsonl").read_text()
    assert str(tmp_path) not in written + answers and "20261125" not in written + answers
    lines = [json.loads(line) for line in answers.splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    first = lines[0]
    assert first["record"]["question"] == "Is there a square in the image?" and "image" not in first["record"]
    assert (first["prompt"], first["prediction"], first["filtered"]) == ("Question 0?", "Yes.", "yes")
    assert first["judged"] == {"score": 1.0, "prediction": "yes."}, "what the record says is not said again"
    assert (first["tokens_in"], first["tokens_out"]) == (30, 2)


def test_a_part_of_the_questions_takes_no_full_result_s_place(pope, tmp_path) -> None:
    write, run, _ = pope
    write([0, 1])
    assert collect(*run(limit=2))["limit"] == 2
    assert [path.name for path in (tmp_path / "metrics/benchmarks").iterdir()] == ["pope.first-2.json"]
    assert [path.name for path in (tmp_path / "reports/benchmarks").iterdir()] == ["pope.first-2.jsonl"]


@pytest.mark.parametrize("numbers", [[0, 1, 2], [0, 1, 2, 2], []])
def test_a_question_that_was_lost_or_asked_twice_is_refused(pope, tmp_path, numbers) -> None:
    write, run, _ = pope
    write(numbers)
    with pytest.raises(UserError, match=f"answered {len(numbers)} questions of POPE, not 4|answered 4 questions"):
        collect(*run())
    assert not (tmp_path / "metrics").exists()


def test_the_task_s_hash_follows_its_files(pope) -> None:
    write, run, stock = pope
    write([0, 1, 2, 3])
    before = collect(*run())["task_sha256"]
    (stock / "pope/notes.txt").write_text("no part of the task")
    assert collect(*run())["task_sha256"] == before
    (stock / "_task_utils/vqa.py").write_text("changed")
    assert collect(*run())["task_sha256"] != before
