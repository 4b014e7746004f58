"""What a run forgot and kept, computed from its predictions alone, so that any older run has it.

A group is the classes that one step brought. a[k][j] is the accuracy on the test images of group j <= k after step k,
in percent: among all classes seen by then, and nobody tells the group. Published definitions that speak of tasks are
used with groups in their place. Steps count from 0, the base step.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Measures:
    """Percent or points, after each step; None after the base step where there is nothing to compare.

    groups: a[k][j], a row for each step k. average_over_groups: mean over j of a[k][j], in which every group counts the
    same (top-1 counts every image the same). forgetting: mean over j < k of the best that group j was at before, minus
    what it is at now, max over l < k of a[l][j] - a[k][j] (Chaudhry et al., Riemannian Walk, ECCV 2018, section 3).
    backward_transfer: mean over j < k of a[k][j] - a[j][j] (Lopez-Paz and Ranzato, GEM, NeurIPS 2017, eq. 3). non_base:
    the accuracy on the images of all classes but those of the base step.
    """

    groups: list[list[float]]
    average_over_groups: list[float]
    forgetting: list[float | None]
    backward_transfer: list[float | None]
    non_base: list[float | None]

    def dump(self) -> dict[str, Any]:
        """Return the content of measures.json."""
        return asdict(self)


def measures_of(predictions: Sequence[NDArray[np.int16]], seen: Sequence[int]) -> Measures:
    """Return the measures after each step.

    predictions: for each step int [n, 2], the true and the predicted incremental position of every test image of the
    classes seen. seen: the number of classes after each step. Raises ValueError for a group without an image.
    """
    groups: list[list[float]] = []
    non_base: list[float | None] = []
    for step, pairs in enumerate(predictions):
        true, right = pairs[:, 0], pairs[:, 0] == pairs[:, 1]
        group = np.searchsorted(np.asarray(seen[: step + 1]), true, side="right")
        hits, images = (np.bincount(group, weights, minlength=step + 1) for weights in (right, None))
        if not images.all():
            raise ValueError(f"step {step}: no image of the classes of step {int(images.argmin())}")
        groups.append((100 * hits / images).tolist())
        non_base.append(100 * float(right[group > 0].mean()) if step else None)
    return Measures(
        groups=groups,
        average_over_groups=[sum(row) / len(row) for row in groups],
        forgetting=[
            _mean([max(earlier[j] for earlier in groups[j:k]) - groups[k][j] for j in range(k)])
            for k in range(len(groups))
        ],
        backward_transfer=[
            _mean([groups[k][j] - groups[j][j] for j in range(k)]) for k in range(len(groups))
        ],
        non_base=non_base,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
