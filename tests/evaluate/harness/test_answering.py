"""What lmms-eval's adapter does with a model: prompts, pictures at their places, batches, and likelihoods."""

import pytest
import torch
from noise import noise
from one_word_model import save_one_word_model
from PIL import Image

from haplovl.errors import UserError
from haplovl.evaluate.answer import answer, load_model
from haplovl.evaluate.harness.answering import Question, generate, log_likelihoods, place_pictures

TEXTS = ["What colour is the 3?", "Where is the 2?\nA. left\nB. right", "Which picture has more?", "How much is one?"]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        noise(32, 32, i).save(path)
    return paths


def ask(text, paths=(), **settings):
    return Question(text, lambda: [Image.open(path).convert("RGB") for path in paths], settings)


def test_batches_answer_as_the_project_s_own_evaluation_does(loaded, pictures) -> None:
    images = [pictures[:1], pictures[1:2], pictures[:2], []]
    expected = answer(*loaded, TEXTS, images, 1, 6)
    assert len(set(expected)) > 1, "the model says the same everywhere: the order cannot be tested"
    questions = [ask(text, shown, max_new_tokens=6) for text, shown in zip(TEXTS, images, strict=True)]
    for batch in (1, 3, 100):
        done = []
        replies = generate(*loaded, questions, batch, progress=done.append)
        assert [reply.text for reply in replies] == expected
        assert done[-1] == 4
    assert replies[2].tokens_in - replies[0].tokens_in > 16, "two pictures take more tokens than one"
    assert all(1 <= reply.tokens_out <= 6 for reply in replies)


def test_pictures_stand_at_their_marks_and_nothing_else_changes() -> None:
    assert place_pictures("What is it?", 1) == ("<image>\nWhat is it?", [0])
    assert place_pictures("What is it?", 0) == ("What is it?", [])
    assert place_pictures("<image 1> Which?\nA. <image 2>", 2) == ("<image> Which?\nA. <image>", [0, 1])
    assert place_pictures("In <image 2>, not <image 1>", 2) == ("In <image>, not <image>", [1, 0])
    assert place_pictures("<image 1> Is <image 1> red?", 1) == ("<image> Is <image 1> red?", [0])
    assert place_pictures("<image 3> or <image 5>", 2) == ("<image> or <image>", [0, 1])
    assert place_pictures("<image 1> and <image 2>", 1) == ("<image>\n<image 1> and <image 2>", [0])


def test_pictures_out_of_order_reach_the_model_in_the_order_of_their_marks(loaded, pictures) -> None:
    model, processor = loaded
    seen = []
    original = type(processor).__call__

    def noted(self, *args, **kwargs):
        seen.append(kwargs)
        return original(self, *args, **kwargs)

    type(processor).__call__ = noted
    try:
        generate(model, processor, [ask("<image 2> or <image 1>?", pictures[:2], max_new_tokens=1)], 1)
    finally:
        type(processor).__call__ = original
    shown = seen[0]["images"][0]
    assert [picture.tobytes() for picture in shown] == [Image.open(pictures[i]).tobytes() for i in (1, 0)]
    assert "<image> or <image>?" in seen[0]["text"][0]


def stop_in(text):
    """Two plain characters from within a text."""
    return next(text[i : i + 2] for i in range(1, len(text)) if text[i : i + 2].isascii() and text[i : i + 2].isalpha())


def test_an_answer_ends_before_the_texts_that_end_it(loaded) -> None:
    wholes = generate(*loaded, [ask(text, max_new_tokens=16) for text in TEXTS], 4)
    which = max(range(len(TEXTS)), key=lambda i: len(wholes[i].text))
    whole, text = wholes[which], TEXTS[which]
    stop = stop_in(whole.text)
    (cut,) = generate(*loaded, [ask(text, max_new_tokens=16, until=[stop, "never said"])], 1)
    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.tokens_out < whole.tokens_out, "generation went on after the end"
    (untouched,) = generate(*loaded, [ask(text, max_new_tokens=16, until=[text[:5], ""])], 1)
    assert untouched == whole, "what stands in the prompt must not end the answer"


