"""How alike two sets of vectors are: cosine, the cosine that a constant would reach, and linear CKA."""

from collections.abc import Sequence

import torch
from torch.nn import functional


class Cosine:
    """Mean cosine of predictions to targets, and that of the best constant prediction, over batches."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros((), dtype=torch.float64)
        self._direction: torch.Tensor | None = None

    def add(self, predicted: torch.Tensor, target: torch.Tensor) -> None:
        """predicted and target [N, H]."""
        self.count += len(target)
        self._sum += functional.cosine_similarity(predicted.float(), target.float(), dim=-1).double().sum().cpu()
        directions = functional.normalize(target.float(), dim=-1).double().sum(dim=0).cpu()
        self._direction = directions if self._direction is None else self._direction + directions

    @property
    def mean(self) -> float:
        """Mean over all vectors; 0 without any."""
        return float(self._sum) / max(self.count, 1)

    @property
    def constant(self) -> float:
        """What one vector, the same for every target, reaches at best: the length of the targets' mean direction."""
        return 0.0 if self._direction is None else float(self._direction.norm()) / max(self.count, 1)


def cka_matrix(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> list[list[float]]:
    """Linear CKA of every set of features with every other: [N, H] each → [ours][theirs].

    1: the same up to rotation and scale; 0: unrelated. It compares widths that differ. The unbiased estimator of HSIC
    (Song et al., JMLR 2012, equation 5) keeps it at 0 for unrelated features of few examples; it may fall below.

    Raises:
        ValueError: fewer than four examples, of which the estimator has no value.
    """
    if len(ours[0]) < 4:
        raise ValueError(f"CKA needs at least 4 examples, found {len(ours[0])}")
    first, second = [_centred(x) for x in ours], [_centred(x) for x in theirs]
    own = [max(_hsic(x, x), 0.0) ** 0.5 for x in first]
    their = [max(_hsic(y, y), 0.0) ** 0.5 for y in second]
    return [
        [_hsic(x, y) / (a * b) if a * b > 0 else 0.0 for y, b in zip(second, their, strict=True)]
        for x, a in zip(first, own, strict=True)
    ]


def _centred(features: torch.Tensor) -> torch.Tensor:
    features = features.double()
    return features - features.mean(dim=0)


def _hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased HSIC of linear kernels from centred features, times N(N−3)."""
    count = len(x)
    squares_x, squares_y = x.square().sum(dim=1), y.square().sum(dim=1)
    total = (x.T @ y).square().sum()
    total = total - count / (count - 2) * (squares_x * squares_y).sum()
    return float(total + squares_x.sum() * squares_y.sum() / ((count - 1) * (count - 2)))
