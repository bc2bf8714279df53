"""Attention weights of a few tokens, taken while the model runs: how much each of them looks at every other token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from haplovl.model.modeling import HaploForConditionalGeneration

Take = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Gets, layer by layer: `pre` or `post` (the decoder), weights [heads, queries, keys] in float32, and which keys the
queries can see, [queries, keys] bool."""


class AttentionWeights:
    """Stands in for the sdpa backend during one look: sdpa's output, and beside it some rows of the weights.

    For one row without a cache. Backends keep no weights, and whole ones would not fit beside long rows; so only those
    of `queries` (positions) are computed, and handed to `take`, which may reduce them at once. It goes by the name of
    a backend that every language model of transformers and the mixed mask know already.
    """

    def __init__(self, model: HaploForConditionalGeneration, queries: torch.Tensor, take: Take) -> None:
        self.model, self.queries, self.take = model, queries, take
        parts = {"pre": model.model.pre_decoder, "post": model.model.language_model}
        # Some fusions have no pre-decoder.
        self._part = {id(module): name for name, part in parts.items() if part is not None for module in part.modules()}
        self._sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Puts itself in the place of the model's backends, and those back in the end."""
        config = self.model.config
        before = {"": config._attn_implementation, "text_config": config.text_config._attn_implementation}
        self.model.set_attn_implementation({"": "sdpa", "text_config": "sdpa"})
        ALL_ATTENTION_FUNCTIONS["sdpa"] = self
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
            self.model.set_attn_implementation(before)

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention as sdpa computes it; shapes as in `haplovl.model.decoder.eager_attention`."""
        part = self._part.get(id(module))
        if part is not None:  # else a teacher or a vision tower that uses the same backend
            allowed = self._allowed(attention_mask, key.shape[2])
            self.take(part, self._weights(query, key, allowed, scaling), allowed)
        return self._sdpa(module, query, key, value, attention_mask, scaling=scaling, **options)

    def _weights(
        self, query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """[heads, queries, keys]."""
        chosen = query[0, :, self.queries]
        heads, queries, width = chosen.shape
        sharing = heads // key.shape[1]  # heads that share keys stand side by side
        grouped = chosen.reshape(key.shape[1], sharing * queries, width)
        scores = (grouped @ key[0].transpose(1, 2)).float() * (width**-0.5 if scaling is None else scaling)
        return scores.view(heads, queries, key.shape[2]).masked_fill(~allowed, -torch.inf).softmax(dim=-1)

    def _allowed(self, mask: torch.Tensor | None, keys: int) -> torch.Tensor:
        """What the chosen queries see: [queries, keys]. Without a mask sdpa is causal; masks come as bool or to add."""
        if mask is None:
            return torch.arange(keys, device=self.queries.device) <= self.queries[:, None]
        rows = mask[0, 0, self.queries]
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
