"""Greedy answers, their confidence, and the blanked picture."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from haplovl.evaluate.answer import _until_end, answer, blank, load_model, scored_answers

QUESTIONS = ["What colour is the 3?", "Where is the 2?", "Which picture has more digits?", "How much is one and one?"]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.effect_noise((32, 32), 40.0 * (i + 1)).convert("RGB").save(path)
    return paths


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
    logits[[model.config.image_token_id, model.config.video_token_id]] = -torch.inf
    assert got[0].confidence == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)


def test_the_mean_colour_becomes_zero(tiny_model_dir: Path) -> None:
    _, processor = load_model(tiny_model_dir)
    picture = Image.new("RGB", (32, 32), processor.image_processor.mean_colour)
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    assert pixels.abs().max() < 0.01


def test_a_model_folder_from_before_answers_no_placeholders_either(tiny_model_dir: Path, tmp_path: Path) -> None:
    old = shutil.copytree(tiny_model_dir, tmp_path / "old")
    settings = json.loads((old / "generation_config.json").read_text())
    expected = settings.pop("suppress_tokens")
    (old / "generation_config.json").write_text(json.dumps(settings))
    model, _ = load_model(old)
    assert model.generation_config.suppress_tokens == expected
    assert expected == [model.config.image_token_id, model.config.video_token_id]
