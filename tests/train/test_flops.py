"""Counted operations are those that torch counts, and what the mask keeps apart is no work."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from haplovl.data.loader import IGNORE, Batch
from haplovl.model.inherit import inherit
from haplovl.model.layout import place_native, single_tile
from haplovl.model.media import Media, image_sizes
from haplovl.settings import DistillationLosses, ModelSettings
from haplovl.train.flops import StepFlops, Work, attended_pairs
from haplovl.train.objectives import Distillation, NextToken


@pytest.fixture
def batch(model):
    """Two rows: an image with a document after it, and two documents with padding behind them."""
    image, n = model.config.image_token_id, model.config.tokens_per_image
    length = n + 9
    ids = torch.randint(5, 200, (2, length), generator=torch.Generator().manual_seed(1))
    ids[0, 2 : 2 + n] = image
    documents = torch.full((2, length), -1)
    documents[0, : n + 5], documents[0, n + 5 :] = 0, 1
    documents[1, :4], documents[1, 4:9] = 0, 1
    labels = torch.full((2, length), IGNORE)
    labels[0, -3:], labels[1, 2:4] = ids[0, -3:], ids[1, 2:4]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(ids, labels, documents, pixels, [single_tile(4, 4)], ["a", "b"])


def _as_computed(batch: Batch, work: Work) -> Work:
    """Eager attention computes every pair, and embeddings and layers run over padding too."""
    rows, length = batch.input_ids.shape
    everything = rows * length
    pairs = everything * length
    return replace(work, tokens=everything, text_tokens=everything, pairs=pairs, causal_pairs=pairs)


def test_stage2_equals_what_torch_counts(model, batch):
    model.set_attn_implementation({"": "eager", "text_config": "eager"})
    with FlopCounterMode(display=False) as forward:
        loss = NextToken(model)(batch)["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    flops = StepFlops.stage2(model).of(_as_computed(batch, Work.of(batch, model.config)))
    assert sum(flops.forward.values()) == forward.get_total_flops()
    assert sum(flops.backward.values()) == backward.get_total_flops()
    assert flops.model == flops.hardware


@pytest.mark.parametrize("left_out", [(), ("vision",), ("feature",), ("current_token",), ("feature", "current_token")])
def test_stage1_equals_what_torch_counts(left_out, model, vision, batch):
    model.set_attn_implementation({"": "eager", "text_config": "eager"})
    vision.set_attn_implementation("eager")
    losses = DistillationLosses(**dict.fromkeys(left_out, 0.0))
    objective = Distillation(model, vision, -1, 1.0, losses)
    with FlopCounterMode(display=False) as forward:
        loss = sum(objective(batch).values())
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    work = Work.of(batch, model.config)
    counter = StepFlops.stage1(model, vision.config, losses)
    flops = counter.of(_as_computed(batch, work))
    # Heads and logits run over real text tokens only, the text projection over everything.
    real = counter.of(work)
    for part in ("heads", "logits"):
        flops.forward[part], flops.backward[part] = real.forward[part], real.backward[part]
    assert flops.teachers + sum(flops.forward.values()) == forward.get_total_flops()
    assert sum(flops.backward.values()) == backward.get_total_flops()


def test_the_teacher_counts_up_to_the_layer_that_it_teaches(model, vision, batch):
    work = Work.of(batch, model.config)
    shorter = copy.deepcopy(vision.config)
    for taught in range(vision.config.num_hidden_layers + 1):
        shorter.num_hidden_layers = taught
        wanted = StepFlops.stage1(model, shorter).of(work)
        assert StepFlops.stage1(model, vision.config, taught=taught).of(work) == wanted
    assert wanted == StepFlops.stage1(model, vision.config).of(work)


def test_pairs_are_those_of_the_mask(model, batch):
    from haplovl.model.attention import MixedMask

    media = Media.of(model.config, batch.input_ids, batch.pixel_values, batch.image_grids)
    mask = MixedMask(*batch.input_ids.shape, torch.device("cpu"), media.blocks, document_ids=batch.document_ids)
    real = (batch.document_ids >= 0)[:, None, :, None]
    wanted = [int((m.dense() & real).sum()) for m in (mask.causal(), mask)]
    assert list(attended_pairs(batch.document_ids, [model.config.tokens_per_image])) == wanted
    assert wanted[0] < wanted[1]


def test_frozen_weights_cost_one_forward_in_the_backward_pass(model, batch):
    work = Work.of(batch, model.config)
    trained = StepFlops.stage2(model).of(work)
    for parameter in model.model.language_model.layers.parameters():
        parameter.requires_grad_(False)
    frozen = StepFlops.stage2(model).of(work)
    text = model.config.text_config
    attention = 4 * text.hidden_size * text.num_hidden_layers * work.pairs
    weights = frozen.forward["language_model"] - attention
    assert trained.backward["language_model"] - frozen.backward["language_model"] == weights


def test_checkpointing_is_hardware_work_only(model, batch):
    work, counter = Work.of(batch, model.config), StepFlops.stage2(model)
    plain, again = counter.of(work), counter.of(work, activation_checkpointing=True)
    assert again.model == plain.model
    assert again.hardware == plain.hardware + plain.forward["pre_decoder"] + plain.forward["language_model"]


def test_works_add_up(model, batch):
    work, counter = Work.of(batch, model.config), StepFlops.stage2(model)
    assert work + work == work.times(2)
    assert counter.of(work.times(2)).model == 2 * counter.of(work).model


# --- the other designs ----------------------------------------------------------------------------------------------
def _variant(vision, language, processor, **settings):
    """A model of another design that computes every pair by eager attention, and a batch for it as above."""
    ids = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    settings = ModelSettings(image_size=32, **settings)
    model = inherit(vision, copy.deepcopy(language), settings, *ids).train()
    tower = {"vision_config": "eager"} if settings.fusion == "tower" else {}
    model.set_attn_implementation({"": "eager", "text_config": "eager", **tower})
    if settings.fusion == "patches":  # 3 rows of 4 patches, each a tile of its own
        grid, pixels = place_native(24, 32, 32, 8).grid, torch.randn(12, 3, 8, 8)
    else:
        grid, pixels = single_tile(4, 4), torch.randn(1, 3, 32, 32)
    image, n = model.config.image_token_id, image_sizes(model.config, [grid])[0]
    ids = torch.randint(5, 200, (2, n + 9))
    ids[0, 2 : 2 + n] = image
    documents = torch.full((2, n + 9), -1)
    documents[0, : n + 5], documents[0, n + 5 :] = 0, 1
    documents[1, :4] = 0
    labels = torch.full((2, n + 9), IGNORE)
    labels[0, -3:], labels[1, 2:4] = ids[0, -3:], ids[1, 2:4]
    return model, Batch(ids, labels, documents, pixels, [grid], ["a", "b"])


VARIANTS = {
    "tower": {"fusion": "tower"},
    "patches": {"fusion": "patches", "patch_size": 8},
    "residual": {"text_path": "residual"},
    "gated": {"text_path": "gated"},
    "direct": {"text_path": "direct"},
}
PARTS = ("tower", "image_embedding", "text_projection", "pre_decoder", "connector", "language_model", "lm_head")
TRAINED = {
    "all": PARTS,
    "connector alone": ("connector",),  # LLaVA's first stage
    "all but the tower": PARTS[1:],
    "language model alone": ("language_model", "lm_head"),
    "pre-decoder and what follows": ("pre_decoder", "connector", "language_model", "lm_head"),
    "image embedding alone": ("image_embedding",),
}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_design_and_freezing_equals_what_torch_counts(vision, language, processor, variant, trained):
    model, batch = _variant(vision, language, processor, **VARIANTS[variant])
    chosen = {name: getattr(model.model, name, None) for name in PARTS[:-1]} | {"lm_head": model.lm_head}
    chosen = [part for name, part in chosen.items() if name in TRAINED[trained] and part is not None]
    if not chosen:
        pytest.skip("this design has no such part")
    model.requires_grad_(False)
    for part in chosen:
        part.requires_grad_(True)
    with FlopCounterMode(display=False) as forward:
        loss = NextToken(model)(batch)["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    work = Work.of(batch, model.config)
    flops = StepFlops.stage2(model).of(_as_computed(batch, work))
    assert sum(flops.forward.values()) == forward.get_total_flops()
    assert sum(flops.backward.values()) == backward.get_total_flops()
    assert (flops.backward.get("tower", 0) > 0) == (variant == "tower" and trained == "all")


def test_a_tower_is_counted_by_hand(vision, language, processor):
    model, batch = _variant(vision, language, processor, fusion="tower")
    work = Work.of(batch, model.config)
    assert (work.tiles, work.patches, work.learnt_patches) == (1, 16, 16)
    flops = StepFlops.stage2(model).of(work)
    tokens, width, inner, words = 17, 32, 64, 48  # class token and patches through the first of two layers
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * width * tokens**2
    assert flops.forward["tower"] == layer and flops.backward["tower"] == 2 * layer
    assert flops.forward["connector"] == 2 * 16 * (width * words + words**2)
    assert flops.forward["embeddings"] == 2 * 16 * 3 * 8 * 8 * width == flops.backward["embeddings"]
    causal, _ = attended_pairs(batch.document_ids, [16])
    assert StepFlops.stage2(model).of(replace(work, pairs=0)).model == flops.model and work.causal_pairs == causal


def test_what_has_no_backward_pass_is_not_computed_again(vision, language, processor):
    model, batch = _variant(vision, language, processor, fusion="tower")
    work = Work.of(batch, model.config)
    whole = StepFlops.stage2(model).of(work, activation_checkpointing=True)
    assert whole.recompute == whole.forward["tower"] + whole.forward["language_model"]
    model.model.tower.requires_grad_(False)
    frozen = StepFlops.stage2(model).of(work, activation_checkpointing=True)
    assert frozen.recompute == frozen.forward["language_model"]
