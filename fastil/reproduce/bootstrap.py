"""Paired comparison of two methods over seeds and test images: a bootstrap interval."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2_000

# Of one run: int [n_k, 2] for each step k, true and predicted position of each test image of the classes seen.
Predictions = Sequence[NDArray[np.integer]]
Weights = dict[int, NDArray[np.int64]]  # by class, how often each of its images was drawn, [REPLICATES, images]


def average_accuracy(run: Predictions) -> float:
    """Average incremental accuracy in percent: the mean over steps of the share of hits."""
    return float(np.mean([100 * (step[:, 0] == step[:, 1]).mean() for step in run]))


def paired_interval(
    ours: Sequence[Predictions], theirs: Sequence[Predictions], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean difference in average incremental accuracy, ours minus theirs, in points.

    ours[s], theirs[s]: the runs of one seed; all runs on the same test images. A replicate draws the test images of
    every class, with replacement, once for all runs, and then seeds: an image that is hard for one seed mostly is for
    the others, so that drawing images again for each seed would average that away. An image keeps its weight over the
    steps in which it is seen: the images of a class stand in the same order in each. With one seed only images are
    drawn.
    """
    random = np.random.default_rng(seed)
    last = ours[0][-1][:, 0]
    weights = {}
    for position in np.unique(last):
        count = int((last == position).sum())
        weights[position] = random.multinomial(count, np.full(count, 1 / count), size=REPLICATES)
    replicates = np.stack([_one_seed(a, b, weights) for a, b in zip(ours, theirs, strict=True)])
    chosen = random.integers(len(replicates), size=replicates.shape)
    differences = np.take_along_axis(replicates, chosen, axis=0).mean(axis=0)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _one_seed(ours: Predictions, theirs: Predictions, weights: Weights) -> NDArray[np.float64]:
    """Differences of one seed over replicates of the test images, [REPLICATES], in points."""
    difference = np.zeros(REPLICATES)
    for a, b in zip(ours, theirs, strict=True):
        if not np.array_equal(a[:, 0], b[:, 0]):
            raise ValueError("the two runs were not tested on the same images")
        gain = (a[:, 0] == a[:, 1]).astype(float) - (b[:, 0] == b[:, 1])
        total = np.zeros(REPLICATES)
        for position, count in zip(*np.unique(a[:, 0], return_counts=True), strict=True):
            if position not in weights or weights[position].shape[1] != count:
                raise ValueError("the runs of the seeds were not tested on the same images")
            total += weights[position] @ gain[a[:, 0] == position]
        difference += 100 * total / len(a)
    return difference / len(ours)
