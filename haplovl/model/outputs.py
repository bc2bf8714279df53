"""What the model returns."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class HaploModelOutput(ModelOutput):
    """Hidden states of the post-decoder [B, L, H], the filled cache, and on request the states between the layers.

    `pre_hidden_states`: the input of every pre-decoder layer and the last one's output before the final norm.
    `hidden_states`: the language model's own, the last one after its final norm.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    pre_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class HaploCausalLMOutput(ModelOutput):
    """Loss (mean over supervised tokens), logits [B, kept, V], and as HaploModelOutput."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    pre_hidden_states: tuple[torch.Tensor, ...] | None = None
