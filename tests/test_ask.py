"""`haplovl ask`: the answer for people, the JSON object for scripts, and the sentences with which it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from haplovl import cli
from haplovl.evaluate.answer import load_model, scored_answers
from haplovl.terminal import printable

QUESTION = "Which picture has more digits?"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return paths


def run_ask(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "haplovl", "ask", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_ask_answers_as_the_evaluation_does(tiny_model_dir: Path, pictures: list[Path]) -> None:
    done = run_ask(QUESTION, "--image", pictures[0], "--image", pictures[1], "--model", tiny_model_dir)
    assert (done.returncode, done.stderr) == (0, "")
    model, processor = load_model(tiny_model_dir)
    [expected] = scored_answers(model, processor, [QUESTION], [pictures], 1, 64)
    assert done.stdout == printable(expected.text) + "\n"


def test_ask_gives_scripts_one_json_object(tiny_model_dir: Path, pictures: list[Path], video: Path) -> None:
    options = ["--image", pictures[0], "--video", video, "--model", tiny_model_dir, "--max-new-tokens", 5, "--json"]
    result = CliRunner().invoke(cli.app, ["ask", "-", *map(str, options)], input=f"{QUESTION}\n")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    _, processor = load_model(tiny_model_dir)
    images = processor.image_tokens(32, 32)
    assert 0 < found.pop("seconds") < 60
    assert 0 < found.pop("tokens_in") - images - processor.video_tokens(8) < 40
    assert found.pop("confidence") < 0 and isinstance(found.pop("answer"), str)
    assert found == {
        "question": QUESTION,
        "images": [str(pictures[0])],
        "videos": [str(video)],
        "model": str(tiny_model_dir),
        "tokens_out": 5,
    }


def test_the_confidence_in_json_is_that_of_the_evaluation(tiny_model_dir: Path, pictures: list[Path]) -> None:
    options = ["--image", pictures[0], "--model", tiny_model_dir, "--max-new-tokens", 5, "--json"]
    found = json.loads(CliRunner().invoke(cli.app, ["ask", QUESTION, *map(str, options)]).stdout)
    [expected] = scored_answers(*load_model(tiny_model_dir), [QUESTION], [pictures[:1]], 1, 5)
    assert (found["answer"], found["confidence"]) == (expected.text, pytest.approx(expected.confidence, abs=1e-3))


def test_an_error_is_one_sentence_on_stderr_in_json_mode_too(tmp_path: Path) -> None:
    done = run_ask("What?", "--model", tmp_path / "none", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no model folder") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("What?", "--model", "empty"), "empty is no model: it holds no readable config.json"),
        (("What?", "--model", "other"), "other is not a HaploVL model: its config.json names the type 'llama'"),
        (("What?", "--model", "list"), "list is not a HaploVL model: its config.json names the type None"),
        (("What?", "--model", "weightless"), "the model in weightless cannot be loaded: "),
        (("What?", "--model", "truncated"), "the model in truncated cannot be loaded: "),
        (
            ("What?", "--model", "incomplete"),
            "the model in incomplete cannot be loaded: the weights in incomplete ",
        ),
        (("What?", "--model", "tiny", "--image", "none.png"), "none.png: the image is missing"),
        (("What?", "--model", "tiny", "--image", "text.png"), "text.png: not an image in a known format"),
        (("What?", "--model", "tiny", "--video", "none.mp4"), "none.mp4: the video is missing"),
        (("What?", "--model", "tiny", "--video", "text.png"), "text.png: no video, or truncated or damaged: "),
        (("What is <image>?", "--model", "tiny"), "'<image>' means something special to this model"),
        (("Is it <|end|>?", "--model", "tiny"), "'<|end|>' means something special to this model"),
        (("word " * 3000, "--model", "tiny"), "there are "),
        ((" ", "--model", "tiny"), "the question is empty"),
    ],
)
def test_ask_refuses(arguments: tuple[str, ...], message: str, models: Path, monkeypatch) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", ["haplovl", "ask", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert str(stopped.value.code).startswith(f"error: {message}")
    assert "\n" not in str(stopped.value.code)


@pytest.fixture
def models(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A folder with one good model, `tiny`, several that are none, and a picture that is none."""
    shutil.copytree(tiny_model_dir, tmp_path / "tiny")
    shutil.copytree(tiny_model_dir, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tiny_model_dir, tmp_path / "truncated")
    weights = tmp_path / "truncated/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(tiny_model_dir, tmp_path / "incomplete")
    tensors = load_file(tmp_path / "tiny/model.safetensors")
    del tensors["model.connector.bias"]
    save_file(tensors, tmp_path / "incomplete/model.safetensors", metadata={"format": "pt"})
    for name, config in {"empty": None, "other": {"model_type": "llama"}, "list": []}.items():
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path
