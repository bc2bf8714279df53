"""The designs that HaploVL is compared with: each computes what its direct definition does, and is a whole model."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from haplovl.model import HaploForConditionalGeneration, HaploImageProcessor, HaploProcessor, pack_for_cpu
from haplovl.model.export_released import export_released
from haplovl.model.inherit import build_config, inherit
from haplovl.settings import ModelSettings

# fp32 sums in another order: fused kernels, patches by a matrix product.
# Measured worst case 2.1e-7 on logits of about 0.6.
TOLERANCE = 1e-5
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
VARIANTS = {
    "tower": {"fusion": "tower", "image_size": 32},
    "tower any resolution": {"fusion": "tower", "image_size": 32, "max_tiles": 4},
    "patches": {"fusion": "patches", "image_size": 48, "patch_size": 8},
    "patches mixed": {"fusion": "patches", "image_size": 48, "patch_size": 8, "post_mask": "mixed"},
    "residual": {"image_size": 32, "text_path": "residual"},
    "gated": {"image_size": 32, "text_path": "gated"},
    "direct": {"image_size": 32, "text_path": "direct"},
}


def processor_of(settings: ModelSettings, tokenizer, patch: int = 8) -> HaploProcessor:
    native = settings.fusion == "patches"
    images = HaploImageProcessor(
        settings.image_size, settings.patch_size or patch, settings.max_tiles, tiling="native" if native else "haplovl"
    )
    return HaploProcessor(images, tokenizer, None, settings.class_token, settings.image_newline)


@pytest.fixture
def build(vision, language, tokenizer):
    """`build(name, teacher=None, **changes)`: a variant's model and its processor."""

    def make(name, teacher=None, **changes):
        settings = ModelSettings(**{**VARIANTS[name], **changes})
        processor = processor_of(settings, tokenizer)
        torch.manual_seed(3)
        ids = (processor.image_token_id, len(tokenizer), processor.video_token_id)
        model = inherit(teacher or vision, copy.deepcopy(language), settings, *ids).eval()
        with torch.no_grad():  # so that pictures weigh as much as words
            for part in (model.model.connector, model.model.image_embedding):
                for parameter in part.parameters() if part is not None else ():
                    parameter.mul_(4)
            if name == "gated":
                model.model.text_gate.weight.normal_()
        return model, processor

    return make


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def inputs():
    """`inputs(processor)`: a row with two pictures of different shapes, one of text, one with a tall picture."""

    def make(processor):
        texts = ["Where is <image> the 3? <image>", "yes no", "<image>two"]
        images = [[picture(32, 40), picture(20, 12, 1)], [], [picture(48, 9, 2)]]
        return processor(text=texts, images=images, padding=True, return_tensors="pt")

    return make


# --- tower: LLaVA ---------------------------------------------------------------------------------------------------
def siglip():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).eval()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_is_llava(build, vision, language, inputs, kind):
    teacher = vision if kind == "clip" else siglip()
    ours, processor = build("tower", teacher)
    config = LlavaConfig(
        vision_config=copy.deepcopy(teacher.config),
        text_config=copy.deepcopy(language.config),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if kind == "clip" else "full",
        image_seq_length=16,
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(teacher.state_dict())
    theirs.model.language_model.load_state_dict(ours.model.language_model.state_dict())
    theirs.model.multi_modal_projector.load_state_dict(ours.model.connector.state_dict())
    theirs.lm_head.load_state_dict(ours.lm_head.state_dict())
    batch = inputs(processor)
    with torch.inference_mode():
        found = ours(**batch).logits
        # Left padding shifts LLaVA's positions, which rotary attention does not notice.
        expected = theirs(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"][:, 0],
        ).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=TOLERANCE, rtol=0)
    assert (found[real][1:] - found[real][:-1]).abs().max() > 100 * TOLERANCE  # not all alike
    blind = ours(**{**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}).logits
    assert (blind[real] - found[real]).abs().max() > 100 * TOLERANCE  # pictures matter


