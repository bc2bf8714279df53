"""Optimiser and learning-rate schedule."""

import math
from typing import Any, get_args

import torch
from torch import nn

from haplovl.settings import OptimizerSettings, Part


def part_of(name: str) -> str | None:
    """The part of the model that a parameter belongs to, by its name; None for stage 1's throw-away heads."""
    words = name.split(".")
    if "lm_head" in words or "text_embedding" in words:
        return "language_model"
    return next((part for part in get_args(Part) if part in words), None)


def freeze_parts(module: nn.Module, settings: OptimizerSettings) -> None:
    """Takes the parts whose rate factor is 0 out of training.

    Raises:
        ValueError: a factor names a part that this model does not have, or nothing would be trained.
    """
    found = set()
    for name, parameter in module.named_parameters():
        part = part_of(name)
        found.add(part)
        if settings.rate_factors.get(part, 1.0) == 0.0:
            parameter.requires_grad_(False)
    if missing := sorted(set(settings.rate_factors) - found):
        raise ValueError(f"optimizer.rate_factors names '{missing[0]}', which this model or stage does not have")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError("optimizer.rate_factors freezes all parts: nothing would be trained")


def make_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases, tokens) do not.

    The groups of a part with a rate of its own carry it as `factor`, for `set_learning_rate`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = settings.rate_factors.get(part_of(name), 1.0)
            groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[key], "weight_decay": settings.weight_decay if key[1] else 0.0, "factor": key[0]}
            for key in sorted(groups, key=lambda key: (key[0], not key[1]))
        ],
        lr=settings.learning_rate, betas=settings.betas, fused=True,
    )  # fmt: skip


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Gives every group the step's rate times the factor of its part."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


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
