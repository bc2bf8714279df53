"""How often 95 % intervals over few seeds hold the true accuracy, and how often equal recipes are called different.

Simulated experiments: a question's chance of a right answer is the recipe's accuracy, moved by the question (the same
for all seeds) and by the seed. The truth is known, so coverage can be counted. About five minutes on one core.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from haplovl.evaluate.statistics import hierarchical_interval, paired_difference

CASES = ((200, 0.05, 0.85), (200, 0.2, 0.65), (1000, 0.1, 0.75))
"""Questions, standard deviation between them, accuracy."""
SEED_DEVIATIONS = (0.0, 0.01, 0.03, 0.06)


def experiments(count: int, seeds: int, questions: int, seed_deviation: float, deviation: float, accuracy: float):
    """Simulated answers [seeds, questions]."""
    random = np.random.default_rng(5)
    for _ in range(count):
        of_questions = random.uniform(-1, 1, questions) * deviation * 3**0.5
        chance = accuracy + of_questions + random.normal(0, seed_deviation, (seeds, 1))
        yield random.random((seeds, questions)) < np.clip(chance, 0, 1)


def rows(count: int, resamples: int) -> Iterator[tuple]:
    """Seeds, questions, seed deviation, coverage, mean width, share of false differences."""
    for seeds in (2, 3, 5, 10):
        for questions, deviation, accuracy in CASES:
            for spread in SEED_DEVIATIONS:
                rest = (questions, spread, deviation, accuracy)
                found = [hierarchical_interval(made, resamples) for made in experiments(count, seeds, *rest)]
                pairs = experiments(count, 2 * seeds, *rest)
                real = [paired_difference(made[:seeds], made[seeds:], resamples).real for made in pairs]
                covered = np.mean([one.low <= accuracy <= one.high for one in found])
                yield seeds, questions, spread, covered, np.mean([one.high - one.low for one in found]), np.mean(real)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=600)
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    print("seeds questions seed-deviation coverage width false-differences")
    for row in rows(options.experiments, options.resamples):
        print("{:5} {:9} {:14.2f} {:8.3f} {:5.3f} {:17.3f}".format(*row), flush=True)
