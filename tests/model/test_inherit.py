"""What is inherited means the same as in the teacher, layer by layer."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    CohereForCausalLM,
    Dinov2Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
)

from haplovl.model.attention import MixedMask
from haplovl.model.embedding import resize_position_grid
from haplovl.model.inherit import build_config, inherit
from haplovl.settings import ModelSettings

# fp32 sums in another order: patches through a matrix product instead of a convolution, fused attention kernels.
TOLERANCE = 1e-5
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VOCABULARY, IMAGE_ID = 64, 63
LANGUAGE_MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2.5": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    # Its heads are wider than hidden_size / heads, and queries and keys are normalised.
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def tiny_language(kind="llama", **settings):
    torch.manual_seed(0)
    config, cls, own = LANGUAGE_MODELS[kind]
    sizes = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "initializer_range": 0.1, **SIZES}
    return cls(config(**sizes, **own, **settings)).eval()


def tiny_vision(kind="clip"):
    torch.manual_seed(1)
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=32, patch_size=8))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=32, patch_size=8, vision_use_head=False))
    return model.eval()


def like_the_teacher(kind="clip", **settings):
    """Settings under which a picture at the start of a sequence goes through the teacher's own computation."""
    own = {"image_size": 32, "class_token": kind == "clip", "image_newline": False, "pre_rotary_increment": 0.0}
    return ModelSettings(**own | settings)


# --- the vision teacher --------------------------------------------------------------------------------------------
def states_of_the_picture(model, pixels, words):
    """The pre-decoder's states of a picture that words follow: the teacher has no place for words before it."""
    model_config, (rows, columns) = model.config, (side // 8 for side in pixels.shape[-2:])
    length = rows * columns + model_config.pre_config.class_token
    ids = torch.tensor([[IMAGE_ID] * length + words] * len(pixels))
    with torch.inference_mode():
        states = model(ids, pixels, output_hidden_states=True).pre_hidden_states
    return [state[:, :length] for state in states]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("image_size", "size"), [(32, (32, 32)), (64, (64, 64)), (16, (16, 16)), (32, (24, 48)), (32, (64, 8))]
)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_layer_equals_the_vision_teacher_at_any_size(kind, image_size, size, backend):
    teacher = tiny_vision(kind)
    teacher.set_attn_implementation(backend)
    settings = like_the_teacher(kind, image_size=image_size)
    model = inherit(teacher, tiny_language(), settings, IMAGE_ID, VOCABULARY).eval()
    model.set_attn_implementation(backend)
    pixels = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = teacher(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        if size == (32, 32):  # the teacher's own size: without its interpolation as well
            plain = teacher(pixels, output_hidden_states=True).hidden_states
            assert all(torch.equal(a, b) for a, b in zip(plain, expected, strict=True))
    ours, other = (states_of_the_picture(model, pixels, words) for words in ([1, 2, 3], [9, 8, 7]))
    assert len(ours) == len(expected) == 4
    for a, b, c in zip(ours, expected, other, strict=True):
        assert a.std() > 0.1  # the comparison would pass on zeros
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)
        assert torch.equal(a, c)  # words that follow change nothing


