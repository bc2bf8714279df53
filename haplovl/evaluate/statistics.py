"""95 % intervals and paired differences by the bootstrap, over questions or over seeds and questions.

A figure of one model is uncertain because other questions could have been asked; a figure of a recipe also because
another seed would have given another model. All seeds answer the same questions, so seeds and questions are *crossed*:
a resample draws seeds, draws questions once, and takes every drawn seed's answers to every drawn question. Drawing new
questions inside each seed (the nested scheme) would let hard questions cancel between seeds and give intervals that
are too narrow by up to the square root of the number of seeds.

Two corrections, both without effect on large samples:

*Few seeds.* Means of resampled seeds never leave the range of those seen: with three seeds such an interval covers
75 % at best where seeds decide. Therefore the resamples' deviations are brought to the unbiased variance of the
crossed two-way layout and divided by the square root of a chi-square over its degrees of freedom (Satterthwaite's):
where the resampled means are normal this is Student's t. With three seeds or more the intervals then cover 93 to 99 %
in simulations, with two 90 to 98 % (docs/experiments.md).

*Few mistakes.* 200 right of 200 would give an interval without width, and four changed answers a "significant"
difference. Resamples are drawn from the questions and a few more: two that everybody gets right and two that nobody
does (as Agresti and Coull's interval), for a difference one that only one side gets right and one for the other side
(as Agresti and Min's).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
LEVEL = 0.95
SIGNIFICANT = 1 - LEVEL
_SEED = 20250324
_CHUNK = 1_000
"""Resamples drawn at once, which bounds the memory."""


@dataclass(frozen=True)
class Interval:
    """A mean score with the ends of its 95 % interval; `seeds` models answered `questions` questions."""

    mean: float
    low: float
    high: float
    questions: int
    seeds: int = 1


@dataclass(frozen=True)
class Difference:
    """Mean score of one side minus the other's on the same questions, its 95 % interval and two-sided p-value.

    `seeds` are the numbers of models on both sides. A side with one is that model; only several stand for a recipe.
    """

    mean: float
    low: float
    high: float
    p_value: float
    questions: int
    seeds: tuple[int, int] = (1, 1)

    @property
    def real(self) -> bool:
        """Whether chance alone would rarely (p < 0.05) make a difference as large."""
        return self.p_value < SIGNIFICANT


def interval(correct: ArrayLike, resamples: int = RESAMPLES) -> Interval:
    """The 95 % percentile bootstrap interval of one model's mean score over its questions.

    `correct` [questions] holds truth values or scores of 0…1. The interval is about this model; what another seed would
    have given it does not tell (`hierarchical_interval`).

    Raises:
        ValueError: no questions, another shape, or a score that is no number of 0…1.
    """
    return hierarchical_interval(_scores(correct, 1)[None], resamples)


def hierarchical_interval(correct: ArrayLike, resamples: int = RESAMPLES) -> Interval:
    """The 95 % interval of a recipe's mean score from a crossed bootstrap over seeds and questions.

    `correct` [seeds, questions] holds truth values or scores of 0…1; column q is the same question for every seed.
    With one seed it is the interval of that model over questions.

    Raises:
        ValueError: no seeds or questions, another shape, or a score that is no number of 0…1.
    """
    scores = _scores(correct, 2)
    added = np.tile([0.0, 0.0, 1.0, 1.0], (len(scores), 1))
    draws = _draws([scores], [added], resamples)
    low, high = np.clip(_ends(draws), 0.0, 1.0)
    mean = float(scores.mean())
    return Interval(mean, min(float(low), mean), max(float(high), mean), scores.shape[1], len(scores))


def paired_difference(a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES) -> Difference:
    """Mean score of `a` minus that of `b` on the same questions: is it more than chance?

    `a` [seeds of a, questions] and `b` [seeds of b, questions], or [questions] for one model. Questions are resampled
    once for both sides, so that their difficulty cancels; the seeds of both sides are resampled independently. The
    p-value is twice the share of resamples on the other side of zero (at most 1, at least 2 / (resamples + 1)).

    Raises:
        ValueError: numbers of questions differ, no questions, another shape, or a score that is no number of 0…1.
    """
    sides = [_scores(np.atleast_2d(np.asarray(side)), 2) for side in (a, b)]
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(f"{sides[0].shape[1]} questions cannot be paired with {sides[1].shape[1]}")
    added = [np.tile(column, (len(side), 1)) for side, column in zip(sides, ([1.0, 0.0], [0.0, 1.0]), strict=True)]
    draws = _draws(sides, added, resamples)
    low, high = np.clip(_ends(draws), -1.0, 1.0)
    mean = float(sides[0].mean() - sides[1].mean())
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p_value = min(1.0, 2 * (beyond + 1) / (resamples + 1))
    seeds = (len(sides[0]), len(sides[1]))
    return Difference(mean, min(float(low), mean), max(float(high), mean), p_value, sides[0].shape[1], seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, raised so that one in twenty families holds a false "real" (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _scores(values: ArrayLike, dimensions: int) -> np.ndarray:
    scores = np.asarray(values, dtype=float)
    if scores.ndim != dimensions or scores.size == 0:
        shape = "[questions]" if dimensions == 1 else "[seeds, questions]"
        raise ValueError(f"scores must be {shape} and not empty, found shape {scores.shape}")
    if not ((scores >= 0) & (scores <= 1)).all():  # no number (nan) fails as well
        raise ValueError("scores must be numbers of 0…1")
    return scores


def _ends(draws: np.ndarray) -> np.ndarray:
    return np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])


def _draws(sides: list[np.ndarray], added: list[np.ndarray], resamples: int) -> np.ndarray:
    """Resampled means of the first side, minus those of the second where there is one: [resamples].

    `added` are the further questions that may be drawn.
    """
    generator = np.random.default_rng(_SEED)
    pools = [np.concatenate(pair, axis=1) for pair in zip(sides, added, strict=True)]
    signs = (1.0, -1.0)[: len(pools)]
    means = _resample_questions(np.concatenate(pools), sides[0].shape[1], resamples, generator)
    draws, first = np.zeros(resamples), 0
    for sign, pool in zip(signs, pools, strict=True):
        seeds = len(pool)
        chosen = generator.integers(seeds, size=(resamples, seeds))
        draws += sign * np.take_along_axis(means[:, first : first + seeds], chosen, axis=1).mean(axis=1)
        first += seeds
    if max(len(pool) for pool in pools) == 1:
        return draws
    variance, freedom = _variance(pools, signs, sides[0].shape[1])
    centre, spread = sum(sign * pool.mean() for sign, pool in zip(signs, pools, strict=True)), draws.var()
    scale = np.sqrt(variance / spread / (generator.chisquare(freedom, resamples) / freedom))
    return centre + (draws - centre) * scale


def _resample_questions(scores: np.ndarray, drawn: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Means of every row over `drawn` of its columns, drawn with replacement, the same for all rows: [resamples, rows].

    Equal columns are drawn together: five seeds that are right or wrong make 32 different ones at most.
    """
    columns, counts = np.unique(scores, axis=1, return_counts=True)
    parts = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        parts.append(generator.multinomial(drawn, counts / counts.sum(), size=size) @ columns.T / drawn)
    return np.concatenate(parts)


