"""Class orders, the two ImageNet-100 subsets and the incremental steps, exactly as published.

"Following [15], [26], the class order is defined by NumPy using the random seed 1993" (section 4.1.1) names two
different orders: LUCIR's [15] and iCaRL's [26]. Both are here; `lucir` is the default of the recipes.
"""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from fastil.errors import UserError
from fastil.settings import shown

Ids = NDArray[np.int64]
SEED = 1993
IMAGENET_CLASSES = 1000
# Hash of each ImageNet-100 subset's sorted wnids: the names of its classes tell whether a data set is one of them.
SUBSET_HASHES = {"lucir": "fce943fa2f5b", "first100": "e685f52fed13"}
LUCIR_RUNS = 1000  # orders of LUCIR's stream with a name
ORDERS = (
    f"lucir, lucirN (N from 2 to {LUCIR_RUNS}), per_seed, icarl, alphabetical, natural, seedN, or a list of class ids "
    "or names"
)


@dataclass(frozen=True)
class ProtocolConfig:
    """How the classes are divided over the steps."""

    order: Annotated[str | list[int | str] | None, Field(description=f"null or {ORDERS}")] = None
    subset: str | None = None  # lucir | first100: one of the two ImageNet-100 subsets; `order` is that of its classes
    classes: int | None = None  # only that many take part, the first of the order; default: all
    base_classes: int | None = None  # of the base step; default: half of them, or what a list of increments leaves over
    # Classes of each further step: one number, or a list; a list of all classes begins with the base step. Default:
    # five equal steps.
    increment: Annotated[
        Annotated[int, Field(ge=0)] | list[PositiveInt] | None,
        Field(description="an integer of at least 0, a list of integers above 0 such as [3, 3, 1], or null"),
    ] = None


def class_order(
    name_or_list: str | Sequence[int | str], num_classes: int, names: Sequence[str] | None = None, seed: int = 0
) -> Ids:
    """Return data set ids in the order in which they are learned, int64 [num_classes]: position p holds class order[p].

    "lucir": a shuffle of the ids under seed 1993 (LUCIR, Mnemonics, BiC's ImageNet, PODNet's ImageNet). "lucir2",
    "lucir3", ...: the next shuffles of that stream, as in the second, third, ... run of LUCIR's code. "per_seed":
    another of these orders for each run: "lucir" with seed 0, "lucir2" with seed 1, and so on. "icarl": the order of
    iCaRL's Theano code for CIFAR-100, which draws from the same seed after shuffling 500 training indices for each of
    the 100 classes. "seedN": a permutation under seed N, as PyCIL draws it. "alphabetical": 0, 1, 2, ... "natural": by
    name, with numbers in names compared by value (2 before 10). A list names every class once, by its id (an int) or
    its name.

    names: of the classes, by id; "natural" and a list of names need them. seed: of the run; "per_seed" needs it. Raises
    UserError for anything else.
    """
    if not isinstance(name_or_list, str):
        return _listed(name_or_list, num_classes, names)
    if name_or_list == "alphabetical":
        return np.arange(num_classes, dtype=np.int64)
    if name_or_list == "natural":
        if names is None:
            raise UserError("order=natural: the names of the classes are not known without the images; give --data")
        return np.array(sorted(range(num_classes), key=lambda c: natural_key(names[c])), dtype=np.int64)
    drawn = re.fullmatch(r"seed(0|[1-9][0-9]{0,9})", name_or_list)
    if drawn and int(drawn[1]) < 2**32:
        return np.random.RandomState(int(drawn[1])).permutation(num_classes).astype(np.int64)
    if name_or_list == "icarl" and num_classes != 100:
        raise UserError(f"order=icarl: exists for 100 classes only, not for {num_classes}; use order=lucir")
    run = 1 if name_or_list == "icarl" else _lucir_run(name_or_list, seed)
    random = np.random.RandomState(SEED)
    if name_or_list == "icarl":
        for _ in range(100):
            random.shuffle(np.arange(500))
    for _ in range(run):  # one shuffle per run, from one stream
        order = np.arange(num_classes, dtype=np.int64)
        random.shuffle(order)
    return order


def _lucir_run(name: str, seed: int) -> int:
    """Return the run of LUCIR's code that has this order, from 1. Raises UserError if no run has it."""
    if name == "per_seed" and seed >= LUCIR_RUNS:
        raise UserError(
            f"order=per_seed: seeds 0 to {LUCIR_RUNS - 1} have an order of their own, seed={seed} has none; choose one "
            f"of those, or order=seed{seed}"
        )
    if name in ("lucir", "per_seed"):
        return 1 if name == "lucir" else seed + 1
    number = re.fullmatch("lucir([1-9][0-9]{0,3})", name)
    if number and 2 <= int(number[1]) <= LUCIR_RUNS:
        return int(number[1])
    raise UserError(f"order={shown(name)}: unknown; use {ORDERS}")


