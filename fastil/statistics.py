"""Paired comparison of two methods over seeds and test images: a bootstrap interval."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2_000

# Of one run: int [n_k, 2] for each step k, true and predicted position of each test image of the classes seen.
Predictions = Sequence[NDArray[np.integer]]


def average_accuracy(run: Predictions) -> float:
    """Average incremental accuracy in percent: the mean over steps of the share of hits."""
    return float(np.mean([100 * (step[:, 0] == step[:, 1]).mean() for step in run]))


def paired_interval(
    ours: Sequence[Predictions], theirs: Sequence[Predictions], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean difference in average incremental accuracy, ours minus theirs, in points.

    ours[s], theirs[s]: the runs of one seed on the same test images. A replicate draws seeds and, for each drawn, the
    test images of every class, with replacement, alike for both sides. An image keeps its weight over the steps in
    which it is seen: the images of a class stand in the same order in each. With one seed only images are drawn.
    """
    random = np.random.default_rng(seed)
    replicates = np.stack([_one_seed(a, b, random) for a, b in zip(ours, theirs, strict=True)])
    chosen = random.integers(len(replicates), size=replicates.shape)
    # Each draw of a seed takes a replicate of its own: two draws of one seed draw its images apart.
    rows = np.arange(replicates.shape[1])
    slots = [replicates[chosen[i], (rows + i) % len(rows)] for i in range(len(replicates))]
    low, high = np.quantile(np.mean(slots, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _one_seed(ours: Predictions, theirs: Predictions, random: np.random.Generator) -> NDArray[np.float64]:
    """Differences of one seed over replicates of its test images, [REPLICATES], in points."""
    last = ours[-1][:, 0]
    difference = np.zeros(REPLICATES)
    weights = {}
    for position in np.unique(last):
        count = int((last == position).sum())
        weights[position] = random.multinomial(count, np.full(count, 1 / count), size=REPLICATES)
    for a, b in zip(ours, theirs, strict=True):
        if not np.array_equal(a[:, 0], b[:, 0]):
            raise ValueError("the two runs were not tested on the same images")
        gain = (a[:, 0] == a[:, 1]).astype(float) - (b[:, 0] == b[:, 1])
        total = np.zeros(REPLICATES)
        for position in np.unique(a[:, 0]):
            total += weights[position] @ gain[a[:, 0] == position]
        difference += 100 * total / len(a)
    return difference / len(ours)
