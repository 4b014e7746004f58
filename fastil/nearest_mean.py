"""iCaRL's nearest-mean-of-exemplars classifier (NME; section 4.1.2)."""

import torch.nn.functional as F
from torch import Tensor


def class_means(exemplars: Tensor, mirrored: Tensor, positions: Tensor) -> Tensor:
    """Return the mean of each class's exemplars, normalised to length 1: float [classes, d].

    exemplars, mirrored: [m, d], features of the exemplars and of their mirror images. positions: int64 [m], incremental
    positions; every class from 0 on must occur. Each feature is L2-normalised and averaged per class; the two means are
    averaged and normalised again.
    """
    means = exemplars.new_zeros(int(positions.max()) + 1, exemplars.shape[1])
    means.index_add_(0, positions, F.normalize(exemplars) + F.normalize(mirrored))  # a sum has the mean's direction
    return F.normalize(means)


def nearest_mean_scores(features: Tensor, means: Tensor) -> Tensor:
    """Return scores of the classes, [n, classes]: the highest is the nearest mean.

    features: [n, d]. means: [classes, d], of length 1. So the smallest distance is the largest product, and the length
    of a feature does not matter.
    """
    return features @ means.T