def test_the_first_layers_alone_equal_the_teachers():
    teacher = tiny_vision()
    settings = like_the_teacher(pre_decoder_layers=2)
    model = inherit(teacher, tiny_language(), settings, IMAGE_ID, VOCABULARY).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = teacher(pixels, output_hidden_states=True).hidden_states[:3]
    for a, b in zip(states_of_the_picture(model, pixels, [1]), expected, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_a_rotary_step_inside_images_is_no_longer_the_teacher():
    teacher = tiny_vision()
    settings = like_the_teacher(pre_rotary_increment=1.0)
    model = inherit(teacher, tiny_language(), settings, IMAGE_ID, VOCABULARY).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = teacher(pixels, output_hidden_states=True).hidden_states
    ours = states_of_the_picture(model, pixels, [1])
    torch.testing.assert_close(ours[0], expected[0], atol=TOLERANCE, rtol=0)
    assert (ours[-1] - expected[-1]).abs().max() > 100 * TOLERANCE


def test_non_square_grids_are_interpolated():
    table = torch.randn(16, 8)
    grid = table.reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(3, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_position_grid(table, 3, 5), expected.permute(0, 2, 3, 1).reshape(15, 8))


@pytest.mark.parametrize(
    ("kind", "whole", "config", "vision_config"),
    [("clip", CLIPModel, CLIPConfig, CLIPVisionConfig), ("siglip", SiglipModel, SiglipConfig, SiglipVisionConfig)],
)
def test_a_whole_clip_or_siglip_is_a_teacher_too(kind, whole, config, vision_config):
    torch.manual_seed(5)
    text = {**SIZES, "vocab_size": 50}
    teacher = whole(config(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8})).eval()
    assert isinstance(teacher.config.vision_config, vision_config)
    model = inherit(teacher, tiny_language(), like_the_teacher(kind), IMAGE_ID, VOCABULARY).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = teacher.vision_model(pixels, output_hidden_states=True).hidden_states
    for a, b in zip(states_of_the_picture(model, pixels, [1]), expected, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_a_random_pre_decoder_inherits_the_language_model_alone():
    teacher, language = tiny_vision(), tiny_language()
    model = inherit(teacher, language, like_the_teacher(pre_decoder="random"), IMAGE_ID, VOCABULARY)
    ours, theirs = model.model.pre_decoder.layers[0].fc1.weight, teacher.encoder.layers[0].mlp.fc1.weight
    assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)


# --- the language model --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", sorted(LANGUAGE_MODELS))
def test_the_post_decoder_is_the_language_model(kind, tied, backend):
    language = tiny_language(kind, tie_word_embeddings=tied)
    language.set_attn_implementation(backend)
    words = language.get_input_embeddings().weight.clone()
    model = inherit(tiny_vision(), language, ModelSettings(image_size=32), IMAGE_ID, VOCABULARY).eval()
    model.set_attn_implementation(backend)
    core, head = model.model, model.lm_head
    assert type(core.language_model) is type(language.base_model)
    assert torch.equal(model.get_input_embeddings().weight, words)
    assert (head.weight is model.get_input_embeddings().weight) == tied
    ids = torch.randint(0, IMAGE_ID, (2, 9))
    with torch.inference_mode():
        expected = language(input_ids=ids).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(head(core.language_model(ids)[0]), expected, atol=TOLERANCE, rtol=0)

        # With our mask and our positions, alone, …
        embeds = core.get_input_embeddings()(ids)
        text = torch.full_like(ids, -1)
        ours = head(core._post_forward(embeds, core.position_ids(text)[1], mask_of(ids), None, False)[0])
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)

        # … padded on the left, …
        real = torch.ones_like(ids)
        real[1, :4] = 0
        positions = core.position_ids(text, real)[1]
        ours = head(core._post_forward(embeds, positions, mask_of(ids, attention_mask=real), None, False)[0])
        torch.testing.assert_close(ours[0], expected[0], atol=TOLERANCE, rtol=0)
        alone = language(input_ids=ids[1:, 4:]).logits[0]
        torch.testing.assert_close(ours[1, 4:], alone, atol=TOLERANCE, rtol=0)

        # … and as two documents in one row.
        row, documents = ids.reshape(1, -1), torch.tensor([[0] * 9 + [1] * 9])
        positions = core.position_ids(torch.full_like(row, -1), document_ids=documents)[1]
        mask = mask_of(row, document_ids=documents)
        ours = head(core._post_forward(embeds.reshape(1, 18, -1), positions, mask, None, False)[0])
        torch.testing.assert_close(ours.reshape(2, 9, -1), expected, atol=TOLERANCE, rtol=0)


def mask_of(ids, **settings):
    return MixedMask(*ids.shape, ids.device, **settings)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_vocabulary_grows_to_the_tokenizer(tied):
    language = tiny_language(tie_word_embeddings=tied)
    before = language.get_input_embeddings().weight.clone()
    model = inherit(tiny_vision(), language, ModelSettings(image_size=32), VOCABULARY, VOCABULARY + 3)
    assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == VOCABULARY + 3
    assert torch.equal(model.get_input_embeddings().weight[:VOCABULARY], before)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight) == tied
    assert model.get_input_embeddings().weight[VOCABULARY:].std() > 0