def test_rows_of_one_batch_end_one_by_one(loaded) -> None:
    wholes = generate(*loaded, [ask(text, max_new_tokens=16) for text in TEXTS], 4)
    stop = stop_in(max((reply.text for reply in wholes), key=len))
    alone = [generate(*loaded, [ask(text, max_new_tokens=16, until=stop)], 1)[0] for text in TEXTS]
    assert generate(*loaded, [ask(text, max_new_tokens=16, until=stop) for text in TEXTS], 4) == alone
    assert len({reply.tokens_out for reply in alone}) > 1, "all rows end at once: nothing was tested"


def test_greedy_unless_the_task_samples(loaded) -> None:
    greedy = generate(*loaded, [ask(TEXTS[0], max_new_tokens=8)], 1)
    for settings in ({"temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, {"temperature": 0}):
        assert generate(*loaded, [ask(TEXTS[0], max_new_tokens=8, **settings)], 1) == greedy
    assert generate(*loaded, [ask(TEXTS[0], max_new_tokens=8, temperature=9.0, do_sample=False)], 1) == greedy
    said = set()
    for seed in range(3):
        torch.manual_seed(seed)
        said.add(generate(*loaded, [ask(TEXTS[0], max_new_tokens=8, temperature=9.0)], 1)[0].text)
    assert len(said) > 1


def test_other_models_settings_are_passed_over_and_unknown_ones_refused(loaded) -> None:
    assert generate(*loaded, [ask(TEXTS[0], max_new_tokens=2, image_aspect_ratio="original")], 1)
    with pytest.raises(UserError, match="sets 'max_tokens', which is not known; known are temperature"):
        generate(*loaded, [ask(TEXTS[0], max_tokens=2)], 1)


def test_the_length_of_tasks_that_name_none(loaded) -> None:
    (reply,) = generate(*loaded, [ask(TEXTS[0])], 1, max_new_tokens=3)
    assert reply.tokens_out <= 3


def test_what_is_no_picture_is_refused(loaded) -> None:
    with pytest.raises(UserError, match="shows the model a str; the adapter takes pictures only"):
        generate(*loaded, [Question("What happens?", lambda: ["clip.mp4"], {})], 1)


def test_a_prompt_beyond_the_context_is_refused(loaded, monkeypatch) -> None:
    monkeypatch.setattr(loaded[0].config.text_config, "max_position_embeddings", 20)
    with pytest.raises(UserError, match=r"a prompt has \d+ tokens with its pictures, but the model reads 20"):
        generate(*loaded, [ask("one two three " * 20)], 1)


def test_likelihoods_are_sums_over_the_answer_s_tokens_after_the_prompt(loaded, pictures) -> None:
    model, processor = loaded
    answers = [" yes", "two three four", "end", " top left"]  # the template's end mark is <|end|>
    images = [pictures[:1], pictures[:2], [], pictures[1:2]]
    questions = [ask(text, shown) for text, shown in zip(TEXTS, images, strict=True)]
    expected = [by_hand(model, processor, *given) for given in zip(TEXTS, images, answers, strict=True)]
    for batch in (1, 4):
        found = log_likelihoods(model, processor, questions, answers, batch)
        # float32 sums over a batch with padding; 1e-4 is a hundred times the spread seen.
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def by_hand(model, processor, text, paths, said):
    """Token by token, without a batch."""
    shown = [Image.open(path).convert("RGB") for path in paths]
    content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    lead = len(processor(text=[prompt], images=[shown], return_tensors="pt")["input_ids"][0])
    inputs = processor(text=[f"{prompt} {said.strip()}"], images=[shown], return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs.to(model.device)).logits[0].float().log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    steps = range(lead, len(ids))
    assert len(steps) >= 1
    return sum(scores[i - 1, ids[i]].item() for i in steps), all(scores[i - 1].argmax() == ids[i] for i in steps)


def test_the_model_s_own_answer_is_the_greedy_one(model, processor, tmp_path) -> None:
    loaded = load_model(save_one_word_model(model, processor, " A", tmp_path / "model"))
    assert generate(*loaded, [ask(TEXTS[1])], 1)[0].text == "A"
    own, other = log_likelihoods(*loaded, [ask(TEXTS[1])] * 2, [" A", " B"], 2)
    assert own[1] and own[0] > -0.01
    assert not other[1] and other[0] < -1


def test_an_empty_answer_has_no_likelihood(loaded) -> None:
    with pytest.raises(UserError, match="the likelihood of an empty answer"):
        log_likelihoods(*loaded, [ask(TEXTS[0])], [" "], 1)
