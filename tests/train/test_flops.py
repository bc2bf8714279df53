"""Counted operations are those that torch counts, and what the mask keeps apart is no work."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from haplovl.data.loader import IGNORE, Batch
from haplovl.model.layout import single_tile
from haplovl.model.media import Media
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
    return replace(work, tokens=everything, text_tokens=everything, pairs=everything * length)


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


def test_stage1_equals_what_torch_counts(model, vision, batch):
    model.set_attn_implementation({"": "eager", "text_config": "eager"})
    vision.set_attn_implementation("eager")
    objective = Distillation(model, vision, vision_layer=-1, temperature=1.0)
    with FlopCounterMode(display=False) as forward:
        loss = sum(objective(batch).values())
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    work = Work.of(batch, model.config)
    counter = StepFlops.stage1(model, vision.config)
    flops = counter.of(_as_computed(batch, work))
    # Heads and logits run over real text tokens only, the text projection over everything.
    real = counter.of(work)
    for part in ("heads", "logits"):
        flops.forward[part], flops.backward[part] = real.forward[part], real.backward[part]
    assert flops.teachers + sum(flops.forward.values()) == forward.get_total_flops()
    assert sum(flops.backward.values()) == backward.get_total_flops()


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