def test_a_larger_vocabulary_than_the_tokenizers_is_kept():
    model = inherit(tiny_vision(), tiny_language(), ModelSettings(image_size=32), 9, 10)
    assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == VOCABULARY


@pytest.mark.parametrize(
    ("cls", "config", "words"),
    [
        (CohereForCausalLM, CohereConfig(**SIZES, vocab_size=VOCABULARY, logit_scale=0.5), "'cohere' has logit_scale"),
        (GraniteForCausalLM, GraniteConfig(**SIZES, vocab_size=VOCABULARY, logits_scaling=2.0), "logits_scaling"),
        (
            Gemma2ForCausalLM,
            Gemma2Config(**SIZES, vocab_size=VOCABULARY, head_dim=8, final_logit_softcapping=30.0),
            "'gemma2' has final_logit_softcapping",
        ),
        (PhiForCausalLM, PhiConfig(**SIZES, vocab_size=VOCABULARY), "'phi' has a bias in the head"),
    ],
)
def test_language_models_that_change_their_logits_are_refused(cls, config, words):
    with pytest.raises(ValueError, match=f"{words}.*not supported"):
        inherit(tiny_vision(), cls(config), ModelSettings(image_size=32), IMAGE_ID, VOCABULARY)


# --- settings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (ModelSettings(image_size=33), "33 is not a positive multiple of the patch size 8"),
        (ModelSettings(image_size=4), "4 is not a positive multiple"),
        (ModelSettings(image_size=32, pre_decoder_layers=9), "pre_decoder_layers is 9, but the vision teacher has 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words, vision, language):
    with pytest.raises(ValueError, match=words):
        build_config(vision.config, language.config, settings, IMAGE_ID)


def test_settings_reach_the_configuration(vision, language):
    config = build_config(
        vision.config, language.config, ModelSettings(image_size=64, post_mask="causal", max_tiles=4), IMAGE_ID, 60
    )
    assert (config.post_mask, config.image_size, config.video_token_id) == ("causal", 64, 60)
    assert (config.pre_config.patch_grid, config.tokens_per_image) == (8, 8 * 9 + 1)
    assert config.pre_config.final_norm and config.connector_bias and config.frame_newlines and config.text_projection


RELEASED = {"image_size": 32, "released_layout": True, "class_token": False, "pre_rotary_increment": 1.0}


def test_the_released_layout_is_what_its_checkpoints_hold(vision, language):
    config = build_config(vision.config, language.config, ModelSettings(**RELEASED, max_tiles=4), IMAGE_ID)
    assert not (config.pre_config.final_norm or config.connector_bias or config.frame_newlines)
    assert not config.pre_config.class_token and config.pre_config.image_newline


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"class_token": True}, "released_layout needs class_token: False"),
        ({"image_newline": False}, "released_layout needs image_newline: True"),
        ({"pre_rotary_increment": 0.0}, "released_layout needs pre_rotary_increment: 1.0"),
        ({"post_rotary_increment": 0.5}, "released_layout needs post_rotary_increment: 1.0"),
        ({"post_mask": "causal"}, "released_layout needs post_mask: mixed"),
        ({"class_token": True, "post_mask": "causal"}, "class_token: False, post_mask: mixed"),
        ({"released_layout": False, "max_tiles": 0}, "max_tiles"),
        ({"released_layout": False, "post_mask": "full"}, "post_mask"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        ModelSettings(**RELEASED | wrong)


def test_a_siglip_teacher_has_no_class_token(language):
    with pytest.raises(ValueError, match="model.class_token is on, but a SigLIP teacher has no class token"):
        build_config(SiglipVisionConfig(**SIZES), language.config, ModelSettings(image_size=224), IMAGE_ID)


@pytest.mark.parametrize("other", [ViTConfig(), Dinov2Config(), CLIPTextConfig(), LlamaConfig()])
def test_other_vision_models_are_refused(other, language):
    with pytest.raises(ValueError, match=f"'{other.model_type}'; .* clip_vision_model or siglip_vision_model"):
        build_config(other, language.config, ModelSettings(image_size=32), IMAGE_ID)
