"""A model packed for a CPU answers as before; it can neither be trained nor saved, and says so."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from haplovl.model import pack_for_cpu
from haplovl.model import packed as packing
from haplovl.model.cache import ROOM, GrowingLayer
from haplovl.model.decoder import eager_attention, matmul_attention
from haplovl.model.inherit import inherit
from haplovl.model.packed import PackedLinear, PackedPart, can_pack

# Sums in another order, as with any other matrix product: measured 7e-7 on logits of about 1.
TOLERANCE = 1e-5


@pytest.fixture
def inputs(processor):
    pictures = [torch.full((32, 32, 3), value, dtype=torch.uint8).numpy() for value in (10, 200, 90)]
    texts = ["<image>Where is the 3? <image>", "yes", "<image>two"]
    images = [pictures[:2], [], pictures[2:]]
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_model_gives_the_same_logits_and_answers(vision, language, model_settings, processor, inputs, biased):
    if biased:  # a language model with biases, whose three projections become one
        config = LlamaConfig(**{**language.config.to_dict(), "attention_bias": True, "mlp_bias": True})
        torch.manual_seed(5)
        language = LlamaForCausalLM(config).eval()
        for name, parameter in language.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    ids = (processor.image_token_id, len(processor.tokenizer), processor.video_token_id)
    plain = inherit(vision, copy.deepcopy(language), model_settings, *ids).eval()
    packed = pack_for_cpu(copy.deepcopy(plain))
    kinds = [type(module) for module in packed.modules()]
    assert kinds.count(PackedPart) == 2 * (3 + 3 + 2) and torch.nn.Linear not in kinds
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        torch.testing.assert_close(packed(**inputs).logits[real], plain(**inputs).logits[real], atol=TOLERANCE, rtol=0)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        assert torch.equal(packed.generate(**inputs, **options), plain.generate(**inputs, **options))


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no instructions for bfloat16")
def test_in_half_precision_it_differs_no_more_than_the_plain_model_does(model, inputs):
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        exact = model(**inputs).logits[real]
        half = copy.deepcopy(model).to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        plain = half(**inputs).logits[real].float()
        packed = pack_for_cpu(half)
        assert packed.config._attn_implementation == "matmul"
        found = packed(**inputs).logits[real].float()
    assert (found - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()


def test_without_the_instructions_for_its_precision_a_model_stays_as_it_is(model, inputs, monkeypatch):
    supported = SimpleNamespace(_linear_pointwise=None, _is_mkldnn_bf16_supported=lambda: False)
    monkeypatch.setattr(packing, "_OPS", supported)
    assert can_pack(torch.float32) and not can_pack(torch.bfloat16) and not can_pack(torch.float64)
    half = pack_for_cpu(model.to(torch.bfloat16))
    assert not any(isinstance(module, (PackedLinear, PackedPart)) for module in half.modules())


def test_a_packed_model_refuses_to_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match="packed for answering"):
        pack_for_cpu(model).save_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_matmul_attention_is_the_definition(heads, masked):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 9, 8), torch.randn(2, heads, 9, 8)
    mask = torch.where(torch.rand(2, 1, 5, 9) < 0.4, torch.finfo(torch.float32).min, 0.0) if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // heads
    expected, _ = eager_attention(module, query, key, value, torch.zeros(()) if mask is None else mask, 0.3)
    found, _ = matmul_attention(module, query, key, value, mask, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_growing_layer_holds_what_a_dynamic_layer_holds(rows):
    torch.manual_seed(0)
    ours, theirs = DynamicCache(), DynamicCache()
    ours.layers, order = [GrowingLayer()], torch.arange(rows).flip(0)
    with torch.inference_mode():
        for step, length in enumerate((5, 1, ROOM - 7, 1, 1, 3, ROOM, 1)):
            new = torch.randn(rows, 2, length, 4)
            pairs = [cache.update(new, -new, 0) for cache in (ours, theirs)]
            assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
            if step == 2:
                ours.crop(-4), theirs.crop(-4)
            if step == 4:
                ours.reorder_cache(order), theirs.reorder_cache(order)


def test_copies_of_a_growing_cache_go_separate_ways():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
        other = copy.deepcopy(layer)
        layer.update(torch.full((1, 1, 1, 2), 5.0), torch.ones(1, 1, 1, 2))
        kept = other.update(torch.full((1, 1, 1, 2), 7.0), torch.ones(1, 1, 1, 2))[0]
    assert layer.keys[0, 0, :, 0].tolist() == [1, 1, 1, 5] and kept[0, 0, :, 0].tolist() == [1, 1, 1, 7]
