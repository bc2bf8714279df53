"""Processor and model through the Auto classes and a saved folder."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from haplovl.model import HaploForConditionalGeneration, HaploProcessor


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return AutoModelForImageTextToText.from_pretrained(tiny_model_dir), AutoProcessor.from_pretrained(tiny_model_dir)


def picture(colour="red", size=(32, 32), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


def test_auto_classes_load_our_classes(loaded):
    model, processor = loaded
    assert isinstance(model, HaploForConditionalGeneration)
    assert isinstance(processor, HaploProcessor)
    assert processor.image_tokens(32, 32) == processor.image_tokens(7, 300) == model.config.tokens_per_image == 21


def test_saved_and_loaded_answers_are_the_same(loaded, model):
    saved, processor = loaded
    batch = processor(text="<image>Where is the 3?", images=[picture()], return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(saved(**batch).logits, model(**batch).logits)


def test_a_batch_of_different_lengths_answers_like_each_alone(loaded):
    model, processor = loaded
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the 3?"}]}],
        [{"role": "user", "content": "yes"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "two"}]}],
    ]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    assert texts[0] == "<|user|><image>\nWhere is the 3?<|assistant|>"
    images = [[picture()], [], [picture("blue"), picture("green")]]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    together = model.generate(**batch, **options)[:, -6:]
    for i, text in enumerate(texts):
        one = processor(text=[text], images=[images[i]] if images[i] else None, return_tensors="pt")
        assert torch.equal(model.generate(**one, **options)[0, -6:], together[i])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(32, 32), (1, 7), (100, 3)])
def test_pictures_of_every_kind_become_one_tile(processor, mode, size):
    pixels = processor.image_processor([picture(size=size, mode=mode)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 3, 32, 32)
    assert torch.isfinite(pixels).all()


def test_a_picture_of_the_tiles_size_is_only_normalised(processor):
    pixels = processor.image_processor([picture("white")], return_tensors="pt")["pixel_values"]
    expected = (1 - torch.tensor(processor.image_processor.image_mean)) / torch.tensor(
        processor.image_processor.image_std
    )
    torch.testing.assert_close(pixels, expected[:, None, None].expand_as(pixels))


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [
        ("<image>", None, "hold 1 .* but 0 images"),
        ("no picture", [picture()], "hold 0 .* but 1 images"),
        (["<image>", "<image>"], [[picture(), picture()], []], r"\[1, 1\].*\[2, 0\]"),
        (None, [picture()], "text is missing"),
        ("<image>", [42], "expected a PIL image"),
    ],
)
def test_wrong_inputs_are_refused(processor, text, images, words):
    with pytest.raises(ValueError, match=words):
        processor(text=text, images=images, return_tensors="pt")


def test_an_unknown_role_is_refused(processor):
    with pytest.raises(Exception, match="unknown role"):
        processor.apply_chat_template([{"role": "robot", "content": "hi"}], tokenize=False)
