"""A linear map between two spaces, fitted by ridge regression."""

from collections.abc import Callable

import torch

HELD_OUT = 5
"""One of so many examples chooses the strength of the ridge; it is the last part of them."""
STRENGTHS = [10.0**exponent for exponent in range(-8, 2)]
"""In units of the mean variance of an input."""


def fit_linear_map(x: torch.Tensor, y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The affine map from x [N, H] to y [N, P] with the least error on examples that were left out, then of all.

    Raises:
        ValueError: fewer than HELD_OUT examples.
    """
    if len(x) < HELD_OUT:
        raise ValueError(f"a linear map needs at least {HELD_OUT} examples, found {len(x)}")
    x_mean, y_mean = x.double().mean(dim=0), y.double().mean(dim=0)
    x, y = x.double() - x_mean, y.double() - y_mean
    kept = len(x) - len(x) // HELD_OUT

    def error(strength: float) -> float:
        return float((x[kept:] @ _solve(x[:kept], y[:kept], strength) - y[kept:]).square().sum())

    weights = _solve(x, y, min(STRENGTHS, key=error))
    return lambda given: ((given.double() - x_mean) @ weights + y_mean).float()


def _solve(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    gram = x.T @ x
    # A space without any variance has no scale of its own.
    ridge = strength * float(gram.diagonal().mean()) or 1.0
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x.T @ y)
