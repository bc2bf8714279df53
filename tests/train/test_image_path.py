"""Attention from answers to pictures against weights computed by hand; the patch embedding's gradient; warnings."""

import copy

import pytest
import torch

from haplovl.data.loader import IGNORE, Batch
from haplovl.model.decoder import eager_attention
from haplovl.settings import LoraSettings
from haplovl.train import image_path
from haplovl.train.image_path import LOOKS, ImagePathWatch, attention_to_images, patch_gradient
from haplovl.train.lora import add_adapters
from haplovl.train.objectives import NextToken

KINDS = ["llama", "mistral", "qwen2", "qwen3", "released"]


def by_hand(model, batch, monkeypatch):
    """Means of the second row of `packed` from whole weights of the eager backend."""
    weights = []

    def keep(module, query, key, value, mask, scaling, **options):
        out, found = eager_attention(module, query, key, value, mask, scaling)
        weights.append((any(module is m for m in model.model.pre_decoder.modules()), found[1]))
        return out, found

    model = copy.deepcopy(model)
    model.set_attn_implementation({"": "eager", "text_config": "eager"})
    monkeypatch.setattr("haplovl.model.decoder.eager_attention", keep)
    for module in {type(m).__module__ for m in model.model.language_model.modules() if m.__module__.startswith("tr")}:
        monkeypatch.setattr(f"{module}.eager_attention_forward", keep, raising=False)
    with torch.no_grad():
        model.model(batch.input_ids, batch.pixel_values, batch.image_grids, document_ids=batch.document_ids)
    is_image = batch.input_ids[1] == model.config.image_token_id
    first = int(is_image.nonzero()[0])
    tokens = int(is_image.sum()) // 2
    # The positions before each word of an answer; document 1's first answer has no picture before it.
    second = first + tokens + 5
    queries = [first + tokens, first + tokens + 1, *range(second + tokens - 1, second + tokens + 2)]
    masses = {True: [], False: []}
    for is_pre, found in weights:
        masses[is_pre].append(found[:, queries][..., is_image].sum(-1).mean().item())
    return {
        "attention_pre": sum(masses[True]) / len(masses[True]),
        "attention_post": sum(masses[False]) / len(masses[False]),
    }, len(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_to_images_is_that_of_the_whole_weights(kind, tiny, packed, monkeypatch):
    model = tiny(kind)
    batch = packed(model)
    found = attention_to_images(model, batch)
    with monkeypatch.context() as patch:
        expected, layers = by_hand(model, batch, patch)
    assert layers == model.config.pre_config.num_hidden_layers + model.config.text_config.num_hidden_layers
    assert 0.05 < found["attention_post"] < 0.99
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_even_attention_counts_what_the_answers_see(tiny, packed):
    model = tiny()
    batch = packed(model)
    tokens = int((batch.input_ids[1] == model.config.image_token_id).sum()) // 2
    seen = [tokens + 3, tokens + 4, tokens + 2, tokens + 3, tokens + 4]
    expected = sum(tokens / count for count in seen) / len(seen)
    assert attention_to_images(model, batch)["attention_even"] == pytest.approx(expected, rel=1e-5)


def test_a_look_leaves_no_trace(tiny, packed):
    model = tiny().train()
    model.model.connector.eval()
    model.set_attn_implementation({"": "matmul", "text_config": "eager"})
    batch = packed(model)
    before = model(batch.input_ids, batch.pixel_values, batch.image_grids, document_ids=batch.document_ids).logits
    state = torch.get_rng_state()
    attention_to_images(model, batch)
    after = model(batch.input_ids, batch.pixel_values, batch.image_grids, document_ids=batch.document_ids).logits
    assert torch.equal(before, after) and torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.model.connector.training
    assert model.config._attn_implementation == "matmul"
    assert model.config.text_config._attn_implementation == "eager"
    broken = Batch(**{**vars(batch), "pixel_values": batch.pixel_values[:, :, :5]})
    with pytest.raises(ValueError):
        attention_to_images(model, broken)
    assert model.training and model.config._attn_implementation == "matmul"


def test_a_batch_without_an_answer_to_a_picture_tells_nothing(tiny, packed):
    model = tiny()
    batch = packed(model)
    words = Batch(batch.input_ids[:1], batch.labels[:1], batch.document_ids[:1], None, [], ["a"])
    assert attention_to_images(model, words) == {}
    silent = Batch(**{**vars(batch), "labels": torch.full_like(batch.labels, IGNORE)})
    assert attention_to_images(model, silent) == {}


def test_long_answers_are_looked_at_in_places(tiny, packed, monkeypatch):
    model = tiny()
    batch = packed(model)
    whole = attention_to_images(model, batch)
    monkeypatch.setattr(image_path, "MOST_QUERIES", 2)
    some = attention_to_images(model, batch)
    assert some != whole and some == pytest.approx(whole, rel=0.5)


def test_with_adapters_and_in_half_precision(tiny, packed):
    model = tiny()
    batch = packed(model)
    plain = attention_to_images(model, batch)
    add_adapters(model, LoraSettings(rank=2, dropout=0.5), seed=0)
    assert attention_to_images(model.train(), batch) == plain
    assert attention_to_images(model.bfloat16(), batch) == pytest.approx(plain, rel=0.02)


def test_the_gradient_of_the_patch_embedding(tiny, packed):
    model = tiny()
    objective, batch = NextToken(model), packed(model)
    assert patch_gradient(objective) is None
    objective(batch)["loss"].backward()
    weight = model.model.image_embedding.patch.weight
    assert patch_gradient(objective) == pytest.approx(weight.grad.norm().item()) and weight.grad.norm() > 0
    assert patch_gradient(model) == patch_gradient(objective)
    weight.requires_grad_(False)
    assert patch_gradient(objective) is None


def test_looks_are_taken_at_the_first_step_and_regularly():
    assert [step for step in range(1, 12) if ImagePathWatch(every=5).due(step)] == [1, 6, 11]
    assert ImagePathWatch(every=1).due(7)


def test_a_dead_image_path_is_told_once_until_it_lives_again():
    watch = ImagePathWatch()
    alive = {"patch_gradient_share": 0.01, "attention_pre": 0.3, "attention_post": 0.1, "attention_even": 0.5}
    dead = {**alive, "patch_gradient_share": 0.0, "attention_post": 1e-4}
    looks = [*[dead] * (LOOKS - 1), alive, *[dead] * (LOOKS + 3), alive, *[dead] * LOOKS]
    told = [watch.note(look) for look in looks]
    places = [index for index, warnings in enumerate(told) if warnings]
    assert places == [2 * LOOKS - 1, 3 * LOOKS + 3]
    gradient, attention = told[places[0]]
    assert "pictures are not being learnt from" in gradient and "0.0e+00" in gradient
    assert "answers do not look at pictures" in attention and "0.01%" in attention and "50%" in attention


def test_steps_without_a_look_or_without_pictures_do_not_count():
    watch = ImagePathWatch()
    dead = {"patch_gradient_share": 0.0}
    assert [bool(watch.note(figures)) for figures in [dead, {}, dead, {}, dead]] == [False] * 4 + [True]
