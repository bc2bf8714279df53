"""Intervals cover what they promise on simulated experiments, and pairs are judged as exact tests judge them."""

import time

import numpy as np
import pytest

from haplovl.evaluate.statistics import hierarchical_interval, holm, interval, paired_difference

RESAMPLES = 1_000
"""Enough for a coverage that is counted over a few hundred experiments."""


def experiments(count: int, seeds: int, questions: int, seed_spread: float, question_spread: float = 0.3):
    """Simulated [seeds, questions] answers about a recipe of true accuracy 0.75, by crossed random effects."""
    random = np.random.default_rng(5)
    for _ in range(count):
        chance = 0.75 + _uniform(random, question_spread, questions) + _uniform(random, seed_spread, (seeds, 1))
        yield random.random((seeds, questions)) < chance


def _uniform(random: np.random.Generator, spread: float, shape) -> np.ndarray:
    """Mean 0, at most 0.8 `spread` to both sides, so that chances stay within 0…1."""
    return random.uniform(-spread, spread, shape) * 0.8


def covered(intervals, truth: float) -> float:
    return float(np.mean([found.low <= truth <= found.high for found in intervals]))


@pytest.mark.parametrize(("questions", "accuracy"), [(200, 0.75), (200, 0.97), (1000, 0.9), (50, 0.5)])
def test_one_models_interval_covers_its_true_accuracy(questions: int, accuracy: float) -> None:
    random = np.random.default_rng(1)
    found = [interval(random.random(questions) < accuracy, RESAMPLES) for _ in range(600)]
    # 600 experiments: one standard error is 0.9 points; three of them, and the discreteness of 200 answers.
    assert 0.92 <= covered(found, accuracy) <= 0.985


# 300 experiments: one standard error is 1.3 points; measured 0.93 to 0.99 (docs/experiments.md). Three seeds cannot
# tell that seeds do not matter, so there the intervals are too wide rather than too narrow.
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("seed_spread", [0.0, 0.02, 0.1])
def test_few_seeds_still_cover(seeds: int, seed_spread: float) -> None:
    found = [hierarchical_interval(c, RESAMPLES) for c in experiments(300, seeds, 300, seed_spread, 0.15)]
    assert covered(found, 0.75) >= 0.9
    # And not by being useless: with three seeds Student's t asks for 2.2 times the width of the known variance, with
    # five for 1.4 times. Standard deviations: of _uniform 0.46 spreads, of a single answer 0.43.
    known = np.sqrt((0.46 * seed_spread) ** 2 / seeds + (0.46 * 0.15) ** 2 / 300 + 0.43**2 / 300 / seeds)
    assert np.mean([i.high - i.low for i in found]) < (2.4 if seeds == 3 else 1.6) * 2 * 1.96 * known


def test_uncorrected_bootstrap_of_three_seeds_would_not_cover() -> None:
    """Guards the test above: its experiments are hard enough that resampling alone fails."""
    random, hits, count = np.random.default_rng(2), 0, 300
    for correct in experiments(count, 3, 300, 0.1, 0.15):
        means = correct.mean(axis=1)
        draws = means[random.integers(3, size=(RESAMPLES, 3))].mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        hits += low <= 0.75 <= high
    assert hits / count < 0.85


def test_nested_resampling_would_be_too_narrow_for_hard_questions() -> None:
    """Where questions differ and seeds agree, more seeds say nothing about other questions."""
    random = np.random.default_rng(3)
    one = random.random(400) < 0.7
    width = [w.high - w.low for w in (interval(one), hierarchical_interval(np.tile(one, (5, 1))))]
    assert width[1] == pytest.approx(width[0], rel=0.1)


def test_pairs_of_recipes_without_a_difference_are_rarely_called_real() -> None:
    runs = list(experiments(300, 6, 300, 0.04, 0.15))
    real = np.mean([paired_difference(run[:3], run[3:], RESAMPLES).real for run in runs])
    assert real <= 0.09  # 5 % and three standard errors
    # The same runs, one side better by a true 15 points: found nearly always.
    random = np.random.default_rng(4)
    better = [run[:3] | (random.random(run[:3].shape) < 0.6) for run in runs[:100]]
    assert np.mean([paired_difference(a, run[3:], RESAMPLES).real for a, run in zip(better, runs, strict=False)]) > 0.95


@pytest.mark.parametrize(
    # Questions that only one side got right, and the exact p-value of McNemar's test on them.
    ("only_a", "only_b", "exact"),
    [(4, 0, 0.125), (6, 0, 0.031), (10, 2, 0.039), (8, 4, 0.388), (40, 20, 0.0135), (3, 3, 1.0), (60, 15, 1.6e-7)],
)
def test_pairs_of_models_are_judged_as_mcnemars_exact_test_does(only_a: int, only_b: int, exact: float) -> None:
    a, b = np.ones(300), np.ones(300)
    a[:only_b] = 0
    b[only_b : only_b + only_a] = 0
    found = paired_difference(a, b)
    assert found.mean == pytest.approx((only_a - only_b) / 300)
    assert found.low <= found.mean <= found.high
    assert found.p_value == pytest.approx(exact, rel=0.6, abs=0.005)
    assert found.real == (exact < 0.05)
    assert found.real == (found.low > 0)


def test_pairing_sees_what_two_intervals_cannot() -> None:
    random = np.random.default_rng(6)
    hard = random.random(1000) < 0.4
    a, b = ~hard, ~hard & (random.random(1000) < 0.97)
    assert interval(b).high > interval(a).low  # apart, they overlap
    assert paired_difference(a, b).real
    assert not paired_difference(a, a).real
    assert paired_difference(a, a).p_value == 1.0


def test_both_ways_round_and_twice_give_the_same() -> None:
    a, b = (np.stack(list(experiments(1, 3, 500, 0.05))[0]) for _ in range(2))
    b = ~b
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert paired_difference(a, b) == one
    assert one.mean == pytest.approx(-other.mean)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.01)
    assert hierarchical_interval(a) == hierarchical_interval(a)


def test_certainty_is_never_claimed() -> None:
    """All right of 200: the exact interval (Clopper and Pearson) is 0.982…1; all wrong is its mirror image."""
    perfect, hopeless = interval(np.ones(200)), interval(np.zeros(200))
    assert perfect.mean == perfect.high == 1.0
    assert 0.965 < perfect.low < 0.99
    assert hopeless.mean == hopeless.low == 0.0
    assert 0.01 < hopeless.high < 0.035
    assert interval([1]).low < 0.5
    assert hierarchical_interval(np.ones((3, 200))).low < 0.99


def test_scores_need_not_be_right_or_wrong() -> None:
    random = np.random.default_rng(7)
    scores = random.choice([0.0, 0.3, 0.6, 0.9, 1.0], 400)
    found = interval(scores)
    standard_error = scores.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * standard_error, rel=0.06)


def test_ten_thousand_resamples_are_quick() -> None:
    correct = next(iter(experiments(1, 5, 1000, 0.05)))
    start = time.process_time()
    hierarchical_interval(correct)
    paired_difference(correct[:2], correct[2:])
    assert time.process_time() - start < 1.0


def test_what_cannot_be_judged_is_refused() -> None:
    for wrong in ([], [[1, 0]], [0.5, float("nan")], [2.0]):
        with pytest.raises(ValueError):
            interval(wrong)
    with pytest.raises(ValueError, match="3 questions cannot be paired with 2"):
        paired_difference([1, 0, 1], [1, 0])
    with pytest.raises(ValueError):
        hierarchical_interval([1, 0])


def test_holm_raises_p_values_and_keeps_their_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9]) == [0.9]
    assert holm([]) == []
