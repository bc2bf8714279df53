"""Where a sequence ends: the language model's context, its sliding window, and the room of a static cache."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, StaticCache

from haplovl.model.inherit import inherit

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
STATIC = {"cache_implementation": "static"}


def test_a_static_cache_that_is_full_is_refused(model):
    cache = StaticCache(model.config, max_cache_len=10)
    with pytest.raises(ValueError, match="room for 10 tokens, but the sequence has 11"):
        model.generate(input_ids=torch.arange(20, 28)[None], **GREEDY, past_key_values=cache)


def test_a_prompt_longer_than_the_context_is_refused(model):
    model.config.text_config.max_position_embeddings = 20
    ids = torch.tensor([[11, *[model.config.image_token_id] * model.config.tokens_per_image, 12]])
    with pytest.raises(ValueError, match="has 23 tokens, more than the language model's context of 20"):
        model.generate(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32), **GREEDY)


@pytest.fixture
def windowed(vision, model_settings, processor):
    """A model of which the language model attends within twelve tokens only."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    vocabulary = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    config = MistralConfig(vocab_size=vocabulary[1], sliding_window=12, num_key_value_heads=2, **sizes, **ids)
    return inherit(vision, MistralForCausalLM(config), model_settings, *vocabulary).eval()


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, STATIC, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}]
)
@pytest.mark.parametrize("limit", ["context", "window"])
def test_generation_ends_where_the_context_is_full(request, options, limit):
    model = request.getfixturevalue("windowed" if limit == "window" else "model")
    if limit == "context":
        model.config.text_config.max_position_embeddings = 12
    ids = torch.arange(20, 30)[None]
    assert model.generate(input_ids=ids, **GREEDY, **options).shape[1] == 13  # the last token is not fed back
    turn = {"max_new_tokens": 4, "return_dict_in_generate": True}
    first = model.generate(input_ids=ids[:, :4], **GREEDY | turn)
    later = {"input_ids": ids[:, :3], "attention_mask": torch.ones(1, 10), "past_key_values": first.past_key_values}
    assert model.generate(**later, **GREEDY).shape[1] == 3 + 3
