"""Greedy answers in batches are those of every question alone; their confidence, and the blanked picture."""

import copy
import json
import shutil
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from noise import noise
from PIL import Image

from haplovl.data.conversation import TEMPLATES
from haplovl.errors import UserError
from haplovl.evaluate.answer import Answer, answer, blank, load_model, scored_answers
from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.model.inherit import inherit
from haplovl.settings import ModelSettings

QUESTIONS = ["What colour is the 3?", "Where is the 2?", "Which picture has more digits?", "How much is one and one?"]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        noise(32, 32, i).save(path)
    return paths


def test_a_blanked_picture_tells_nothing_but_its_size() -> None:
    made = blank((40, 30), (122, 116, 104))
    assert made.size == (40, 30)
    assert made.getcolors() == [(40 * 30, (122, 116, 104))]


def alone(model, processor, question: str, pictures: list[Path], max_new_tokens: int) -> Answer:
    """The definition: one prompt through processor and `generate`, nothing shared and nothing padded."""
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    opened = [Image.open(path) for path in pictures]
    inputs = processor(text=[text], images=[opened] if opened else None, return_tensors="pt")
    out = model.generate(
        **inputs.to(model.device, model.dtype), max_new_tokens=max_new_tokens, do_sample=False, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    said = processor.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    likeliest = [scores[0].float().log_softmax(-1).max().item() for scores in out.scores]
    return Answer(said.strip(), sum(likeliest) / len(likeliest))


def exam(pictures: list[Path]) -> tuple[list[str], list[list[Path]]]:
    """Questions of many lengths: about one picture, about two, about none, about the same ones, and some twice."""
    shown = [[pictures[0]], [pictures[1]], [pictures[0], pictures[1]], [], [pictures[1], pictures[0]], [pictures[2]]]
    endings = ["?", " at the top left, and what is below it?", " in it? Name them all, one after the other, please."]
    asked = [(f"{word}{ending}", own) for own in shown for word in ("Where", "What colour is") for ending in endings]
    asked = asked[::2] + asked[1::2] + asked[:7]
    return [question for question, _ in asked], [own for _, own in asked]


def assert_as_alone(
    model, processor, pictures: list[Path], max_new_tokens: int, apart: float = 1e-4, **options
) -> list[Answer]:
    questions, images = exam(pictures)
    expected = [alone(model, processor, q, own, max_new_tokens) for q, own in zip(questions, images, strict=True)]
    assert len({item.text for item in expected}) > 5, "the model says the same nearly everywhere: nothing is tested"
    for batch in (1, 4, 100):
        got = scored_answers(model, processor, questions, images, batch, max_new_tokens, **options)
        assert [item.text for item in got] == [item.text for item in expected]
        confidences = [item.confidence for item in got]
        assert confidences == pytest.approx([item.confidence for item in expected], abs=apart)
    return expected


@pytest.fixture
def tiny(tiny_model_dir: Path):
    return load_model(tiny_model_dir)


def test_a_batch_answers_as_every_question_alone(tiny, pictures: list[Path]) -> None:
    assert_as_alone(*tiny, pictures, max_new_tokens=6)


@pytest.mark.parametrize("increments", [(0.0, 1.0), (0.25, 0.5), (1.0, 0.0)])
def test_whatever_the_rotary_increments_of_images(
    vision, language, processor, pictures: list[Path], increments: tuple[float, float]
) -> None:
    pre, post = increments
    settings = ModelSettings(image_size=32, pre_rotary_increment=pre, post_rotary_increment=post)
    torch.manual_seed(3)
    vocabulary = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    model = inherit(vision, language, settings, *vocabulary).eval()
    assert_as_alone(model, processor, pictures, max_new_tokens=3, batch_tokens=150)


@pytest.mark.parametrize(
    "design",
    [
        {"fusion": "tower"},
        {"fusion": "patches", "patch_size": 8},
        {"fusion": "patches", "patch_size": 8, "post_mask": "causal"},
        {"text_path": "residual"},
        {"text_path": "gated"},
        {"text_path": "direct"},
    ],
    ids=lambda design: " ".join(map(str, design.values())),
)
def test_other_designs(vision, language, tokenizer, pictures: list[Path], design: dict[str, Any]) -> None:
    settings = ModelSettings(image_size=32, **design)
    tiling = "native" if settings.fusion == "patches" else "haplovl"
    images = HaploImageProcessor(32, 8, tiling=tiling)
    template = TEMPLATES["plain"].jinja()
    processor = HaploProcessor(images, tokenizer, template, settings.class_token, settings.image_newline)
    torch.manual_seed(3)
    vocabulary = processor.image_token_id, len(tokenizer), processor.video_token_id
    model = inherit(vision, copy.deepcopy(language), settings, *vocabulary).eval()
    assert_as_alone(model, processor, pictures, max_new_tokens=4)


def test_pictures_of_several_tiles(tiny, tmp_path: Path) -> None:
    model, processor = tiny
    processor.image_processor.max_tiles = 4
    sizes = [(32, 32), (64, 30), (60, 64)]
    paths = [tmp_path / f"{width}x{height}.png" for width, height in sizes]
    for path, size in zip(paths, sizes, strict=True):
        noise(*size).save(path)
    assert len({processor.image_tokens(height, width) for width, height in sizes}) == 3
    assert_as_alone(model, processor, paths, max_new_tokens=4)


def test_short_and_long_answers_end_for_themselves(tiny, pictures: list[Path]) -> None:
    model, processor = tiny
    questions, images = exam(pictures)
    tokenizer = processor.tokenizer
    said = [alone(model, processor, q, own, 9).text for q, own in zip(questions, images, strict=True)]
    words = [tokenizer(text)["input_ids"][:9] for text in said]
    # As if the model had learned to end: with the token that ends the most diverse numbers of answers.
    firsts = {word: {row.index(word) for row in words if word in row} for row in words for word in row}
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, max(firsts, key=lambda word: len(firsts[word]))]
    calls = calls_of(model)
    expected = assert_as_alone(model, processor, pictures, max_new_tokens=9)
    assert len({len(tokenizer(item.text)["input_ids"]) for item in expected}) > 2
    before_and_after = [(old[0], new[0]) for old, new in pairwise(calls) if new[1] == 1 and old[0] > new[0]]
    assert before_and_after, "nobody left a batch before it was done"
    assert all(2 * after <= before for before, after in before_and_after)


