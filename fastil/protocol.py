"""Class orders, the two ImageNet-100 subsets and the incremental steps, exactly as published (numpy only).

"Following [15], [26], the class order is defined by NumPy using the random seed 1993" (section 4.1.1) names two
different orders: LUCIR's [15] and iCaRL's [26]. Both are here; `lucir` is the default of the recipes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastil.errors import UserError

Ids = NDArray[np.int64]
SEED = 1993
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ProtocolConfig:
    """How the classes are divided over the steps."""

    order: str | list[int] | None = None  # lucir (default) | icarl | alphabetical | an explicit list
    subset: str | None = None  # lucir | first100: one of the two ImageNet-100 subsets, with its own order
    classes: int | None = None  # only the first so many of the order take part; default: all
    base_classes: int | None = None  # classes of the base step; default: half of them
    increment: int | None = None  # classes of each further step; default: what makes five steps


def class_order(name_or_list: str | Sequence[int], num_classes: int) -> Ids:
    """Data set ids in the order in which they are learned: position p holds class order[p]. int64 [num_classes].

    "lucir": a shuffle of the ids under seed 1993 (LUCIR, Mnemonics, BiC's ImageNet, PODNet's ImageNet). "icarl": the
    order of iCaRL's Theano code for CIFAR-100, which draws from the same seed after shuffling 500 training indices for
    each of the 100 classes. "alphabetical": 0, 1, 2, ... A list must name every class once.
    """
    if not isinstance(name_or_list, str):
        order = np.asarray(name_or_list, dtype=np.int64)
        if not np.array_equal(np.sort(order), np.arange(num_classes)):
            raise UserError(
                f"order: the list must hold each of the {num_classes} class ids (0 to {num_classes - 1}) exactly once"
            )
        return order
    if name_or_list == "alphabetical":
        return np.arange(num_classes, dtype=np.int64)
    random = np.random.RandomState(SEED)
    if name_or_list == "icarl":
        if num_classes != 100:
            raise UserError(f"order=icarl exists for 100 classes only, not for {num_classes}; use order=lucir")
        for _ in range(100):
            random.shuffle(np.arange(500))
    elif name_or_list != "lucir":
        raise UserError(f"order={name_or_list}: unknown; use lucir, icarl, alphabetical or a list of class ids")
    order = np.arange(num_classes, dtype=np.int64)
    random.shuffle(order)
    return order


def imagenet_subset(name: str) -> Ids:
    """Ids among the 1000 sorted wnids, already in incremental order. int64 [100].

    "lucir": the subset of LUCIR and Mnemonics, 100 wnids drawn under seed 1993, sorted, then shuffled under the same
    seed. "first100": the subset of PODNet, BiC and DER, the alphabetically first 100 wnids in LUCIR's order. The two
    share 9 classes.
    """
    if name == "lucir":
        members = np.sort(np.random.RandomState(SEED).permutation(IMAGENET_CLASSES)[:100])
    elif name == "first100":
        members = np.arange(100)
    else:
        raise UserError(f"subset={name}: unknown; use lucir or first100")
    return members.astype(np.int64)[class_order("lucir", 100)]


@dataclass(frozen=True)
class Protocol:
    """A base step, then equal increments over `order` (int64, data set ids in the order they are learned)."""

    order: Ids
    base: int
    increment: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", np.asarray(self.order, dtype=np.int64))
        total = len(self.order)
        if not 1 <= self.base <= total:
            raise UserError(f"base_classes={self.base}: must lie between 1 and the {total} classes of the data set")
        rest = total - self.base
        if self.increment < 0 or (rest and (self.increment == 0 or rest % self.increment)):
            raise UserError(
                f"increment={self.increment}: the {rest} classes after the base step do not divide into steps of that "
                f"size; use {_divisors(rest) or 0}"
            )

    @property
    def steps(self) -> list[Ids]:
        """Data set ids of each step, the base step first."""
        bounds = [0, *range(self.base, len(self.order) + 1, self.increment or 1)]
        return [self.order[a:b] for a, b in pairwise(bounds)]

    def positions(self, num_classes: int) -> Ids:
        """Lookup table from data set label to incremental position, -1 for a class the protocol leaves out."""
        table = np.full(num_classes, -1, dtype=np.int64)
        table[self.order] = np.arange(len(self.order))
        return table

    def class_hash(self, names: Sequence[str]) -> str:
        """Short hash of the class names in incremental order, to tell two "ImageNet-100" runs apart at a glance."""
        listing = "\n".join(names[i] for i in self.order)
        return hashlib.sha256(listing.encode()).hexdigest()[:12]


def build_protocol(config: ProtocolConfig, num_classes: int) -> Protocol:
    """The protocol of a recipe on a data set of num_classes classes."""
    if config.subset is not None and config.order is not None:
        raise UserError("subset and order were both given: a subset brings its own class order; drop one of the two")
    if config.subset is not None:
        if num_classes != IMAGENET_CLASSES:
            raise UserError(
                f"subset={config.subset} picks among ImageNet's 1000 classes; this data set has {num_classes}"
            )
        order = imagenet_subset(config.subset)
    else:
        order = class_order("lucir" if config.order is None else config.order, num_classes)
    if config.classes is not None:
        if not 1 <= config.classes <= len(order):
            raise UserError(
                f"classes={config.classes}: must lie between 1 and the {len(order)} classes of the data set"
            )
        order = order[: config.classes]
    total = len(order)
    base = total // 2 if config.base_classes is None else config.base_classes
    if config.increment is not None:
        return Protocol(order, base, config.increment)
    rest = total - base
    if rest > 0 and rest % 5:
        raise UserError(
            f"the {rest} classes after the base step do not make five equal steps; give increment={_divisors(rest)}"
        )
    return Protocol(order, base, rest // 5)


def _divisors(n: int) -> str:
    return " or ".join(str(d) for d in range(1, n + 1) if n % d == 0)
