"""The rehearsal memory: which exemplars of each class are kept, and in what rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from fastil import kernels
from fastil.errors import UserError
from fastil.plan import Key, counter_hash
from fastil.protocol import Ids
from fastil.settings import shown

GRAM_BYTES = 64 * 2**20  # Gram matrices are built for as many classes at once as fit in this; more is no faster


@dataclass(frozen=True)
class MemoryConfig:
    """Size and choice of the rehearsal memory (section 3.1; its size is varied in section 4.3.1, Table 3)."""

    exemplars_per_class: Annotated[  # R, growing memory; 0: no exemplars, for methods that need none
        NonNegativeInt | None,
        Field(description="an integer of at least 0, or null if memory_budget is set"),
    ] = 20
    memory_budget: PositiveInt | None = None  # fixed total instead: budget // classes seen for each class
    exemplar_selection: Literal["herding", "random"] = "herding"

    def __post_init__(self) -> None:
        if (self.exemplars_per_class is None) == (self.memory_budget is None):
            raise UserError(
                f"exemplars_per_class={shown(self.exemplars_per_class)} and memory_budget={shown(self.memory_budget)}: "
                "give exactly one of exemplars_per_class and memory_budget, set the other to null"
            )

    def quota(self, classes_seen: int) -> int:
        """Return the exemplars per class once classes_seen classes share the memory. Raises UserError if that is 0."""
        if self.memory_budget is None:
            assert self.exemplars_per_class is not None
            return self.exemplars_per_class
        if self.memory_budget < classes_seen:
            raise UserError(
                f"memory_budget={self.memory_budget} leaves no exemplar for each of {classes_seen} classes; raise it"
            )
        return self.memory_budget // classes_seen

    def total(self, counts: Ids) -> int:
        """Return the number of exemplars once all classes are seen. counts: int64 [classes], their training images."""
        return int(np.minimum(counts, self.quota(len(counts))).sum())


class RehearsalMemory:
    """The exemplar ids of each class in herding rank; a smaller quota keeps the prefix."""

    def __init__(self) -> None:
        self.exemplars: dict[int, Ids] = {}  # in the order the classes were learned

    def add(self, class_id: int, ranked_ids: Ids) -> None:
        """Store the exemplars of a new class, best first."""
        self.exemplars[class_id] = ranked_ids

    def reduce(self, quota: int) -> None:
        """Keep the first `quota` exemplars of every class."""
        self.exemplars = {class_id: ids[:quota] for class_id, ids in self.exemplars.items()}

    def ids(self) -> Ids:
        """Return the ids of all exemplars, class after class, int64 [n]."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self.exemplars.values()])


def herd_classes(features: Sequence[Tensor], m: int) -> list[Ids]:
    """Run `herd` on many classes: returns int64 arrays of min(m, n_g) positions. features[g]: float [n_g, d].

    Features are normalised and multiplied in float64, so that the picks do not depend on the order of summation. A Gram
    matrix takes 8 n^2 bytes: 14 MB for ImageNet's largest classes, 288 MB for Fashion-MNIST's 6,000 images.
    """
    picks: list[Ids] = []
    largest = max(len(f) for f in features)
    m = min(m, largest)  # R may be any number, and each rank is a column
    group = max(1, GRAM_BYTES // (8 * largest**2))
    for start in range(0, len(features), group):
        chunk = [torch.nn.functional.normalize(f.detach().double(), dim=1) for f in features[start : start + group]]
        padded = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True)
        counts = torch.tensor([len(f) for f in chunk], device=padded.device)
        ranks = kernels.herd(padded @ padded.transpose(1, 2), counts, m).cpu().numpy()
        picks += [row[row >= 0] for row in ranks]
    return picks


def herd(features: Tensor | NDArray[np.floating], m: int) -> Ids:
    """Return the positions of one class's exemplars in herding rank, int64 [min(m, n)]. features: float [n, d].

    iCaRL's released loop on L2-normalised features, as in the codes of LUCIR and PODNet: a repeat moves the target but
    is not picked again (see `fastil.kernels.herd`).
    """
    features = torch.as_tensor(features)
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be [n, d] with n >= 1, not {tuple(features.shape)}")
    return herd_classes([features], m)[0]


def hold_out(ids: Ids, classes: Ids, per_class: int, key: Key) -> tuple[Ids, Ids]:
    """Take per_class images of every class out of training. ids, classes: int64 [n], images and their classes.

    Returns the ids that stay, in their order, and the held-out ids, class after class, drawn by the counter.
    """
    held = np.concatenate([select_at_random(ids[classes == c], per_class, key) for c in np.unique(classes)])
    return ids[~np.isin(ids, held)], held


def select_at_random(ids: Ids, m: int, key: Key) -> Ids:
    """Return m of the ids, drawn by the counter, in the order of the draw. A smaller m gives a prefix."""
    draw = counter_hash(key, "select", ids, np.zeros_like(ids))
    return ids[np.argsort(draw, kind="stable")[:m]]
