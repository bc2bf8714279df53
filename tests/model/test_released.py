"""An imported checkpoint computes what the public reference computed (tests/golden), through the Auto classes alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from haplovl.model.import_released import import_released
from haplovl.model.released_layout import released_name

GOLDEN = Path(__file__).parent.parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = {**MANIFEST["cases"], **{f"variant_{name}": case for name, case in MANIFEST["variant_cases"].items()}}
TRAINED = [name for name, case in CASES.items() if "grad_l2_norms" in case]

# As tests/golden/README.md suggests: float32 sums in another order move the reference's own logits by 9e-6. Measured
# here: logits 1.2e-5, hidden states 9e-6, pixels and loss 0, gradients 3e-6 of their largest entry, their norms 5e-6.
LOGITS, HIDDEN, PIXELS, LOSS, GRADIENT = 1e-4, 5e-5, 1e-5, 1e-5, 1e-3
INPUTS = {"input_ids", "attention_mask", "attention_allowed", "pixel_values", "pixel_values_videos"}
NEW_TOKENS = MANIFEST["num_new_tokens"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory, released_source):
    """`load(case, backend)`: model and processor of a case; every checkpoint is imported and loaded once."""
    folders, models, processors = {}, {}, {}

    def load(case, backend="eager"):
        overrides = case["config_overrides"]
        key = (case["model_dir"], json.dumps(overrides))
        if key not in folders:
            place = tmp_path_factory.mktemp("released")
            import_released(released_source(place / "source", case["model_dir"], **overrides), place / "ours")
            folders[key], processors[key] = place / "ours", AutoProcessor.from_pretrained(place / "ours")
        if (key, backend) not in models:
            model = AutoModelForImageTextToText.from_pretrained(folders[key], attn_implementation=backend)
            models[key, backend] = model.eval()
        return models[key, backend], processors[key]

    return load


def vectors(case):
    """The arrays of a case as tensors; what a variant of the model is given lies in another case's file."""
    with np.load(GOLDEN / case["file"]) as content:
        arrays = {name: torch.from_numpy(content[name]) for name in content.files}
    with np.load(GOLDEN / case.get("inputs_from", case["file"])) as content:
        return arrays | {name: torch.from_numpy(content[name]) for name in INPUTS & {*content.files}}


def inputs(case, processor):
    images = [Image.open(GOLDEN / path) for path in case["images"]]
    frames = [Image.open(GOLDEN / path) for path in case["video_frames"]]
    return processor(
        text=case["texts"], images=images or None, videos=[frames] if frames else None, padding=True,
        return_tensors="pt",
    )  # fmt: skip


def assert_near(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_processor_gives_the_references_tokens_and_pixels(name, imported):
    case = CASES[name]
    batch, expected = inputs(case, imported(case)[1]), vectors(case)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert {key for key in batch if "pixel" in key} == {key for key in expected if "pixel" in key}
    for key in ("pixel_values", "pixel_values_videos"):
        if key in expected:
            assert_near(batch[key], expected[key], PIXELS)


@pytest.mark.parametrize("name", CASES)
def test_both_decoders_are_given_the_references_mask(name, imported):
    case = CASES[name]
    model, processor = imported(case)
    seen = []
    hooks = [
        model.model.pre_decoder.register_forward_pre_hook(lambda _, given: seen.append(given[2])),
        model.model.language_model.register_forward_pre_hook(
            lambda _, given, named: seen.append(named["attention_mask"]), with_kwargs=True
        ),
    ]
    with torch.inference_mode():
        model(**inputs(case, processor))
    for hook in hooks:
        hook.remove()
    allowed = vectors(case)["attention_allowed"].bool()
    for additive in seen:
        assert torch.equal((additive == 0)[:, 0].expand_as(allowed), allowed)
    assert len(seen) == 2


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_every_hidden_state_and_logit_is_the_references(name, backend, imported):
    case = CASES[name]
    model, processor = imported(case, backend)
    batch, expected = inputs(case, processor), vectors(case)
    with torch.inference_mode():
        out = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    assert_near(out.logits[real], expected["logits"][real], LOGITS)
    states = {
        "last_hidden_state": out.hidden_states[-1],
        "hidden_connector_out": out.hidden_states[0],
        "hidden_pre_norm_out": out.pre_hidden_states[0],
    }
    for key, state in states.items():
        if key in expected:
            assert_near(state[real], expected[key][real], HIDDEN)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_generation_gives_the_references_tokens(name, backend, use_cache, imported):
    case = CASES[name]
    model, processor = imported(case, backend)
    out = model.generate(
        **inputs(case, processor), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, use_cache=use_cache,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    expected = vectors(case)
    ours = out.sequences[:, -NEW_TOKENS:]
    assert torch.equal(ours, expected["generated_cache" if use_cache else "generated_nocache"])
    if "generated_logits" in expected:
        assert_near(torch.stack(out.logits, dim=1), expected["generated_logits"], LOGITS)
    assert processor.batch_decode(ours) == case["generated_text"]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TRAINED)
def test_loss_and_every_gradient_are_the_references(name, backend, imported):
    case = CASES[name]
    model, processor = imported(case, backend)
    expected = vectors(case)
    model.zero_grad()
    loss = model(**inputs(case, processor), labels=expected["labels"]).loss
    loss.backward()
    assert_near(loss.detach(), expected["loss"][0], LOSS)
    layers = model.config.pre_config.num_hidden_layers
    gradients = {released_name(key, layers): parameter.grad for key, parameter in model.named_parameters()}
    norms = {key: gradient.norm().item() for key, gradient in gradients.items()}
    assert norms == pytest.approx(case["grad_l2_norms"], rel=GRADIENT)
    full = {key.removeprefix("grad."): value for key, value in expected.items() if key.startswith("grad.")}
    assert len(full) == 5
    for key, value in full.items():
        assert_near(gradients[key].reshape(value.shape), value, GRADIENT * value.abs().max().item())


def test_a_conversation_becomes_the_references_text_and_inputs(imported, monkeypatch):
    case = CASES["chat_template"]
    model, processor = imported(case)
    monkeypatch.chdir(GOLDEN)  # the conversation names its picture by a path from there
    chat, options = case["conversation"], {"add_generation_prompt": True}
    assert processor.apply_chat_template(chat, tokenize=False, **options) == case["texts"]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **options)
    expected = vectors(case)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert_near(batch["pixel_values"], expected["pixel_values"], PIXELS)
    answer = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert torch.equal(answer[:, -NEW_TOKENS:], expected["generated_cache"])


@pytest.mark.parametrize("name", ["two_images", "batch2_left_pad", "video4"])
def test_flex_attention_gives_the_references_logits(name, imported):
    case = CASES[name]
    model, processor = imported(case, "flex_attention")
    batch, expected = inputs(case, processor), vectors(case)
    with torch.inference_mode():
        logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert_near(logits[real], expected["logits"][real], LOGITS)


def test_the_vectors_are_those_of_the_manifest():
    assert len(CASES) == 17
    assert len(TRAINED) == 3
    for name, case in CASES.items():
        shapes = {key: shape[1:] for key, shape in case["shapes"].items()}
        with np.load(GOLDEN / case["file"]) as content:
            assert {key: list(content[key].shape) for key in content.files} == shapes, name