def test_penalties_of_the_generation_config_hold_in_batches(tiny, pictures: list[Path]) -> None:
    model, processor = tiny
    free = answer(model, processor, *exam(pictures), 100, 6)
    model.generation_config.repetition_penalty = 5.0
    # Padding counts as said, as in transformers: of 300 tokens the padding's own is then likelier or less likely by a
    # thousandth, which moves the logarithm of all others' probabilities.
    penalised = assert_as_alone(model, processor, pictures, max_new_tokens=6, apart=2e-3)
    assert [item.text for item in penalised] != free


def calls_of(model) -> list[tuple[int, int, int]]:
    """Notes (rows, new tokens, tokens with the cached ones) of every forward pass from now on."""
    calls: list[tuple[int, int, int]] = []

    def note(module, arguments, options):
        cache, (rows, length) = options.get("past_key_values"), options["input_ids"].shape
        calls.append((rows, length, length + (0 if cache is None else int(cache.get_seq_length()))))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def test_nothing_is_computed_after_the_last_answer_has_ended(tiny, pictures: list[Path]) -> None:
    model, processor = tiny
    model.generation_config.eos_token_id = list(range(len(processor.tokenizer)))  # whatever it says is the end
    calls = calls_of(model)
    scored_answers(model, processor, ["Where is it?", "Where?"], [pictures[:1]] * 2, 8, 200)
    assert [rows for rows, _, _ in calls] == [1, 2], "one pass over the picture, one over the words of both questions"


def test_a_picture_is_opened_and_embedded_once_however_many_questions(tiny, pictures: list[Path]) -> None:
    model, processor = tiny
    questions = [f"What is in row {number}?" for number in range(10)] + ["What is in row 3?"] * 5
    opened, embedded = [], []

    def open_picture(path: Path) -> Image.Image:
        opened.append(path)
        return Image.open(path)

    hook = model.model.image_embedding.register_forward_pre_hook(lambda _, given: embedded.append(len(given[0])))
    calls = calls_of(model)
    images = [[pictures[number % 2]] for number in range(10)] + [[pictures[1]]] * 5
    got = scored_answers(model, processor, questions, images, 4, 2, open_picture=open_picture)
    hook.remove()
    assert sorted(opened) == sorted(pictures[:2])
    assert embedded == [2]
    assert got[10:] == [got[3]] * 5
    prefills = [rows for rows, length, total in calls if 1 < length < total]
    assert sum(prefills) == 10, "equal questions about one picture are asked once"