@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_ends_at_its_layer_and_has_nothing_behind_it(vision, language, kind, layer):
    teacher = vision if kind == "clip" else siglip()
    settings = ModelSettings(fusion="tower", image_size=32, tower_layer=layer)
    model = inherit(teacher, copy.deepcopy(language), settings, 299, 300)
    tower, pixels = model.model.tower, torch.randn(2, 3, 32, 32)
    grids = [[1, 1, 0, 0, 4, 4, 4, 4]] * 2
    from haplovl.model.media import read_grids

    with torch.inference_mode():
        states = teacher(pixels, output_hidden_states=True).hidden_states
        found = tower(pixels, read_grids(grids))
    expected = states[layer][:, -16:].flatten(0, 1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert len(tower.vision_model.encoder.layers) == layer % len(states)
    names = [name for name, _ in tower.named_parameters()]
    assert not any("post_layernorm" in name or "head." in name for name in names)
    # Every weight that is left has a part in the result.
    tower(pixels, read_grids(grids)).square().sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_a_layer_that_the_teacher_does_not_have_is_refused(vision, language):
    for layer in (3, -4):
        settings = ModelSettings(fusion="tower", image_size=32, tower_layer=layer)
        with pytest.raises(
            ValueError, match=f"tower_layer is {layer}, but the vision teacher has the hidden states -3"
        ):
            build_config(vision.config, language.config, settings, 299)


def test_larger_tiles_have_interpolated_positions(vision, language):
    settings = ModelSettings(fusion="tower", image_size=48)
    model = inherit(vision, copy.deepcopy(language), settings, 299, 300)
    pixels = torch.randn(1, 3, 48, 48)
    from haplovl.model.layout import single_tile

    with torch.inference_mode():
        states = vision(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        found = model.model.tower(pixels, [single_tile(6, 6)])
    torch.testing.assert_close(found, states[-2][0, 1:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["documents", "matmul", "flex_attention", "eager"])
def test_the_tower_is_right_whatever_serves_the_language_model(build, inputs, backend):
    model, processor = build("tower")
    batch = inputs(processor)
    real = batch["attention_mask"].bool()
    with torch.inference_mode():
        expected = model(**batch).logits[real]
        model.set_attn_implementation(backend)
        found = model(**batch).logits[real]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


# --- patches: SOLO --------------------------------------------------------------------------------------------------
def test_patches_are_a_linear_layer_into_the_language_model(build, inputs):
    model, processor = build("patches")
    embedding, language = model.model.image_embedding, model.model.language_model
    assert [name for name, _ in embedding.named_parameters()] == ["newline", "patch.weight"]
    kernel = embedding.patch.weight.view(-1, 3, 8, 8)
    for image in (picture(32, 40), picture(20, 12, 1), picture(48, 9, 2), picture(100, 7), picture(3, 200)):
        batch = processor(text="Where is <image> the 3?", images=image, return_tensors="pt")
        rows, columns = batch["image_grids"][0, :2].tolist()
        resized = image.resize((columns * 8, rows * 8), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = (
            torch.tensor(x)[:, None, None]
            for x in (processor.image_processor.image_mean, processor.image_processor.image_std)
        )
        with torch.inference_mode():
            patches = functional.conv2d(((pixels - mean) / std)[None], kernel, stride=8)[0].permute(1, 2, 0)
            ended = torch.cat([patches, embedding.newline.expand(rows, 1, -1)], dim=1).flatten(0, 1)
            x = language.embed_tokens(batch["input_ids"])
            x[batch["input_ids"] == processor.image_token_id] = ended
            expected = model.lm_head(language(inputs_embeds=x).last_hidden_state)
            found = model(**batch).logits
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_whole_pictures_may_be_given_without_grids(build):
    model, processor = build("patches")
    batch = processor(text="<image>two", images=picture(24, 40), return_tensors="pt")
    tiles = batch["pixel_values"][0].view(3, 5, 3, 8, 8)
    whole = tiles.permute(2, 0, 3, 1, 4).reshape(1, 3, 24, 40)
    with torch.inference_mode():
        expected = model(**batch).logits
        found = model(batch["input_ids"], whole).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


# --- the path of text -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["direct", "gated"])
def test_text_reaches_the_language_model_unchanged(vision, language, tokenizer, path):
    settings = ModelSettings(**VARIANTS[path])  # a gate starts closed
    processor = processor_of(settings, tokenizer)
    model = inherit(vision, copy.deepcopy(language), settings, processor.image_token_id, len(tokenizer)).eval()
    words = processor(text=["Where is the 3? two", "yes"], padding=True, return_tensors="pt")
    real = words["attention_mask"].bool()
    with torch.inference_mode():
        alone = model.lm_head(
            model.model.language_model(words["input_ids"], attention_mask=words["attention_mask"]).last_hidden_state
        )
        torch.testing.assert_close(model(**words).logits[real], alone[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("path", ["residual", "gated", "direct"])
def test_text_and_pictures_enter_the_language_model_as_said(build, inputs, path):
    model, processor = build(path)
    core, seen = model.model, {}
    core.connector.register_forward_hook(lambda _, given, out: seen.update(connected=out))
    core.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(entered=kwargs["inputs_embeds"]), with_kwargs=True
    )
    batch = inputs(processor)
    with torch.inference_mode():
        model(**batch)
        words = core.language_model.embed_tokens(batch["input_ids"])
    gate = {"residual": 1.0, "gated": getattr(core.text_gate, "weight", None), "direct": 0.0}[path]
    with torch.inference_mode():
        expected = words + gate * seen["connected"]
    is_image = (batch["input_ids"] == processor.image_token_id)[..., None]
    assert torch.equal(seen["entered"], torch.where(is_image, seen["connected"], expected))


# --- every variant is a whole model ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_generation_equals_the_plain_way(build, inputs, name):
    model, processor = build(name)
    batch = inputs(processor)
    with torch.inference_mode():
        found = model.generate(**batch, **GREEDY)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        pictures = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        suppressed = model.generation_config.suppress_tokens
        for _ in range(NEW):
            logits = model(input_ids=ids, attention_mask=mask, **pictures).logits[:, -1]
            logits[:, suppressed] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        assert torch.equal(found, ids)
        assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="static"), found)
        packed = pack_for_cpu(copy.deepcopy(model))
        assert torch.equal(packed.generate(**batch, **GREEDY), found)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_padded_batch_equals_its_rows_alone(build, name):
    model, processor = build(name)
    rows = [
        ("Where is <image> the 3? <image>", [picture(32, 40), picture(20, 12, 1)]),
        ("<image>", [picture(48, 9, 2)]),
    ]
    batch = processor(text=[t for t, _ in rows], images=[i for _, i in rows], padding=True, return_tensors="pt")
    with torch.inference_mode():
        together = model(**batch).logits
        for number, (text, images) in enumerate(rows):
            alone = model(**processor(text=text, images=images, return_tensors="pt")).logits[0]
            torch.testing.assert_close(together[number, -len(alone) :], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_do_not_see_each_other(build, name):
    model, processor = build(name)
    texts, images = ["Is <image> there?", "yes", "<image>two"], [[picture(32, 40)], [], [picture(40, 17, 2)]]
    own = [processor(text=t, images=i or None, return_tensors="pt") for t, i in zip(texts, images, strict=True)]
    ids = torch.cat([one["input_ids"] for one in own], dim=1)
    documents = torch.cat([torch.full_like(one["input_ids"], n) for n, one in enumerate(own)], dim=1)
    grids = torch.cat([one["image_grids"] for one in own if "image_grids" in one])
    shown = [one for one in own if "image_grids" in one]
    pixels = torch.cat([one["pixel_values"][0] for one in shown])  # tiles in a row, as the loader gives them
    with torch.inference_mode():
        packed = model(ids, pixels, grids, document_ids=documents).logits[0]
        alone = torch.cat([model(**one).logits[0] for one in own])
    torch.testing.assert_close(packed, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_it_is_the_same(build, inputs, tmp_path, name):
    model, processor = build(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, read = HaploForConditionalGeneration.from_pretrained(tmp_path), HaploProcessor.from_pretrained(tmp_path)
    assert (again.config.fusion, again.config.text_path) == (model.config.fusion, model.config.text_path)
    batch = inputs(read)
    assert all(torch.equal(batch[key], value) for key, value in inputs(processor).items())
    with torch.inference_mode():
        assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("text_alone", [False, True])
def test_every_weight_takes_part_in_every_step(build, inputs, name, text_alone):
    model, processor = build(name)
    batch = processor(text="yes no two", return_tensors="pt") if text_alone else inputs(processor)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []
    touched = {name for name, p in model.named_parameters() if p.grad.abs().max() > 0}
    pictures = {n for n, _ in model.named_parameters() if "tower" in n or "image_embedding" in n}
    assert not (touched & pictures) if text_alone else pictures <= touched


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(build, inputs, name):
    plain, processor = build(name)
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs(processor)
    for model in (plain, again):
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for (key, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), key


@pytest.mark.parametrize("name", VARIANTS)
def test_frames_of_a_video_are_whole_tiles(build, name):
    model, processor = build(name)
    clip = [picture(30, 44, n) for n in range(3)]
    batch = processor(text="<video>two <image>", videos=[clip], images=[picture(20, 12)], return_tensors="pt")
    assert int((batch["input_ids"] == processor.video_token_id).sum()) == processor.video_tokens(3)
    with torch.inference_mode():
        found = model.generate(**batch, **GREEDY)
        dark = model(**{**batch, "pixel_values_videos": torch.zeros_like(batch["pixel_values_videos"])}).logits
        assert found.shape[1] == batch["input_ids"].shape[1] + NEW
        assert (dark - model(**batch).logits).abs().max() > TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_the_released_layout_cannot_hold_it(build, tmp_path, name):
    model, processor = build(name)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    words = "text_path" if "text_path" in VARIANTS[name] else f"fusion '{VARIANTS[name]['fusion']}'"
    with pytest.raises(ValueError, match=words):
        export_released(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_without_a_pre_decoder_there_is_nothing_to_distil(build):
    for name in ("tower", "patches"):
        with pytest.raises(ValueError, match=f"fusion '{name}' has no pre-decoder"):
            build(name)[0].model.pre_decode(torch.tensor([[5, 6]]))


def test_files_of_early_fusion_are_as_before(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"fusion", "text_path", "vision_config"} & written.keys()
    again = type(model.config).from_pretrained(tmp_path)
    assert (again.fusion, again.text_path, again.vision_config) == ("early", "connector", None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fusion": "late"}, "fusion is 'late'"),
        ({"text_path": "none"}, "text_path is 'none'"),
        ({"fusion": "tower"}, "vision_config and fusion 'tower' need each other"),
        ({"fusion": "patches", "text_projection": False}, "need fusion 'early'"),
        ({"text_path": "direct", "text_projection": False}, "need fusion 'early'"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(model, changes, words):
    with pytest.raises(ValueError, match=words):
        type(model.config)(**{**model.config.to_dict(), **changes})


def test_an_assistant_of_another_fusion_is_refused(build):
    model, processor = build("patches")
    batch = processor(text="yes", return_tensors="pt")
    with pytest.raises(ValueError, match="differ in fusion patches and tower"):
        model.generate(**batch, **GREEDY, assistant_model=build("tower")[0])
