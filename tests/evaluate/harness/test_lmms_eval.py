"""All eleven benchmarks through the real lmms-eval, offline; needs .venv-eval (`make test-harness`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_word_model import save_one_word_model
from published_benchmarks import PUBLISHED, write_benchmark

from haplovl import cli
from haplovl.errors import UserError
from haplovl.evaluate.answer import load_model
from haplovl.evaluate.benchmarks import score_records
from haplovl.evaluate.harness.answering import Question, log_likelihoods
from haplovl.evaluate.harness.environment import find_environment, variables
from haplovl.evaluate.harness.folders import check_folder
from haplovl.evaluate.harness.run import run_harness
from haplovl.evaluate.harness.tasks import NAMES, find, task_yaml
from haplovl.model.inherit import inherit
from haplovl.pictures import decode_bytes

pytestmark = [pytest.mark.harness, pytest.mark.timeout(1800)]

SAYS_YES = ("gqa", "vqav2", "pope", "realworldqa")
EXPECTED = {
    # Says "Yes" to everything.
    "gqa": 2 / 4,
    "vqav2": (1.0 + (8 * 2 / 3 + 2 * 1 / 3) / 10 + 0.0) / 3,
    "pope": 2 / 4,
    "realworldqa": 1 / 3,
    # Says "A" to everything.
    "scienceqa_img": 2 / 3,
    "ai2d": 2 / 3,
    "mmbench_en_dev": 2 / 3,
    "mmmu_val": 2 / 4,
    "mmstar": (1.0 + 1 / 2 + 1.0) / 3,
    "seedbench_img": 2 / 3,
    "mmvp": 1 / 2,
}
FIRST_PROMPTS = {
    "gqa": "Is the square red?\nAnswer the question using a single word or phrase.",
    "ai2d": "What does the diagram show?\nA. a square\nB. a leaf\nC. a cell\nD. a root\n"
    "Answer with the option's letter from the given choices directly.",
    "mmmu_val": "<image 1> What is drawn?\nA. a square\nB. a star\nC. a tree\nD. a face\n\n"
    "Answer with the option's letter from the given choices directly.",
    "seedbench_img": "Which colour has square 0?\nA. a red\nB. b green\nC. c blue\nD. d orange\n"
    "Answer with the option's letter from the given choices directly.",
}


@pytest.fixture(scope="module")
def project(request, tmp_path_factory, vision, language, model_settings, processor):
    """A folder with the environment, data of all eleven, and two models that say one word each."""
    environment = request.config.rootpath / ".venv-eval"
    if not environment.exists():
        pytest.skip("no .venv-eval; run 'make test-harness'")
    folder = tmp_path_factory.mktemp("project")
    (folder / ".venv-eval").symlink_to(environment)
    for name in PUBLISHED:
        write_benchmark(name, folder / "data")
    vocabulary = (processor.image_token_id, len(processor.tokenizer), processor.video_token_id)
    for word in ("Yes", "A"):
        torch.manual_seed(3)
        model = inherit(vision, language, model_settings, *vocabulary)
        save_one_word_model(model, processor, word, folder / word)
    torch.manual_seed(3)
    inherit(vision, language, model_settings, *vocabulary).save_pretrained(folder / "random")
    processor.save_pretrained(folder / "random")
    return folder


@pytest.fixture(autouse=True)
def inside(project, monkeypatch):
    monkeypatch.chdir(project)


@pytest.fixture(scope="module")
def everything(project):
    """The command on all eleven, as a user would call it."""
    before = Path.cwd()
    os.chdir(project)
    try:
        for word in ("Yes", "A"):
            names = [name for name in NAMES if (name in SAYS_YES) == (word == "Yes")]
            sys.argv = ["haplovl", "harness", *names, "--data", "data", "--model", word, "--batch", "3"]
            with pytest.raises(SystemExit) as left:
                cli.main()
            assert left.value.code in (0, None)
    finally:
        os.chdir(before)


def answers(name):
    return [json.loads(line) for line in Path(f"reports/benchmarks/{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_the_figure_is_the_one_that_is_due(everything, project, name) -> None:
    metrics = json.loads(Path(f"metrics/benchmarks/{name}.json").read_text())
    lines = answers(name)
    word = "Yes" if name in SAYS_YES else "A"
    assert {line["prediction"] for line in lines} == {word}
    assert metrics["score"] == pytest.approx(EXPECTED[name], abs=1e-6)
    assert metrics["questions"] == len(lines) == (3 if name == "seedbench_img" else len(PUBLISHED[name]()[0]))
    assert metrics["data_sha256"] == check_folder(find([name])[0], Path("data")).sha256
    assert metrics["device"] == "cpu" and metrics["precision"] == "float32"
    assert metrics["harness"]["version"] == "0.7.3"
    own = score_records(name, lines)
    assert own["headline"]["value"] == pytest.approx(metrics["score"], abs=1e-6), "our scorer and lmms-eval differ"
    if name in FIRST_PROMPTS:
        assert lines[0]["prompt"] == FIRST_PROMPTS[name]
    everything_written = json.dumps(metrics) + json.dumps(lines)
    assert str(project) not in everything_written and os.sep + "home" not in everything_written


def test_two_processes_share_the_questions_and_a_limit_is_told() -> None:
    run_harness(["pope"], Path("data"), Path("Yes"), processes=2, limit=3)
    metrics = json.loads(Path("metrics/benchmarks/pope.first-3.json").read_text())
    assert metrics["results"]["pope_f1_score,none"] == pytest.approx(4 / 5)
    assert (metrics["questions"], metrics["limit"], metrics["processes"]) == (3, 3, 2)
    assert metrics["results"]["pope_accuracy,none"] == pytest.approx(2 / 3)
    lines = answers("pope.first-3")
    assert [line["number"] for line in lines] == [0, 1, 2]
    assert {line["prediction"] for line in lines} == {"Yes"}
    for line, row in zip(lines, PUBLISHED["pope"]()[0], strict=False):
        assert line["prompt"].startswith(row["question"]) and line["record"]["id"] == row["id"]


def test_a_run_that_fails_says_why_and_leaves_no_number() -> None:
    config = json.loads(Path("A/config.json").read_text())
    Path("short").mkdir()
    for path in Path("A").iterdir():
        Path("short", path.name).write_bytes(path.read_bytes())
    config["text_config"]["max_position_embeddings"] = 20
    Path("short/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lmms-eval failed on AI2D: a prompt has \d+ tokens .* runs/harness/ai2d/log"):
        run_harness(["ai2d"], Path("data"), Path("short"), limit=1)
    assert not Path("metrics/benchmarks/ai2d.first-1.json").exists()


def test_likelihood_tasks_choose_the_likeliest_answer(project) -> None:
    """lmms-eval 0.7.3 takes the choice with the smallest value: the adapter must turn log-likelihoods around."""
    environment, folder = find_environment(), check_folder(find(["seedbench_img"])[0], Path("data"))
    text = task_yaml(folder.task, environment.tasks, [path.absolute() for path in folder.files])
    text = text.replace("seedbench.yaml", "seedbench_ppl.yaml").replace("seedbench_img_local", "likelihood")
    Path("tasks").mkdir()
    Path("tasks/likelihood.yaml").write_text(text)
    command = [environment.python, "-m", "lmms_eval", "--model", "haplovl", "--model_args", "pretrained=random"]
    command += [
        "--tasks",
        "likelihood",
        "--include_path",
        "tasks",
        "--output_path",
        "likelihood",
        "--verbosity",
        "DEBUG",
    ]
    done = subprocess.run(command, env=variables({"ACCELERATE_USE_CPU": "true"}), capture_output=True, text=True)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = Path("likelihood").rglob("*_results.json")
    found = json.loads(path.read_text())["results"]["likelihood"]["acc,none"]

    model, processor = load_model(Path("random"))
    rows = [row for row in PUBLISHED["seedbench_img"]()[0] if row["data_type"] == "image"]
    right = 0
    for row in rows:
        picture = decode_bytes(row["image"][0]["bytes"])
        choices = [row[f"choice_{letter}"] for letter in "abcd"]
        question = Question(f"{row['question']} Answer :", lambda picture=picture: [picture], {})
        values = [value for value, _ in log_likelihoods(model, processor, [question] * 4, choices, 4)]
        right += "ABCD"[values.index(max(values))] == row["answer"]
    assert found == pytest.approx(right / len(rows))
