"""What one epoch visits: sample ids, crop boxes, flips, batches (numpy only).

All randomness is a counter: a hash of (seed, step, phase, epoch, sample id, occurrence) decides order, crop and flip.
So a plan depends on nothing that happened before it, on no backend or worker, and not on where a run was resumed.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

PHASES = ("train", "correct", "memory", "evaluate", "meta")
STREAMS = ("order", "top", "left", "flip", "select", "draw", "area", "ratio")
AREA, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # torchvision's, for a random resized crop


@dataclass(frozen=True)
class SamplerConfig:
    """How often the images of an incremental step are visited (section 4.3.3, Table 4); the base step has no memory.

    uniform: each once per epoch. The others make as many visits, drawn with replacement. memory_oversampling: "each
    training mini-batch theoretically contains the same number of sample from new and old classes" (LUCIR's rs_ratio =
    0.5). class_oversampling: "each class has the same probability of appearing in each training mini-batch".
    """

    sampler: Literal["uniform", "memory_oversampling", "class_oversampling"] = "uniform"

    def probabilities(self, positions: NDArray[np.int64], num_old: int) -> NDArray[np.float64] | None:
        """Return the probability that a visit is of each image, [n]; None if each is visited once. positions: int64
        [n], the images' classes.
        """
        if self.sampler == "uniform" or num_old == 0:
            return None
        group = positions if self.sampler == "class_oversampling" else (positions < num_old).astype(np.int64)
        share = 1 / np.bincount(group)[group]
        probabilities: NDArray[np.float64] = share / share.sum()
        return probabilities


@dataclass(frozen=True)
class Transform:
    """The output of a loader, and how training images are augmented.

    A box of a plan that has another size than the output is resized to it (bilinear, antialiased). With `resize`, it is
    resized until its short side has that many pixels, and the centre is taken.
    """

    height: int
    width: int
    pad: int  # random crop after padding each side with this many black pixels
    flip: bool  # random mirror, left to right
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: bool = False  # train on random resized crops (Szegedy et al. 2015), as ImageNet's recipes do
    resize: int | None = None  # short side, before the central crop


class Key(NamedTuple):
    """The place in the run at which a random decision is made."""

    seed: int
    step: int
    phase: str = "train"
    epoch: int = 0


@dataclass(frozen=True)
class EpochPlan:
    """One pass over some samples, in the order of the visits."""

    ids: NDArray[np.int64]  # [n]
    boxes: NDArray[np.int32]  # [n, 4] top, left, height, width in source pixels; outside the image is black
    flips: NDArray[np.bool_]  # [n]
    batch_size: int
    ends: NDArray[np.int64] | None = None  # of the batches, if this is a part of a larger plan

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 2")

    def batches(self) -> Iterator[slice]:
        """Yield slices of the plan: full batches, then the rest. A rest of one image joins the batch before it, because
        batch normalisation cannot train on a single image.
        """
        start = 0
        for end in self._ends().tolist():
            yield slice(start, end)
            start = end

    def _ends(self) -> NDArray[np.int64]:
        if self.ends is not None:
            return self.ends
        count = len(self.ids)
        ends = np.minimum(np.arange(1, num_batches(count, self.batch_size) + 1) * self.batch_size, count)
        ends[-1:] = count
        return ends

    def sizes(self) -> NDArray[np.int64]:
        """Return the number of images of each batch, int64 [batches]."""
        return np.diff(self._ends(), prepend=0)

    def only(self, taken: NDArray[np.bool_]) -> "EpochPlan":
        """Return these visits, in as many batches as before, some of which may be empty. taken: bool [n]."""
        counted = np.concatenate([[0], np.cumsum(taken)])
        return self._part(taken, counted[self._ends()])

    def of_rank(self, rank: int, ranks: int) -> "EpochPlan":
        """Return what one of several processes reads.

        Every batch is shared out, to within one image, and no image is visited twice to make shares equal. No process
        gets a single image, on which batch normalisation cannot train, or none: a batch of fewer than two images per
        process is whole in all of them. Crops and flips are those of the whole plan, for any number of processes.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}: must lie in [0, {ranks})")
        if ranks == 1:
            return self
        sizes = self.sizes()
        # Every steps-th visit of each batch from the first on; a mask would cover the visits of all processes.
        steps = np.where(sizes < 2 * ranks, 1, ranks)
        first = rank % steps
        counts = (sizes - first + steps - 1) // steps
        ends = np.cumsum(counts)
        origins = self._ends() - sizes + first - (ends - counts) * steps
        numbers = np.repeat(origins, counts) + np.arange(counts.sum()) * np.repeat(steps, counts)
        return self._part(numbers, ends)

    def _part(self, visits: NDArray[np.int64] | NDArray[np.bool_], ends: NDArray[np.int64]) -> "EpochPlan":
        return EpochPlan(self.ids[visits], self.boxes[visits], self.flips[visits], self.batch_size, ends)


