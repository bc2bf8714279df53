"""Weights in oneDNN's own layout, for answering on a CPU.

A plain linear layer reads its weight in row-major order, which costs a re-ordering (bf16) or half of the memory's
bandwidth (one token at a time) in every call. oneDNN's packed weights are ordered once. This is what torch.compile does
when it freezes a model, without the minutes of compilation.
"""

import torch
from torch import nn

_OPS = torch.ops.mkldnn


class PackedLinear(nn.Module):
    """A linear layer that can only be applied: its weight is packed, so it can neither be trained nor saved."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight = _OPS._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        return _OPS._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _save_to_state_dict(self, *_: object) -> None:
        raise ValueError("this model was packed for answering on a CPU; load it anew to save or train it")


def can_pack() -> bool:
    """Whether this torch has oneDNN's packed linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(_OPS, "_linear_pointwise")


def pack_for_cpu(model: nn.Module, rows: int = 1) -> nn.Module:
    """Packs every linear layer of a model in place; it then answers faster, and can neither be trained nor saved.

    `rows` is the number of tokens that the layout is chosen for. A model on a GPU, or a torch without oneDNN, is left
    as it is. Memory stays the same, apart from tied embeddings, which are then held twice.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu" or not can_pack():
        return model
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, rows))
    return model
