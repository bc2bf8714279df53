"""Every attention backend gives what eager gives, or refuses before anything is computed.

Flash kernels need a GPU. Here transformers' own flash code runs around two functions in plain torch that mean what the
kernels mean; nothing else is replaced.
"""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.cache_utils import DynamicCache, StaticCache

from haplovl.model.layout import ImageGrid, single_tile

# fp32 with kernels that add in another order; logits reach 0.7, measured worst case 2e-7.
TOLERANCE = 5e-6
INCREMENTS = [(0.0, 1.0), (0.25, 0.5), (0.0, 0.0)]
PICTURE, FRAMES = ImageGrid(1, 2, 1, 2, 3, 4, 2, 3), 2


def set_backends(model, pre, post=None):
    """Sets the configurations themselves, as set_attn_implementation checks for installed kernels."""
    model.config._attn_implementation = pre
    model.config.text_config._attn_implementation = post or pre


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def media(model):
    """A row that begins with a picture: picture, picture, text, video, text; and what it shows."""
    config = model.config
    sizes = [grid.tokens(True, True) for grid in (PICTURE, single_tile(4, 4))]
    video = [config.video_token_id] * FRAMES * config.tokens_per_image
    ids = torch.tensor([[config.image_token_id] * sum(sizes) + [11, 12] + video + [13, 14, 15]])
    return {
        "input_ids": ids,
        "pixel_values": noise(3, 3, 32, 32),
        "image_grids": [PICTURE, single_tile(4, 4)],
        "pixel_values_videos": noise(1, FRAMES, 3, 32, 32),
    }


def text(rows, length=9):
    return torch.arange(20, 20 + rows * length).view(rows, length)


def left_padded(ids, real):
    mask = torch.arange(ids.shape[1])[None] >= ids.shape[1] - torch.tensor(real)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def prefill(model):
    return model(**media(model)).logits


def text_rows(model):
    return model(text(2)).logits


def one_text_row(model):
    return model(text(1)).logits


def padded(model):
    inputs = media(model)
    length = inputs["input_ids"].shape[1]
    both = left_padded(text(2, length + 3), [length, 5])
    both["input_ids"][:1, 3:] = inputs.pop("input_ids")
    return model(**inputs, **both).logits[both["attention_mask"].bool()]


def padded_text(model):
    inputs = left_padded(text(2), [9, 4])
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def packed(model):
    inputs = media(model)
    own = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([text(1, 4), inputs["input_ids"], text(1, 3)], dim=1)
    return model(**inputs, document_ids=torch.tensor([[0] * 4 + [1] * own + [2] * 3])).logits


def packed_text(model):
    return model(text(2), document_ids=torch.tensor([[0] * 4 + [1] * 5, [5] * 2 + [6] * 6 + [-1]])).logits


def on_a_cache(model, cache=None, backends=None):
    """Pictures and video, then a chunk with a picture, then text, then single tokens."""
    inputs, image = media(model), model.config.image_token_id
    found = [model(**inputs, use_cache=True, past_key_values=cache)]
    cache = found[0].past_key_values
    if backends is not None:
        set_backends(model, *backends)
    else:
        ids = torch.tensor([[image] * model.config.tokens_per_image + [41]])
        found.append(model(ids, noise(1, 3, 32, 32), past_key_values=cache))
    for step in (text(1, 3), torch.tensor([[42]]), torch.tensor([[43]])):
        found.append(model(step, past_key_values=cache))
    return torch.cat([out.logits for out in found], dim=1)


def on_a_static_cache(model):
    return on_a_cache(model, StaticCache(model.config.text_config, max_cache_len=130))


def padded_on_a_cache(model):
    inputs, cache = left_padded(text(2, 12), [12, 7]), DynamicCache()
    mask, found = inputs["attention_mask"], []
    for start, stop in ((0, 6), (6, 10), (10, 11), (11, 12)):
        ids = inputs["input_ids"][:, start:stop]
        found.append(model(ids, attention_mask=mask[:, :stop], past_key_values=cache).logits)
    return torch.cat(found, dim=1)[mask.bool()]


