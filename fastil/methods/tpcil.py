"""TPCIL (Tao et al., ECCV 2020), an approximation: there is no public code, and its full text was not at hand.

Known: the topology of the feature space is kept as an elastic Hebbian graph, built by competitive Hebbian learning; a
topology-preserving loss penalises changes of its neighbour relations while new classes are learned; the graph grows.

Chosen here: vertices are the class embeddings (mean directions of the exemplars under the network that is the next
step's teacher). Each exemplar joins its nearest and second nearest vertex by an edge of age 0 and ages the winner's
other edges, which are removed when too old. Each image of a batch is a signal. Let s be its cosines with the vertex
that wins it under the teacher, and with the vertices joined to that one. The loss is 1 minus the correlation, over the
batch, of the student's s with the teacher's. Its weight grows with sqrt(N_old / N_new). The rest is LUCIR's: head,
imprinting, frozen rows, margin ranking; the topology replaces the less-forget constraint.

Measured on 14 small classes: lambda 1 and 5 end alike and behind LUCIR (by 4 to 5 points after the first step; features
of old images drift seven to eight times as far), and 50 diverges. With 10 classes nearly all vertices are joined.

A first form related only the old images of a batch, to one another, and forgot more than IL-Baseline.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from fastil import ranks
from fastil.data import Batch
from fastil.losses import topology
from fastil.methods.context import MemoryContext
from fastil.methods.lucir import Lucir, mean_direction
from fastil.methods.method import Keys
from fastil.methods.registry import register
from fastil.models import Network, Output


@dataclass(frozen=True)
class TpcilConfig:
    """method=tpcil."""

    tpcil_lambda: NonNegativeFloat = 5.0  # of the topology loss, times sqrt(N_old / N_new): LUCIR's, chosen here
    tpcil_age: PositiveInt = 200  # an edge survives so many wins of its vertex in which it has no part


@register
class Tpcil(Lucir):
    """LUCIR with a topology-preserving loss. ages: int64 [W, W], a vertex's wins since the edge last took part in one;
    -1: no edge. vertices: [W, d], of length 1.
    """

    name = "tpcil"
    needs_exemplars = True
    Config = TpcilConfig
    config: TpcilConfig

    @classmethod
    def reads(cls, keys: Keys) -> set[str]:
        """Return its own keys and LUCIR's, without `lucir_lambda`."""
        return super().reads(keys) | Lucir.reads(keys) - {"lucir_lambda"}

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        width = len(self.classification.log_prior)
        self.ages = np.full((width, width), -1, dtype=np.int64)
        self.joined = torch.eye(width, dtype=torch.bool, device=self.device)
        self.vertices = torch.zeros(width, 0, device=self.device)

    @property
    def adaptive_lambda(self) -> float:
        """The weight of the topology loss, a float."""
        return self.config.tpcil_lambda * math.sqrt(self.context.num_old / self.context.num_new)

    def extra_loss(self, batch: Batch, out: Output, teacher_out: Output | None, ops: Any) -> Tensor | None:
        """Return the weighted topology loss, 0-d. An image is a signal. Its edges lead to the vertex that wins it under
        the teacher, and to the vertices joined to that one.
        """
        if teacher_out is None:
            return None
        wide = self.vertices.dtype  # features are bfloat16 under autocast, which is off here
        student, teacher = (F.normalize(o.features.to(wide)) @ self.vertices.T for o in (out, teacher_out))
        old = self.classification.is_old
        winner = torch.where(old, teacher, -2.0).argmax(1)
        return self.adaptive_lambda * topology(student, teacher, self.joined[winner] & old, ranks.total)

    def after_memory(self, network: Network, memory: MemoryContext) -> dict[str, Tensor]:
        """Add the new classes to the graph, and let the exemplars compete for its vertices. Returns no pixels."""
        features = F.normalize(memory.extractor.extract(memory.ids, False).features).double().cpu()
        classes = range(int(memory.positions.max()) + 1)
        vertices = torch.stack([mean_direction(features[torch.from_numpy(memory.positions == c)]) for c in classes])
        nearest = (features @ vertices.T).topk(min(2, len(vertices)), dim=1).indices.numpy()
        if len(vertices) > 1:
            compete(self.ages, nearest, self.config.tpcil_age)
        self.vertices = F.pad(vertices.float().to(self.device), (0, 0, 0, len(self.ages) - len(vertices)))
        self.join()
        return {}

    def join(self) -> None:
        """Set `joined`, bool [W, W], from the ages: the vertices that an edge joins; each is joined to itself."""
        self.joined.copy_(torch.from_numpy(self.ages >= 0) | torch.eye(len(self.ages), dtype=torch.bool))

    def state_dict(self) -> dict[str, Any]:
        """Return ages and vertices."""
        return {"ages": torch.from_numpy(self.ages), "vertices": self.vertices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up ages and vertices."""
        self.ages, self.vertices = state["ages"].cpu().numpy().copy(), state["vertices"].to(self.device)
        self.join()


def compete(ages: NDArray[np.int64], nearest: NDArray[np.int64], oldest: int) -> None:
    """Run competitive Hebbian learning on ages [V, V], in place. nearest: int64 [n, 2], the two nearest vertices of
    each signal, in turn. oldest: the age beyond which an edge is removed."""
    for first, second in nearest:
        edges = ages[first] >= 0
        ages[first, edges] += 1
        ages[first, second] = 0
        ages[first, ages[first] > oldest] = -1
        ages[:, first] = ages[first]
