"""Adapters change nothing at first, learn, and are gone without a trace once they are merged."""

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import nn

from haplovl.errors import UserError
from haplovl.model import HaploForConditionalGeneration
from haplovl.settings import LoraSettings
from haplovl.train.lora import add_adapters, merge_adapters, merged_weights, trainable_parameters
from haplovl.train.objectives import NextToken

KINDS = ["llama", "mistral", "qwen2", "qwen3", "released"]


def logits(model, batch):
    with torch.no_grad():
        return model(batch.input_ids, batch.pixel_values, batch.image_grids, document_ids=batch.document_ids).logits


def train(model, batch, steps=5):
    objective = NextToken(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = objective(batch)["loss"] / objective.counts(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_added_trained_merged_and_saved_as_plain_weights(kind, tiny, packed, tmp_path):
    model = tiny(kind)
    batch = packed(model)
    untouched = logits(model, batch)
    names = set(model.state_dict())
    core = model.model
    frozen = {n: p.clone() for n, p in core.language_model.named_parameters()}
    head, table = model.lm_head.weight.clone(), model.get_input_embeddings().weight.clone()
    before = {n: p.clone() for n, p in core.named_parameters() if n.split(".")[0] in ("pre_decoder", "connector")}
    linear = [layer for layer in core.language_model.modules() if isinstance(layer, nn.Linear)]

    count = add_adapters(model, LoraSettings(rank=4, alpha=8.0), seed=7)
    assert count == sum(4 * (layer.in_features + layer.out_features) for layer in linear)
    assert torch.equal(logits(model, batch), untouched)
    losses = train(model.train(), batch)
    assert losses[-1] < losses[0]
    model.eval()
    learnt = logits(model, batch)
    assert (learnt - untouched).abs().max() > 1e-3

    merged = merged_weights(model.state_dict(), LoraSettings(rank=4, alpha=8.0))
    model.save_pretrained(tmp_path / "gathered", state_dict=dict(merged))
    merge_adapters(model)
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())
    # Weights plus product instead of two products; logits reach 13, measured worst case 4e-6 (released), else 1e-6.
    assert torch.allclose(logits(model, batch), learnt, atol=1e-5, rtol=0)
    assert set(model.state_dict()) == names
    after = dict(core.language_model.named_parameters())
    matrices = {n for n, p in frozen.items() if p.ndim == 2 and "embed_tokens" not in n}
    assert {n for n in frozen if not torch.equal(frozen[n], after[n])} == matrices
    assert torch.equal(model.lm_head.weight, head) and torch.equal(model.get_input_embeddings().weight, table)
    assert all(not torch.equal(p, dict(core.named_parameters())[n]) for n, p in before.items() if p.ndim == 2)

    model.save_pretrained(tmp_path / "merged")
    for folder in (tmp_path / "merged", tmp_path / "gathered"):
        assert not list(folder.glob("adapter*"))
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert not [name for name in file.keys() if "lora" in name or "base_layer" in name]  # noqa: SIM118
        loaded = HaploForConditionalGeneration.from_pretrained(folder).eval()
        assert torch.allclose(logits(loaded, batch), learnt, atol=1e-5, rtol=0)


def test_what_is_trained_is_counted(tiny):
    model = tiny()
    whole = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == (whole, whole)
    count = add_adapters(model, LoraSettings(rank=2), seed=0)
    core = model.model
    others = (core.image_embedding, core.text_projection, core.pre_decoder, core.connector)
    expected = count + sum(p.numel() for part in others for p in part.parameters())
    assert trainable_parameters(model) == (expected, whole + count)


def test_the_start_depends_on_its_seed_alone(tiny):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = tiny(), tiny(), tiny()
    torch.set_rng_state(state)
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        add_adapters(model, LoraSettings(rank=4), seed)
        assert torch.equal(torch.get_rng_state(), state)
    starts = [
        torch.cat([p.flatten() for n, p in m.named_parameters() if "lora_A" in n]) for m in (first, second, other)
    ]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_a_merge_in_half_precision_rounds_once(tiny, packed):
    model = tiny()
    batch = packed(model)
    add_adapters(model, LoraSettings(rank=4, alpha=8.0), seed=7)
    train(model.train(), batch)
    model.eval().bfloat16()
    layer = model.model.language_model.layers[0].mlp.up_proj
    product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    expected = (layer.get_base_layer().weight.float() + 2.0 * product).bfloat16()
    merge_adapters(model)
    assert torch.equal(model.model.language_model.layers[0].mlp.up_proj.weight, expected)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_what_cannot_work_is_refused(tiny):
    model = tiny()
    with pytest.raises(UserError, match="rank is 16, but .* only 16 wide"):
        add_adapters(model, LoraSettings(rank=16), seed=0)
    assert all(p.requires_grad for p in model.parameters())
    add_adapters(model, LoraSettings(rank=4), seed=0)
    with pytest.raises(UserError, match="adapters already"):
        add_adapters(model, LoraSettings(rank=4), seed=0)
    nn.init.constant_(model.model.language_model.layers[0].mlp.up_proj.lora_B["default"].weight, float("nan"))
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj .*not finite"):
        merge_adapters(model)
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"alpha": 0.0}):
        with pytest.raises(ValidationError):
            LoraSettings(**wrong)
