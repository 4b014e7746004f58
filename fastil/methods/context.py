"""What a method receives: the step, the frozen network's outputs, the rehearsal memory, and the meter of an epoch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastil.data import Batch, Loader
from fastil.models import Output
from fastil.protocol import Ids


@dataclass(frozen=True)
class StepContext:
    """What a method knows when a step, or a correction after it, begins."""

    step: int
    num_old: int  # classes of earlier steps
    num_seen: int  # including those of this step
    counts: NDArray[np.int64]  # [W] training images per incremental position, exemplars included

    @property
    def num_new(self) -> int:
        """The number of classes that this step adds."""
        return self.num_seen - self.num_old

    @property
    def rho(self) -> float:
        """rho of eq. 1, "N_t / N_{t+1} [...] the total number of classes": old classes over all classes seen."""
        return self.num_old / self.num_seen


class FeatureExtractor(NamedTuple):
    """The frozen network on training images under the test-time transform."""

    extract: Callable[[Ids, bool], Output]  # (ids int64 [n], mirrored): features [n, d], logits [n, W], on the device
    ids_of_class: Callable[[int], Ids]  # ids of the training images of the class at an incremental position


class MemoryContext(NamedTuple):
    """The rehearsal memory after a step, for `Method.after_memory`."""

    ids: Ids  # every exemplar, class after class
    positions: Ids  # their classes, as incremental positions
    extractor: FeatureExtractor
    loader: Loader
    training: Callable[[int], Iterator[Batch]]  # augmented batches of the step's training set, for an epoch


class Meter(NamedTuple):
    """Sums over an epoch, on the device; read once, at its end."""

    rows: Tensor  # [R, 4], by the kernel: cross-entropy, distillation, hits, margin ranking, for each row of a batch
    unfused: Tensor  # 0-d: the weighted terms that the kernel does not compute, times the images
