"""Optimiser and learning-rate schedule."""

import math

import torch
from torch import nn

from haplovl.settings import OptimizerSettings


def make_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases, tokens) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas, fused=True
    )


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay; a pure function of the step (from 0), so that resuming needs no state.

    The step after the last one would have the smallest rate.
    """
    warmup = math.ceil(settings.warmup_share * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    share = settings.min_learning_rate_share
    return settings.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * progress)))
