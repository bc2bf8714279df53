"""Answering on a CPU: weights in oneDNN's own layout, and attention by matrix products.

A plain linear layer keeps its weight in row-major order; packed, it is put once into the order in which oneDNN reads
it. For one token such layers were measured 1.4 to 3.4 times as fast on two cores. It is what torch.compile does when it
freezes a model, without its compilation.
"""

from collections.abc import Sequence

import torch
from torch import nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("gate", "fc1"))
"""Linear layers of one input: as one larger product they stream faster."""
ROWS = 256
"""Tokens that the layout is chosen for: it serves a prompt and a single token alike."""
_OPS = torch.ops.mkldnn


class PackedLinear(nn.Module):
    """A linear layer that can only be applied: its weight is packed, so it can neither be trained nor saved."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = _OPS._reorder_linear_weight(weight, ROWS), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        return _OPS._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _save_to_state_dict(self, *_: object) -> None:
        raise ValueError("this model was packed for answering on a CPU; load it anew to save or train it")


class _Group:
    """Several linear layers of one input as one; computed when the first of them is asked."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias for layer in layers]
        zeros = [layer.weight.new_zeros(layer.out_features) for layer in layers]
        has_bias = any(bias is not None for bias in biases)
        filled = [zero if bias is None else bias.detach() for bias, zero in zip(biases, zeros, strict=True)]
        self.linear = PackedLinear(weight, torch.cat(filled) if has_bias else None)
        self.sizes = [layer.out_features for layer in layers]
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self._input is not x or self._parts[index] is None:
            self._input, self._parts = x, list(self.linear(x).split(self.sizes, dim=-1))
        out, self._parts[index] = self._parts[index], None
        if not any(part is not None for part in self._parts):
            self._input = None
        return out


class PackedPart(nn.Module):
    """One of the linear layers of a group."""

    def __init__(self, group: _Group, index: int) -> None:
        super().__init__()
        self._group, self._index = group, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        return self._group.part(self._index, x)

    _save_to_state_dict = PackedLinear._save_to_state_dict


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's packed linear layers, and this CPU the instructions that they need."""
    if not torch.backends.mkldnn.is_available() or not hasattr(_OPS, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return _OPS._is_mkldnn_bf16_supported()
    return _OPS._is_mkldnn_fp16_supported() if dtype == torch.float16 else dtype == torch.float32


def pack_for_cpu(model: nn.Module) -> nn.Module:
    """Makes a model on a CPU answer faster, in place; it can then neither be trained nor saved.

    A model on a GPU, or in a precision that this CPU has no instructions for, is left as it is. Memory stays the same,
    apart from tied embeddings, which are then held twice.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu" or not can_pack(parameter.dtype):
        return model
    model.requires_grad_(False)
    for parent in list(model.modules()):
        children = {name: child for name, child in parent.named_children() if type(child) is nn.Linear}
        for names in GROUPS:
            if all(name in children for name in names):
                group = _Group([children.pop(name) for name in names])
                for index, name in enumerate(names):
                    setattr(parent, name, PackedPart(group, index))
        for name, child in children.items():
            setattr(
                parent, name, PackedLinear(child.weight.detach(), None if child.bias is None else child.bias.detach())
            )
    # Measured: in float32 the fused kernel is faster for a prompt, in bf16 plain matrix products are.
    backend = "sdpa" if parameter.dtype == torch.float32 else "matmul"
    model.set_attn_implementation({"": backend, "text_config": backend})
    return model