def _listed(wanted: Sequence[int | str], num_classes: int, names: Sequence[str] | None) -> Ids:
    """Return the order of a list of ids and names. Raises UserError if it does not name every class once."""
    by_name = {name: class_id for class_id, name in enumerate(names or ())}
    said = f"order={shown(np.asarray(wanted, dtype=object).tolist())}"
    for name in wanted:
        if isinstance(name, str) and name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {shown(near[0])}?" if near else f"classes are {shown(', '.join(by_name))}"
            if names is None:
                hint = "without the images only ids are known; give --data"
            raise UserError(f"{said}: no class {shown(name)}; {hint}")
    order = np.asarray([by_name[c] if isinstance(c, str) else c for c in wanted], dtype=np.int64)
    if not np.array_equal(np.sort(order), np.arange(num_classes)):
        raise UserError(
            f"{said}: the list must hold each of the {num_classes} class ids (0 to {num_classes - 1}) exactly once, or "
            f"the name of the class{_odd(order.ravel().tolist(), num_classes, names)}"
        )
    return order


def _odd(ids: list[int], num_classes: int, names: Sequence[str] | None) -> str:
    """Return what is wrong with a list of ids, as a part of a sentence."""
    known, counts = set(range(num_classes)), Counter(ids)
    outside, twice, missing = set(ids) - known, {c for c in ids if counts[c] > 1}, known - set(ids)
    for what, found in (("there is no", outside), ("twice", twice), ("missing", missing)):
        if found:
            first = min(found)
            return f"; {what}: {first if names is None or first in outside else shown(names[first])}"
    return ""


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key for a name in which numbers count by their value."""
    parts = [part.lstrip("0") if part.isdigit() else part for part in re.split("([0-9]+)", name)]
    return [(0, len(part), part) if number % 2 else (1, 0, part) for number, part in enumerate(parts)]


def numbering_note(names: Sequence[str]) -> str | None:
    """Return a line for the user if class names are numbers but ids are in another order, as in files that sort them as
    text; else None.
    """
    by_number = sorted(names, key=natural_key)
    if list(names) == by_number or not all(re.fullmatch("[0-9]+", name) for name in names):
        return None
    odd = next(i for i, name in enumerate(by_number) if names[i] != name)
    return (
        f"class names are numbers, and their ids are in another order: id {odd} is class {shown(names[odd])}. "
        f"order=natural takes them by number; in a list, quotes make a name: order=['{shown(names[odd])}', ...]"
    )


def imagenet_subset(name: str, order: str = "lucir", seed: int = 0) -> Ids:
    """Return ids among the 1000 sorted wnids, already in incremental order, int64 [100].

    "lucir": the subset of LUCIR and Mnemonics, 100 wnids drawn under seed 1993, sorted, then shuffled under the same
    seed. "first100": the subset of PODNet, BiC and DER, the alphabetically first 100 wnids in LUCIR's order. The two
    share 9 classes. order, seed: of the 100 sorted wnids, as in `class_order`. Raises UserError for another name.
    """
    if name == "lucir":
        members = np.sort(np.random.RandomState(SEED).permutation(IMAGENET_CLASSES)[:100])
    elif name == "first100":
        members = np.arange(100)
    else:
        raise UserError(f"subset={name}: unknown; use lucir or first100")
    return members.astype(np.int64)[class_order(order, 100, seed=seed)]


@dataclass(frozen=True)
class Protocol:
    """A base step of `base` classes, then increments, over `order` (int64, data set ids in the order of learning).
    increment: the classes of each further step, or a list of them. Raises UserError if the steps do not take all
    classes.
    """

    order: Ids
    base: int
    increment: int | Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", np.asarray(self.order, dtype=np.int64))
        total = len(self.order)
        if not 1 <= self.base <= total:
            raise UserError(
                f"base_classes={self.base}: must lie between 1 and the {total} classes of the data set"
                + (f"; from scratch is {self._from_scratch}" if self.base == 0 else "")
            )
        rest = total - self.base
        if isinstance(self.increment, Sequence):
            if sum(self.increment) != rest or min(self.increment, default=1) < 1:
                raise UserError(
                    f"increment={shown(list(self.increment))}: the steps must take the {rest} classes after the base "
                    f"step (base_classes={self.base}), not {sum(self.increment)}"
                )
        elif self.increment < 0 or (rest and (self.increment == 0 or rest % self.increment)):
            alike = self.increment > 0 and self.base != self.increment and total % self.increment == 0
            scratch = f"; steps that are all alike: {self._from_scratch}" if alike else ""
            uneven = [self.increment] * (rest // self.increment) + [rest % self.increment] if self.increment > 0 else []
            raise UserError(
                f"increment={self.increment}: the {rest} classes after the base step do not divide into steps of that "
                f"size; use {_divisors(rest) or 0}, or a list such as {shown(uneven or [rest])}{scratch}"
            )

    @property
    def _from_scratch(self) -> str:
        """The settings that turn the first increment into the base step."""
        if isinstance(self.increment, Sequence):
            first, *later = self.increment or [len(self.order)]
            return f"base_classes={first} increment={shown(later)}"
        return f"base_classes={self.increment or 1} increment={self.increment or 1}"

    @property
    def sizes(self) -> list[int]:
        """The number of classes that each step adds, the base step first."""
        if isinstance(self.increment, Sequence):
            return [self.base, *self.increment]
        return [self.base] + [self.increment] * ((len(self.order) - self.base) // max(1, self.increment))

    @property
    def steps(self) -> list[Ids]:
        """The data set ids of each step, the base step first."""
        return np.split(self.order, np.cumsum(self.sizes)[:-1])

    def positions(self, num_classes: int) -> Ids:
        """Return a lookup table from data set label to incremental position, int64 [num_classes], -1 for a class that
        the protocol leaves out."""
        table = np.full(num_classes, -1, dtype=np.int64)
        table[self.order] = np.arange(len(self.order))
        return table

    def class_hash(self, names: Sequence[str]) -> str:
        """Return a short hash of the class names in incremental order, which tells two "ImageNet-100" runs apart."""
        return _hash_of(names[i] for i in self.order)


def _hash_of(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def build_protocol(
    config: ProtocolConfig, num_classes: int, names: Sequence[str] | None = None, seed: int = 0
) -> Protocol:
    """Return the protocol of a run on a data set of num_classes classes. names: the classes' names by id, if known.
    seed: the run's, for order=per_seed. Raises UserError if the recipe does not fit the data set.
    """
    wanted = "lucir" if config.order is None else config.order
    if config.subset is not None:
        if isinstance(wanted, list) or wanted == "natural":
            raise UserError(
                f"subset={shown(config.subset)} with order={shown(wanted)}: the classes of a subset are ordered by "
                "lucir, lucirN, per_seed, icarl, seedN or alphabetical; use one of them, or set subset=null"
            )
        order = imagenet_subset(config.subset, wanted, seed)
        found = _subset_of(names or ())
        if found == config.subset:  # the subset alone, as `convert --classes lucir` writes it
            order = np.argsort(np.array(names))[class_order(wanted, num_classes, seed=seed)]
        elif found is not None:
            raise UserError(
                f"subset={config.subset}: this data set has the 100 classes of the other ImageNet-100, {found}; set "
                f"subset={found}, or convert ImageNet with --classes {config.subset}"
            )
        elif num_classes != IMAGENET_CLASSES:
            raise UserError(
                f"subset={config.subset}: picks among ImageNet's 1000 classes, or takes its own {len(order)} alone, by "
                f"their wnids; this data set has {num_classes} others, so set subset=null"
            )
    else:
        order = class_order(wanted, num_classes, names, seed)
    if config.classes is not None:
        if not 1 <= config.classes <= len(order):
            raise UserError(
                f"classes={config.classes}: must lie between 1 and the {len(order)} classes of the data set"
            )
        order = order[: config.classes]
    return Protocol(order, *_step_sizes(config, len(order)))


def _subset_of(names: Sequence[str]) -> str | None:
    """Return the ImageNet-100 subset that has exactly these classes, or None."""
    found = _hash_of(sorted(names))
    return next((subset for subset, known in SUBSET_HASHES.items() if known == found), None)


def _step_sizes(config: ProtocolConfig, total: int) -> tuple[int, int | list[int]]:
    """Return the classes of the base step and of each further step: the recipe's, or half of the classes and then five
    equal steps. Raises UserError if that cannot be.
    """
    base, increment = config.base_classes, config.increment
    if isinstance(increment, list):
        rest = total - sum(increment)
        if rest == 0 and base in (None, increment[0]):  # it begins with the base step
            return increment[0], increment[1:]
        if rest == 0:
            raise UserError(
                f"increment={shown(increment)}: takes all {total} classes, so it begins with the base step, and "
                f"base_classes={base} is another number; set base_classes=null, or shorten the list"
            )
        if base is None and rest < 1:
            raise UserError(f"increment={shown(increment)}: takes {total - rest} of {total} classes; shorten the list")
        return rest if base is None else base, increment
    base = total // 2 if base is None else base
    if increment is not None:
        return base, increment
    rest = total - base
    if rest > 0 and rest % 5:
        raise UserError(
            f"increment=null: the {rest} classes after the base step do not make five equal steps; give "
            f"increment={_divisors(rest)}, or a list"
        )
    return base, rest // 5


def _divisors(n: int) -> str:
    """Return the divisors of n as text, such as "1 or 2 or 4"."""
    return " or ".join(str(d) for d in range(1, n + 1) if n % d == 0)
