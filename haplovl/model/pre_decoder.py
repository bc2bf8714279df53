"""The pre-decoder: a vision transformer's layers over one sequence of image and text tokens (early fusion)."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from haplovl.model.configuration import HaploPreDecoderConfig


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of queries or keys: x [B, heads, L, D], cos and sin [B, 1, L, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


class HaploRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, computed in float32."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B, L] → cos, sin [B, 1, L, head_dim]."""
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        angles = positions.float()[:, None, :, None] * self.theta**-exponent
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class HaploPreDecoderAttention(nn.Module):
    """Multi-head attention with biased projections and rotary positions."""

    is_causal = False  # the mask says everything

    def __init__(self, config: HaploPreDecoderConfig, cache_index: int) -> None:
        super().__init__()
        self.cache_index = cache_index
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        backend: str,
        cache: Cache | None,
    ) -> torch.Tensor:
        """x [B, L, H] → [B, L, H]; keys and values go into `cache` where one is given."""
        batch, length, _ = x.shape
        split = (batch, length, self.heads, self.head_dim)
        query, key, value = (f(x).view(split).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.cache_index)
        attend = eager_attention_forward if backend == "eager" else ALL_ATTENTION_FUNCTIONS[backend]
        out, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.out_proj(out.reshape(batch, length, -1))


class HaploPreDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer with an ungated MLP, as CLIP's."""

    def __init__(self, config: HaploPreDecoderConfig, cache_index: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = HaploPreDecoderAttention(config, cache_index)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        backend: str,
        cache: Cache | None,
    ) -> torch.Tensor:
        """x [B, L, H] → [B, L, H]."""
        x = x + self.self_attn(self.layer_norm1(x), rotary, mask, backend, cache)
        return x + self.fc2(self.activation(self.fc1(self.layer_norm2(x))))


class HaploPreDecoder(nn.Module):
    """The stack of pre-decoder layers between the embeddings and the connector."""

    def __init__(self, config: HaploPreDecoderConfig, first_cache_index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.pre_layernorm = nn.LayerNorm(width, eps=eps) if config.pre_layernorm else nn.Identity()
        self.layers = nn.ModuleList(
            HaploPreDecoderLayer(config, first_cache_index + i) for i in range(config.num_hidden_layers)
        )
        self.rotary = HaploRotaryEmbedding(width // config.num_attention_heads, config.rope_theta)
        self.final_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        backend: str,
        cache: Cache | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x [B, L, H], positions [B, L], mask as the attention `backend` takes it → [B, L, H].

        `all_hidden_states` collects the input of every layer and the last layer's output before the final norm.
        """
        x = self.pre_layernorm(x)
        rotary = self.rotary(positions, x.dtype)
        for layer in self.layers:
            if all_hidden_states is not None:
                all_hidden_states.append(x)
            x = layer(x, rotary, mask, backend, cache)
        if all_hidden_states is not None:
            all_hidden_states.append(x)
        return self.final_layernorm(x)
