"""What is inherited means the same as in the teacher, layer by layer."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from haplovl.model.embedding import resize_position_grid
from haplovl.model.inherit import build_config, inherit
from haplovl.settings import ModelSettings

# fp32 sums in another order: patches through a matrix product instead of a convolution, fused attention kernels.
TOLERANCE = 1e-5
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VOCABULARY, IMAGE_ID = 64, 63


def tiny_language(kind="llama"):
    torch.manual_seed(0)
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    return cls(config(vocab_size=VOCABULARY, num_key_value_heads=2, **SIZES)).eval()


def pre_decoder_states(model, pixels):
    states = []
    ids = torch.full((len(pixels), model.config.tokens_per_image), IMAGE_ID)
    with torch.inference_mode():
        model.model.pre_decode(ids, pixels, all_hidden_states=states)
    return states


def test_every_layer_equals_clip():
    torch.manual_seed(1)
    clip = CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)).eval()
    settings = ModelSettings(image_size=32, class_token=True, image_newline=False, pre_rotary_increment=0.0)
    model = inherit(clip, tiny_language(), settings, IMAGE_ID, VOCABULARY).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = clip(pixels, output_hidden_states=True).hidden_states
    ours = pre_decoder_states(model, pixels)
    assert len(ours) == len(expected) == 4
    for a, b in zip(ours, expected, strict=True):
        assert a.std() > 0.1  # the comparison would pass on zeros
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_every_layer_equals_siglip():
    torch.manual_seed(1)
    config = SiglipVisionConfig(**SIZES, image_size=32, patch_size=8, vision_use_head=False)
    siglip = SiglipVisionModel(config).eval()
    settings = ModelSettings(image_size=32, class_token=False, image_newline=False, pre_rotary_increment=0.0)
    model = inherit(siglip, tiny_language(), settings, IMAGE_ID, VOCABULARY).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = siglip(pixels, output_hidden_states=True).hidden_states
    for a, b in zip(pre_decoder_states(model, pixels), expected, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", [16, 48])
def test_other_image_sizes_use_the_librarys_interpolation(side):
    torch.manual_seed(1)
    clip = CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)).eval()
    settings = ModelSettings(image_size=side, class_token=True, image_newline=False)
    model = inherit(clip, tiny_language(), settings, IMAGE_ID, VOCABULARY).eval()
    pixels = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        expected = clip(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    for a, b in zip(pre_decoder_states(model, pixels), expected, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_non_square_grids_are_interpolated():
    table = torch.randn(16, 8)
    grid = table.reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(3, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_position_grid(table, 3, 5), expected.permute(0, 2, 3, 1).reshape(15, 8))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_post_decoder_is_the_language_model(kind, vision):
    language = tiny_language(kind)
    expected_words = language.get_input_embeddings().weight.clone()
    model = inherit(vision, language, ModelSettings(image_size=32), IMAGE_ID, VOCABULARY).eval()
    ids = torch.randint(0, VOCABULARY - 1, (2, 9))
    with torch.inference_mode():
        hidden = model.model.language_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), language(input_ids=ids).logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(model.get_input_embeddings().weight, expected_words)


def test_the_vocabulary_grows_to_the_tokenizer(vision):
    model = inherit(vision, tiny_language(), ModelSettings(image_size=32), VOCABULARY, VOCABULARY + 1)
    assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == VOCABULARY + 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (ModelSettings(image_size=33), "no|not a positive multiple"),
        (ModelSettings(image_size=32, pre_decoder_layers=9), "pre_decoder_layers is 9"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words, vision, language):
    with pytest.raises(ValueError, match=words):
        build_config(vision.config, language.config, settings, IMAGE_ID)


def test_a_siglip_teacher_has_no_class_token(language):
    with pytest.raises(ValueError, match="no class token"):
        build_config(SiglipVisionConfig(**SIZES), language.config, ModelSettings(image_size=224), IMAGE_ID)


def test_other_vision_models_are_refused(language):
    with pytest.raises(ValueError, match="clip_vision_model or siglip"):
        build_config(language.config, language.config, ModelSettings(image_size=32), IMAGE_ID)