def _variance(pools: list[np.ndarray], signs: Sequence[float], questions: int) -> tuple[float, float]:
    """Variance of the mean (of the difference) in the crossed layout of seeds and questions; degrees of freedom.

    Seeds' part: variance of the seeds' means over the number of seeds; where seeds happen to agree better than chance
    in single answers allows, that chance. Questions' part: variance over questions of the means over seeds, less what
    chance in single answers adds to it.
    """
    of_questions = float(sum(sign * pool.mean(axis=0) for sign, pool in zip(signs, pools, strict=True)).var(ddof=1))
    variance = uncertainty = 0.0
    for pool in (pool for pool in pools if len(pool) > 1):
        seeds = len(pool)
        residual = pool - pool.mean(axis=0) - pool.mean(axis=1, keepdims=True) + pool.mean()
        chance = float((residual**2).sum() / ((seeds - 1) * (pool.shape[1] - 1)))
        of_seeds = float(pool.mean(axis=1).var(ddof=1))
        variance += max(of_seeds, chance / questions) / seeds
        uncertainty += (of_seeds / seeds) ** 2 / (seeds - 1)
        of_questions -= chance / seeds
    part = max(of_questions, 0.0) / questions
    variance, uncertainty = variance + part, uncertainty + part**2 / questions
    return variance, variance**2 / max(uncertainty, 1e-300)