def test_pictures_are_let_go_and_batches_stay_within_their_limits(tiny, pictures: list[Path]) -> None:
    model, processor = tiny
    live, most = [0], [0]

    def open_picture(number: int) -> Image.Image:
        image = noise(32, 32, number)
        live[0] += 1
        most[0] = max(most[0], live[0])
        weakref.finalize(image, lambda: live.__setitem__(0, live[0] - 1))
        return image

    calls = calls_of(model)
    questions = [f"{'Where ' * (number % 5)}is number {number}?" for number in range(30)]
    images = [[number, number + 100] for number in range(30)]
    progress: list[int] = []
    scored_answers(
        model, processor, questions, images, 8, 3, open_picture=open_picture, progress=progress.append,
        batch_tokens=400,
    )  # fmt: skip
    assert most[0] <= 4, "the pictures of one question, and those of the one before"
    assert max(rows for rows, _, _ in calls) > 1
    assert all(rows <= 8 and (rows == 1 or rows * total <= 400) for rows, _, total in calls)
    assert progress == sorted(progress) and len(progress) > 3 and progress[-1] == 30


def test_prompts_that_fit_the_context_only_alone_are_asked_alone(tiny, pictures: list[Path]) -> None:
    model, processor = tiny
    questions, images = ["Where?", "Where? " * 8], [pictures[:2], []]
    images.append(pictures[:1])
    questions.append("Where? " * 4)
    rows = [alone_length(processor, q, own) for q, own in zip(questions, images, strict=True)]
    model.config.text_config.max_position_embeddings = max(rows) + 2
    for limit in (2, 12):  # the answer of the longest ends where the context does
        expected = [alone(model, processor, q, own, limit).text for q, own in zip(questions, images, strict=True)]
        assert answer(model, processor, questions, images, 8, limit) == expected


def alone_length(processor, question: str, pictures: list[Path]) -> int:
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    opened = [Image.open(path) for path in pictures]
    return len(processor(text=[text], images=[opened] if opened else None)["input_ids"][0])


def test_a_cpu_without_bfloat16_answers_in_float32(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("haplovl.model.packed.can_pack", lambda dtype: dtype == torch.float32)
    assert load_model(tiny_model_dir, "bfloat16")[0].dtype == torch.float32
    monkeypatch.setattr("haplovl.model.packed.can_pack", lambda dtype: False)
    assert load_model(tiny_model_dir)[0].dtype == torch.float32


@pytest.mark.parametrize("count", [0, 2])
def test_a_question_longer_than_the_context_is_named(tiny, pictures: list[Path], count: int) -> None:
    model, processor = tiny
    model.config.text_config.max_position_embeddings = 60
    question = "Where is the 3 and where is the 7? " * 4
    tokens = alone_length(processor, question, pictures[:count])
    with pytest.raises(
        UserError, match=f"'Where is the 3 .*' has {tokens} tokens.*more than the model's context of 60"
    ):
        answer(model, processor, ["Where?", question], [pictures[:1], pictures[:count]], 8, 4)


@pytest.mark.parametrize("word", ["<image>", "<video>"])
def test_placeholders_are_no_words_of_a_question(tiny, pictures: list[Path], word: str) -> None:
    with pytest.raises(UserError, match=f"the question 'What is {word}' holds .* cannot be words of a question"):
        answer(*tiny, ["Where?", f"What is {word}"], [pictures[:1], pictures[:1]], 8, 4)


def test_no_questions_have_no_answers(tiny) -> None:
    assert scored_answers(*tiny, [], [], 8, 4) == []


def test_a_model_in_training_is_left_as_it_was(model, processor, pictures: list[Path]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.model.image_embedding.eval()
    modes = [module.training for module in model.modules()]
    got = answer(model, processor, *exam(pictures), 8, 3)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    ids = torch.tensor([processor.tokenizer("Where is the 3?")["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert got == answer(model.eval(), processor, *exam(pictures), 8, 3)

    def broken(path: Path) -> Image.Image:
        raise OSError("gone")

    model.train()
    with pytest.raises(OSError, match="gone"):
        scored_answers(model, processor, ["Where?"], [pictures[:1]], 1, 1, open_picture=broken)
    assert all(module.training for module in model.modules())


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
