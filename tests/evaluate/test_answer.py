"""Greedy answers, the blanked picture, and the sentences with which `haplovl ask` refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from haplovl import cli
from haplovl.evaluate.answer import ASK_TOKENS, _until_end, answer, blank, load_model, mean_colour, scored_answers

QUESTIONS = ["What colour is the 3?", "Where is the 2?", "Which picture has more digits?", "How much is one and one?"]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.effect_noise((32, 32), 40.0 * (i + 1)).convert("RGB").save(path)
    return paths


def run_ask(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "haplovl", "ask", *arguments], capture_output=True, text=True)


def test_a_blanked_picture_tells_nothing_but_its_size() -> None:
    dark, bright = Image.new("RGB", (40, 30), (1, 1, 1)), Image.new("RGB", (40, 30), (250, 250, 250))
    assert blank(dark, (122, 116, 104)).tobytes() == blank(bright, (122, 116, 104)).tobytes()
    assert blank(dark, (122, 116, 104)).size == (40, 30)


def test_padding_after_the_end_token_does_not_count() -> None:
    ids = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 9, 9, 9]])
    said = [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert _until_end(ids, 2).tolist() == said
    assert _until_end(ids, [2, 77]).tolist() == said
    assert _until_end(ids, None).all()


def test_answers_come_in_the_order_of_the_questions(tiny_model_dir: Path, pictures: list[Path]) -> None:
    model, processor = load_model(tiny_model_dir)
    model.train()
    images = [pictures[:1], pictures[1:2], pictures[:2], []]
    single = [answer(model, processor, [q], [i], 1, 4)[0] for q, i in zip(QUESTIONS, images, strict=True)]
    assert len(set(single)) > 1, "the model says the same everywhere: the order cannot be tested"
    for batch in (2, 3, 100):
        assert answer(model, processor, QUESTIONS, images, batch, 4) == single
    assert not model.training


def test_confidence_is_the_mean_log_probability_of_the_answer(tiny_model_dir: Path, pictures: list[Path]) -> None:
    model, processor = load_model(tiny_model_dir)
    images = [pictures[:1]] * 2
    progress: list[int] = []
    got = scored_answers(model, processor, QUESTIONS[:2], images, 1, 1, progress=progress.append)
    assert progress == [1, 2]
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[Image.open(pictures[0])]], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs.to(model.device)).logits[0, -1].float()
    logits[model.config.image_token_id] = -torch.inf
    assert got[0].confidence == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)


def test_the_mean_colour_becomes_zero(tiny_model_dir: Path) -> None:
    _, processor = load_model(tiny_model_dir)
    picture = Image.new("RGB", (32, 32), mean_colour(processor))
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    assert pixels.abs().max() < 0.01


def test_ask_answers(tiny_model_dir: Path, pictures: list[Path]) -> None:
    done = run_ask(
        QUESTIONS[2], "--image", str(pictures[0]), "--image", str(pictures[1]), "--model", str(tiny_model_dir)
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    model, processor = load_model(tiny_model_dir)
    assert done.stdout.strip() == answer(model, processor, QUESTIONS[2:3], [pictures[:2]], 1, ASK_TOKENS)[0]


def test_ask_refuses_with_one_sentence_on_stderr(tmp_path: Path) -> None:
    done = run_ask("What?", "--model", str(tmp_path / "none"))
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
            "the model in incomplete is incomplete: 1 missing weights (model.connector.bias",
        ),
        (("What?", "--model", "tiny", "--image", "none.png"), "none.png: the image is missing"),
        (("What?", "--model", "tiny", "--image", "text.png"), "text.png: not an image in a known format"),
        (("What is <image>?", "--model", "tiny"), "the model cannot take this question: the texts hold"),
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