def share_of(images: int, rank: int, ranks: int) -> int:
    """Return how many images of a batch a process reads, see `EpochPlan.of_rank`; the first one reads most."""
    return images if images < 2 * ranks else (images - rank + ranks - 1) // ranks


def num_batches(count: int, batch_size: int) -> int:
    """Return how many batches `EpochPlan.batches` makes of this many images."""
    full, rest = divmod(count, batch_size)
    return full + (rest > 1 or count == 1)


def counter_hash(key: Key, stream: str, ids: NDArray[np.int64], occurrence: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return uniform uint64 [n] from the counter of each sample (SplitMix64's finaliser, chained over the words)."""
    words = (key.seed, key.step, PHASES.index(key.phase), key.epoch, STREAMS.index(stream), ids, occurrence)
    state = np.zeros(1, dtype=np.uint64)  # one for all samples until a word differs between them
    for word in words:
        state = state + np.atleast_1d(word).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def occurrences(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each id came earlier in the list, 0 for the first time: int64 [n]."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    runs = np.diff(np.r_[starts, len(ids)])
    counted = np.empty(len(ids), dtype=np.int64)
    counted[order] = np.arange(len(ids)) - np.repeat(starts, runs)
    return counted


def draw(ids: NDArray[np.int64], probabilities: NDArray[np.float64], key: Key) -> NDArray[np.int64]:
    """Return as many ids, drawn independently and with replacement: int64 [n]."""
    slots = np.arange(len(ids), dtype=np.int64)
    uniform = counter_hash(key, "draw", slots, np.zeros_like(slots)) / 2.0**64
    return ids[np.searchsorted(np.cumsum(probabilities)[:-1], uniform, side="right")]


def training_plan(
    ids: NDArray[np.int64], key: Key, transform: Transform, batch_size: int, sizes: NDArray[np.int32] | None = None
) -> EpochPlan:
    """Return a plan of every entry of ids once, shuffled, each with its own crop and flip (an id listed twice is
    cropped twice).

    sizes: int32 [N, 2], height and width of every image of the split, or None if all have the transform's.
    """
    if len(ids) == 0:
        raise ValueError("a training plan needs at least one sample")
    again = occurrences(ids)
    order = np.argsort(counter_hash(key, "order", ids, again), kind="stable")
    ids, again = ids[order], again[order]
    boxes = _whole(ids, transform, sizes)
    if transform.resized:
        boxes = resized_crops(boxes[:, 2:], key, ids, again)
    elif transform.pad:
        for column, stream in enumerate(("top", "left")):
            draw = counter_hash(key, stream, ids, again) % np.uint64(2 * transform.pad + 1)
            boxes[:, column] = draw.astype(np.int32) - transform.pad
    flips = np.zeros(len(ids), dtype=np.bool_)
    if transform.flip:
        flips = (counter_hash(key, "flip", ids, again) >> np.uint64(63)).astype(np.bool_)
    return EpochPlan(ids, boxes, flips, batch_size)


@contextlib.contextmanager
def drawn_ahead(plan: Callable[[int], EpochPlan], epochs: Sequence[int]) -> Iterator[Iterator[EpochPlan]]:
    """Yield the plans of these epochs in turn. A thread draws each while the one before it is trained on: that takes
    half a second for half of ImageNet, in which a GPU would stand idle.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="fastil-plan") as pool:

        def in_turn() -> Generator[EpochPlan, None, None]:
            pending = [pool.submit(plan, epoch) for epoch in epochs[:1]]
            for number in range(len(epochs)):
                current = pending.pop().result()
                pending += [pool.submit(plan, epoch) for epoch in epochs[number + 1 : number + 2]]
                yield current

        plans = in_turn()
        try:
            yield plans
        finally:
            plans.close()
            pool.shutdown(wait=True, cancel_futures=True)


def resized_crops(
    sizes: NDArray[np.int32], key: Key, ids: NDArray[np.int64], occurrence: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Return boxes of random resized crops, [n, 4], by the procedure of torchvision's RandomResizedCrop: up to ten
    tries of an area and a ratio of width to height, then the largest central box whose ratio is allowed. sizes: [n, 2].
    """
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    # The fallback, for images where every try fails.
    high = np.where(width < RATIO[0] * height, np.round(width / RATIO[0]).astype(np.int64), height)
    wide = np.where(width > RATIO[1] * height, np.round(height * RATIO[1]).astype(np.int64), width)
    boxes = np.stack([(height - high) // 2, (width - wide) // 2, high, wide], axis=1)
    left = np.arange(len(ids))
    for attempt in range(ATTEMPTS):
        again = occurrence[left] + (attempt << 40)
        area, ratio, top, side = (
            counter_hash(key, stream, ids[left], again) / 2.0**64 for stream in ("area", "ratio", "top", "left")
        )
        area = (AREA[0] + (AREA[1] - AREA[0]) * area) * height[left] * width[left]
        ratio = np.exp(np.log(RATIO[0]) + (np.log(RATIO[1]) - np.log(RATIO[0])) * ratio)
        wide, high = np.round(np.sqrt(area * ratio)).astype(np.int64), np.round(np.sqrt(area / ratio)).astype(np.int64)
        fits = (wide > 0) & (high > 0) & (wide <= width[left]) & (high <= height[left])
        drawn = np.stack([(height[left] - high + 1) * top, (width[left] - wide + 1) * side, high, wide], axis=1)
        boxes[left[fits]] = drawn[fits].astype(np.int64)
        left = left[~fits]
        if len(left) == 0:
            break
    return boxes.astype(np.int32)


def cycled_plan(
    ids: NDArray[np.int64],
    key: Key,
    transform: Transform,
    batch_size: int,
    first: int,
    count: int,
    sizes: NDArray[np.int32] | None = None,
) -> EpochPlan:
    """Return batches `first` to `first + count` of an endless stream that visits the ids over and over, each pass
    shuffled and cropped again. All of them are full, however few ids there are. The number of the pass takes the place
    of key.epoch.
    """
    start, stop = first * batch_size, (first + count) * batch_size
    passes = range(start // len(ids), -(-stop // len(ids)))
    plans = [training_plan(ids, key._replace(epoch=number), transform, batch_size, sizes) for number in passes]
    part = slice(start - passes.start * len(ids), stop - passes.start * len(ids))
    return EpochPlan(
        np.concatenate([plan.ids for plan in plans])[part],
        np.concatenate([plan.boxes for plan in plans])[part],
        np.concatenate([plan.flips for plan in plans])[part],
        batch_size,
    )


def sequential_plan(
    ids: NDArray[np.int64],
    transform: Transform,
    batch_size: int,
    mirrored: bool = False,
    sizes: NDArray[np.int32] | None = None,
) -> EpochPlan:
    """Return a plan of every entry of ids once, in order, as whole images, maybe mirrored: the test-time transform."""
    return EpochPlan(ids, _whole(ids, transform, sizes), np.full(len(ids), mirrored), batch_size)


def _whole(ids: NDArray[np.int64], transform: Transform, sizes: NDArray[np.int32] | None) -> NDArray[np.int32]:
    boxes = np.zeros((len(ids), 4), dtype=np.int32)
    boxes[:, 2:] = (transform.height, transform.width) if sizes is None else sizes[ids]
    return boxes
