"""TPCIL (Tao et al., ECCV 2020), an approximation: there is no public code, and its full text was not at hand.

Known: the topology of the feature space is kept as an elastic Hebbian graph, built by competitive Hebbian learning; a
topology-preserving loss penalises changes of its neighbour relations while new classes are learned; the graph grows.

Chosen here: vertices are the class embeddings (mean directions of the exemplars); each exemplar joins its nearest and
second nearest vertex by an edge, whose age starts anew, and ages the winner's other edges, which go when too old. The
loss is 1 minus the correlation, over pairs of old images of a batch whose classes are joined or equal, of the student's
cosines with the teacher's. Head, imprinting and frozen rows are LUCIR's, whose other terms are left out.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastil.data import Batch
from fastil.errors import UserError
from fastil.losses import topology
from fastil.methods.classification import StepContext
from fastil.methods.lucir import Lucir, mean_direction
from fastil.methods.method import Memory
from fastil.models import Network, Output


@dataclass(frozen=True)
class TpcilConfig:
    """method=tpcil."""

    tpcil_lambda: float = 1.0  # of the topology-preserving loss; chosen here, not published where we could read it
    tpcil_age: int = 200  # how many wins of a vertex an edge survives without being one of them

    def __post_init__(self) -> None:
        if not 0 <= self.tpcil_lambda < math.inf or self.tpcil_age < 1:
            raise UserError("tpcil_lambda must not be negative and tpcil_age must be at least 1")


class Tpcil(Lucir):
    """ages: int64 [W, W], wins since an edge was one of them; -1: no edge."""

    freezes_old_rows = False  # features may turn as a whole: only their relations are kept

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.own: TpcilConfig = self.parts["tpcil"]
        width = len(self.classification.log_prior)
        self.ages = np.full((width, width), -1, dtype=np.int64)
        self.joined = torch.eye(width, dtype=torch.bool, device=self.device)

    def weigh(self, context: StepContext) -> tuple[float, float]:
        return 1.0, 0.0

    def ranking(self, batch: Batch) -> dict[str, Any]:
        return {}

    def further(self, batch: Batch, out: Output, teacher_out: Output | None, forms: Any) -> Tensor | None:
        if teacher_out is None:
            return None
        old = batch.labels < self.classification.num_old
        edges = self.joined[batch.labels][:, batch.labels] & old & old[:, None]
        return self.own.tpcil_lambda * topology(out.features, teacher_out.features, edges)

    def after_memory(self, network: Network, memory: Memory) -> dict[str, Tensor]:
        """Grow the graph by the new classes, and let the exemplars compete for its vertices."""
        features = F.normalize(memory.images.output(memory.ids, False).features).double().cpu()
        classes = range(int(memory.positions.max()) + 1)
        vertices = torch.stack([mean_direction(features[torch.from_numpy(memory.positions == c)]) for c in classes])
        nearest = (features @ vertices.T).topk(min(2, len(vertices)), dim=1).indices.numpy()
        if len(vertices) > 1:
            compete(self.ages, nearest, self.own.tpcil_age)
        self.join()
        return {}

    def join(self) -> None:
        self.joined.copy_(torch.from_numpy(self.ages >= 0) | torch.eye(len(self.ages), dtype=torch.bool))

    def state_dict(self) -> dict[str, Any]:
        return {"ages": torch.from_numpy(self.ages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ages = state["ages"].cpu().numpy().copy()
        self.join()


def compete(ages: NDArray[np.int64], nearest: NDArray[np.int64], oldest: int) -> None:
    """Competitive Hebbian learning, in place. nearest: int64 [n, 2], the nearest vertices of each signal, in turn."""
    for first, second in nearest:
        edges = ages[first] >= 0
        ages[first, edges] += 1
        ages[first, second] = 0
        ages[first, ages[first] > oldest] = -1
        ages[:, first] = ages[first]
