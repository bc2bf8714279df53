"""Cross-entropy over a large vocabulary without float32 logits of all tokens at once."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

TOKENS = 256
"""Tokens whose logits are held in float32 together: 32 MiB of a vocabulary of 32K."""


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy in float32; logits [N, V] in any precision, targets [N] → a float32 number.

    Where a gradient is wanted, the logits are overwritten with it: pass some that nobody else needs.
    """
    return _SummedCrossEntropy.apply(logits, targets)


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient softmax − one-hot is made in the forward pass, while the float32 logits of a chunk are at hand."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        for own, target in zip(logits.split(TOKENS), targets[:, None].split(TOKENS), strict=True):
            logs = own.float().log_softmax(-1)
            found = logs.gather(1, target)
            total = total - found.sum()
            if context.needs_input_grad[0]:
                own.copy_(logs.exp_().scatter_(1, target, found.exp() - 1))
        context.save_for_backward(logits)
        return total

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (of_logits,) = context.saved_tensors
        return of_logits * gradient, None