EVERYTHING = [
    prefill, text_rows, one_text_row, padded, padded_text, packed, packed_text, on_a_cache, on_a_static_cache,
    padded_on_a_cache,
]  # fmt: skip


def equal(model, run, *backends):
    with torch.inference_mode():
        set_backends(model, "eager")
        expected = run(model)
        set_backends(model, *backends)
        torch.testing.assert_close(run(model), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("post_mask", ["mixed", "causal"])
@pytest.mark.parametrize("run", EVERYTHING)
def test_sdpa_gives_what_eager_gives(model, run, post_mask):
    model.config.post_mask = post_mask
    for increments in INCREMENTS:
        model.config.pre_config.rotary_increment, model.config.post_rotary_increment = increments
        equal(model, run, "sdpa")
    equal(model, run, "eager", "sdpa")
    equal(model, run, "sdpa", "eager")


@pytest.mark.parametrize("post_mask", ["mixed", "causal"])
@pytest.mark.parametrize("run", EVERYTHING)
def test_documents_one_by_one_give_what_eager_gives(model, run, post_mask):
    model.config.post_mask = post_mask
    equal(model, run, "documents")
    equal(model, run, "eager", "documents")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("run", EVERYTHING)
def test_flex_attention_gives_what_eager_gives(model, run):
    model.config.post_rotary_increment = 0.5
    equal(model, run, "flex_attention")
    model.config.post_mask = "causal"
    equal(model, run, "sdpa", "flex_attention")


def test_any_positions_of_ones_own_leave_a_row_one_document(model):
    jumping = torch.tensor([[[0, 1, 5, 6, 6, 3, 0, 1, 2]]]).expand(2, 1, 9)
    for positions in (jumping, jumping / 2):
        equal(model, lambda model, own=positions: model(text(1), position_ids=own).logits, "sdpa")


def test_the_two_decoders_can_have_different_backends(model):
    model.set_attn_implementation({"": "sdpa", "text_config": "eager"})
    assert (model.config._attn_implementation, model.config.text_config._attn_implementation) == ("sdpa", "eager")
    with torch.inference_mode():
        mixed = prefill(model)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(mixed, prefill(model), atol=TOLERANCE, rtol=0)


def test_a_window_that_is_wide_enough_changes_nothing(model):
    from transformers import MistralConfig

    from haplovl.model import HaploForConditionalGeneration

    config = copy.deepcopy(model.config)
    config.text_config = MistralConfig(
        vocab_size=config.text_config.vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=200,
    )  # fmt: skip
    mistral = HaploForConditionalGeneration(config).eval()
    equal(mistral, on_a_cache, "sdpa")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def untouched(model):
    """Fails a test in which anything was embedded."""
    calls = []
    for part in (model.model.image_embedding, model.get_input_embeddings()):
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    yield
    assert not calls


def refuses(model, words, *backends, **inputs):
    set_backends(model, *backends)
    with pytest.raises(ValueError, match=words):
        model(**inputs)


@pytest.mark.parametrize("backends", [("nonsense", "sdpa"), ("sdpa", "nonsense"), ("sdpa", "paged|sdpa")])
def test_an_unknown_backend_is_refused(model, untouched, backends):
    refuses(model, "unknown attention backend", *backends, input_ids=text(1))
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")


@pytest.mark.parametrize("backends", [("flex_attention", "sdpa"), ("sdpa", "flex_attention")])
def test_flex_attention_with_gradients_is_refused_on_a_cpu(model, untouched, backends):
    refuses(model, "no backward on a CPU", *backends, input_ids=text(1))


def test_packed_documents_and_a_cache_are_refused(model, untouched):
    packed = {"input_ids": text(1), "document_ids": torch.zeros(1, 9)}
    refuses(model, "cannot be combined", "sdpa", **packed, use_cache=True)
    refuses(model, "cannot be combined", "sdpa", **packed, past_key_values=DynamicCache())


# --- gradients ------------------------------------------------------------------------------------------------------


def packed_inputs(model):
    """Three documents and padding in one row, two in the other; the second document holds all media."""
    inputs = media(model)
    own = inputs["input_ids"].shape[1]
    ids = torch.cat([text(1, 4), inputs["input_ids"], text(1, 5)], dim=1)
    inputs["input_ids"] = torch.cat([ids, text(1, own + 9)])
    documents = torch.tensor([[0] * 4 + [1] * own + [2] * 3 + [-1] * 2, [0] * 7 + [1] * (own + 2)])
    labels = torch.where((inputs["input_ids"] < 60) & (documents >= 0), inputs["input_ids"], -100)
    return {**inputs, "document_ids": documents, "labels": labels}


def loss_and_gradients(model, backend, freeze=False, pack=False, **checkpointing):
    model = copy.deepcopy(model).train()
    set_backends(model, backend)
    if checkpointing:
        model.activation_checkpointing_enable(checkpointing)
    if freeze:  # all that comes before the first layer
        core = model.model
        for part in (core.image_embedding, core.text_projection, core.language_model.embed_tokens):
            part.requires_grad_(False)
        core.pre_decoder.pre_layernorm.requires_grad_(False)
    if pack:
        loss = model(**packed_inputs(model)).loss
    else:
        inputs = media(model)
        length = inputs["input_ids"].shape[1]
        both = left_padded(text(2, length + 3), [length, 5])
        both["input_ids"][:1, 3:] = inputs.pop("input_ids")
        loss = model(**inputs, **both, labels=both["input_ids"]).loss  # the first word is predicted by padding
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # fp32 sums over some hundred tokens; measured worst case 7e-7 of a tensor's largest value.
        torch.testing.assert_close(found[name], value, atol=2e-5 * float(value.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("freeze", [False, True])
def test_sdpa_has_the_gradients_of_eager_with_padding(model, freeze):
    close_gradients(loss_and_gradients(model, "sdpa", freeze), loss_and_gradients(model, "eager", freeze))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_documents_one_by_one_have_the_gradients_of_eager(model, key_heads, freeze):
    from haplovl.model import HaploForConditionalGeneration

    config = copy.deepcopy(model.config)
    config.text_config.num_key_value_heads = key_heads
    torch.manual_seed(0)
    model = HaploForConditionalGeneration(config)
    found, expected = (loss_and_gradients(model, name, freeze, pack=True) for name in ("documents", "eager"))
    close_gradients(found, expected)
    checkpointed = loss_and_gradients(model, "documents", freeze, pack=True, use_reentrant=False)
    assert all(torch.equal(checkpointed[name], value) for name, value in found.items())


def test_documents_that_are_torn_apart_are_refused(model, untouched):
    documents = torch.tensor([[0] * 5 + [1] * 3 + [0]])
    refuses(model, "side by side", "documents", input_ids=text(1), document_ids=documents)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(model, backend, reentrant):
    plain = loss_and_gradients(model, backend)
    checkpointed = loss_and_gradients(model, backend, use_reentrant=reentrant)
    assert all(torch.equal(checkpointed[name], value) for name, value in plain.items())
    assert checkpointed.keys() == plain.keys()


def test_gradient_checkpointing_and_a_cache_are_refused(model, untouched):
    model.train().activation_checkpointing_enable()
    refuses(model, "gradient checkpointing", "sdpa", input_ids=text(1), use_cache=True)


# --- flash kernels --------------------------------------------------------------------------------------------------


def flash_kernel(q, k, v, softmax_scale, causal, **_):
    """What flash_attn_func means: [B, L, heads, D], causal aligned to the bottom right."""
    assert causal
    shape = (q.shape[1], k.shape[1])
    seen = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2), None


def flash_varlen_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """What flash_attn_varlen_func means: sequences laid end to end, each on its own: [tokens, heads, D]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = [ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k)]
    assert [max(lengths[0]), max(lengths[1])] == [int(max_seqlen_q), int(max_seqlen_k)]
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    found = [flash_kernel(*(part[None] for part in own), softmax_scale, causal)[0][0] for own in parts]
    return torch.cat(found), None


@pytest.fixture(params=["flash_attention_2", "flash_attention_4"])
def flash(request, monkeypatch):
    """The name of a flash backend whose kernels are replaced."""
    process = flash_utils._lazy_define_process_function(flash_varlen_kernel)
    for name, value in {
        "_loaded_implementation": request.param,
        "_flash_fn": flash_kernel,
        "_flash_varlen_fn": flash_varlen_kernel,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": flash_utils._pad_input,
        "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": process,
    }.items():
        monkeypatch.setattr(flash_utils, name, value)
    return request.param


@pytest.mark.parametrize("run", [text_rows, one_text_row, padded_text, packed_text, padded_on_a_cache])
def test_flash_gives_what_eager_gives_on_text(model, flash, run):
    equal(model, run, flash)
    equal(model, run, flash, "sdpa")
    equal(model, run, "sdpa", flash)


@pytest.mark.parametrize("run", [prefill, padded, packed, on_a_cache, text_rows, padded_on_a_cache])
@pytest.mark.parametrize("increments", INCREMENTS)
def test_flash_serves_a_causal_post_decoder_with_images(model, flash, run, increments):
    model.config.pre_config.rotary_increment, model.config.post_rotary_increment = increments
    model.config.post_mask = "causal"
    equal(model, run, "sdpa", flash)


@pytest.mark.parametrize("post_mask", ["mixed", "causal"])
def test_flash_goes_on_from_a_cache_that_another_backend_filled(model, flash, post_mask):
    model.config.post_mask = post_mask
    with torch.inference_mode():
        set_backends(model, "eager")
        expected = on_a_cache(model, backends=["eager"])
        set_backends(model, "sdpa")
        torch.testing.assert_close(on_a_cache(model, backends=[flash]), expected, atol=TOLERANCE, rtol=0)


def test_flash_needs_no_setting_in_the_pre_decoders_configuration(model, flash):
    with torch.inference_mode():
        set_backends(model, "eager")
        expected = text_rows(model)
        model.config._attn_implementation_internal = flash  # as set_attn_implementation({"": …}) sets it
        torch.testing.assert_close(text_rows(model), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("part", ["both", "pre", "post"])
def test_flash_refuses_what_it_cannot_serve(model, flash, untouched, part):
    backends = {"both": (flash, flash), "pre": (flash, "sdpa"), "post": ("sdpa", flash)}[part]
    refuses(model, "causal inside images", *backends, **media(model))
    static = StaticCache(model.config.text_config, max_cache_len=20)
    refuses(model, "static cache", *backends, input_ids=text(1), past_key_values=static)
    documents = torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    both = left_padded(text(2), [9, 4])
    refuses(model, "packed documents or padding, not both", *backends, **both, document_ids=documents)
    documents[0, -1] = 0
    refuses(model, "side by side", *backends, input_ids=text(2), document_ids=documents)
    if part != "post":
        model.config.post_mask = "causal"
        refuses(model, "causal inside images", *backends, **media(model))


def test_flash_refuses_a_chunk_with_an_image_on_a_filled_cache(model, flash):
    with torch.inference_mode():
        cache = model(**media(model), use_cache=True).past_key_values
    image = torch.tensor([[model.config.image_token_id] * model.config.tokens_per_image + [41]])
    before = cache.get_seq_length()
    for backends in ((flash, flash), (flash, "sdpa"), ("sdpa", flash)):
        refuses(
            model, "causal inside images", *backends,
            input_ids=image, pixel_values=noise(1, 3, 32, 32), past_key_values=cache,
        )  # fmt: skip
    assert cache.get_seq_length() == before
