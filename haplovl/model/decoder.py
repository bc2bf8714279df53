"""A stack of pre-norm transformer layers: the pre-decoder, and the post-decoder of released checkpoints."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from haplovl.model.configuration import HaploDecoderConfig


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of queries or keys: x [B, heads, L, D], cos and sin [B, 1, L, D].

    The first half of `sin` is negated by HaploRotaryEmbedding, which saves negating half of x in every layer.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin


class HaploRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, computed in float32 whatever the model's precision."""

    def __init__(self, config: HaploDecoderConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B, L] → cos, sin [B, 1, L, head_dim]; see `rotate` for the sign of sin."""
        parameters, dim = self.config.rope_parameters, self.config.head_dim
        kind, scale = parameters.get("rope_type", "default"), 1.0
        if kind == "default":
            exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
            frequency = parameters["rope_theta"] ** -exponent
        else:
            longest = int(positions.max()) + 1
            frequency, scale = ROPE_INIT_FUNCTIONS[kind](self.config, positions.device, seq_len=longest)
        angles = positions.float()[:, None, :, None] * frequency.float()
        cos, sin = angles.cos() * scale, angles.sin() * scale
        return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


class HaploRMSNorm(nn.Module):
    """Root mean square normalisation in the precision of its input, as released checkpoints were trained."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] → [..., H]."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def make_norm(config: HaploDecoderConfig, eps: float | None = None) -> nn.Module:
    """The normalisation that a configuration names."""
    cls = nn.LayerNorm if config.norm == "layernorm" else HaploRMSNorm
    return cls(config.hidden_size, eps=config.norm_eps if eps is None else eps)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition that every other backend is checked against; softmax in float32.

    Shapes: query [B, heads, L, D], key and value [B, key heads, K, D], mask [B, 1, L, K] additive → [B, L, heads, D].
    """
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def matmul_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by plain matrix products: on a CPU the fastest in bf16 and for single tokens.

    Softmax adds up in float32 and rounds once, as the definition does. Keys shared by several heads are not repeated.
    Shapes as in `eager_attention`; without a mask every query sees every key.
    """
    batch, heads, length, width = query.shape
    shared, keys = (batch, key.shape[1], -1, width), key.shape[2]
    if attention_mask is None and hasattr(key, "room"):
        key, value = key.room, value.room  # one shape for many tokens, see GrowingLayer
    scores = (query * scaling).reshape(shared) @ key.transpose(2, 3)
    if key.shape[2] > keys:
        scores[..., keys:] = -torch.inf
    if attention_mask is not None:
        scores = (scores.unflatten(2, (-1, length)) + attention_mask[:, :, None]).flatten(2, 3)
    out = scores.softmax(dim=-1) @ value
    return out.reshape(batch, heads, length, -1).transpose(1, 2), None


AttentionInterface.register("matmul", matmul_attention)


class HaploAttention(nn.Module):
    """Attention with biased projections, rotary positions and as many key heads as configured."""

    is_causal = True  # used by a backend only where it is given no mask

    def __init__(self, config: HaploDecoderConfig, cache_index: int) -> None:
        super().__init__()
        self.config = config
        self.cache_index = cache_index
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, keys = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(width, keys)
        self.v_proj = nn.Linear(width, keys)
        self.out_proj = nn.Linear(config.num_attention_heads * self.head_dim, width)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Any,
        backend: str,
        cache: Cache | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """x [B, L, H] → [B, L, H]; keys and values go into `cache` where one is given."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        query, key, value = (f(x).view(split).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.cache_index)
        # By this call transformers also recognises that the backend of a model can be set.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention)
        out, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0, is_causal=True, **options)
        return self.out_proj(out.reshape(batch, length, -1))


class HaploDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer; its MLP is ungated as CLIP's, or gated as a language model's."""

    def __init__(self, config: HaploDecoderConfig, cache_index: int) -> None:
        super().__init__()
        self.layer_norm1 = make_norm(config)
        self.self_attn = HaploAttention(config, cache_index)
        self.layer_norm2 = make_norm(config)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size) if config.gated_mlp else None
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Any,
        backend: str,
        cache: Cache | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """x [B, L, H] → [B, L, H]."""
        x = x + self.self_attn(self.layer_norm1(x), rotary, mask, backend, cache, options)
        y = self.layer_norm2(x)
        if self.gate is None:
            return x + self.fc2(self.activation(self.fc1(y)))
        return x + self.fc2(self.activation(self.gate(y)) * self.fc1(y))


class HaploPreDecoder(nn.Module):
    """The stack of layers between the embeddings and the connector."""

    def __init__(self, config: HaploDecoderConfig, first_cache_index: int) -> None:
        super().__init__()
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.pre_layernorm_eps or config.norm_eps)
            if config.pre_layernorm
            else nn.Identity()
        )
        self.layers = nn.ModuleList(
            HaploDecoderLayer(config, first_cache_index + i) for i in range(config.num_hidden_layers)
        )
        self.rotary = HaploRotaryEmbedding(config)
        self.final_layernorm = make_norm(config) if config.final_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        mask: Any,
        backend: str,
        cache: Cache | None = None,
        options: dict[str, Any] | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x [B, L, H], positions [B, L], mask and options as `MixedMask.for_backend` gives them → [B, L, H].

        `all_hidden_states` collects the input of every layer and the last layer's output before the final norm.
        """
        x = self.pre_layernorm(x)
        rotary = self.rotary(positions, x.dtype)
        for layer in self.layers:
            if all_hidden_states is not None:
                all_hidden_states.append(x)
            x = layer(x, rotary, mask, backend, cache, options or {})
        if all_hidden_states is not None:
            all_hidden_states.append(x)
        return self.final_layernorm(x)


class HaploDecoderModel(PreTrainedModel):
    """A language model without head and without word embeddings: the post-decoder of released checkpoints."""

    config_class = HaploDecoderConfig
    config: HaploDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HaploDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HaploDecoderConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(HaploDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.rotary = HaploRotaryEmbedding(config)
        self.norm = make_norm(config) if config.final_norm else nn.Identity()
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """inputs_embeds [B, L, H], position_ids [B, L], the mask as `MixedMask.for_backend` gives it → [B, L, H]."""
        x, states = inputs_embeds, []
        rotary = self.rotary(position_ids, x.dtype)
        for layer in self.layers:
            states.append(x)
            x = layer(x, rotary, attention_mask, self.config._attn_implementation, past_key_values, options)
        x = self.norm(x)
        hidden = (*states, x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values, hidden_states=hidden)
