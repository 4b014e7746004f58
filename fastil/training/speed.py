"""How fast this machine trains a recipe now, and how fast it would with no other program on it."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fastil.device import autocast, multiplying_in, pick_device, pixel_dtype, settle_precision
from fastil.models import Folded, Network
from fastil.recipe import Recipe

TIMED_PIXELS = 2**18  # of a batch that is timed on a CPU
FEWEST, MOST, LONGEST = 3, 15, 4.0  # steps, and seconds after which no further step begins
STEADY = 0.1  # the middle half of the steps within so much of their median: more of them would say the same
BUSY = 0.85  # a smaller share of the processors' time than this is no chance of the moment


class Rates(NamedTuple):
    """Images per second of training, uncompiled, without and with a teacher."""

    plain: float
    distilled: float

    def later(self, recipe: Recipe) -> float:
        """Return the rate of a recipe's incremental steps."""
        return self.distilled if recipe.procedure.uses_teacher else self.plain


@dataclass(frozen=True)
class Speeds:
    """now: by the clock on the wall. quiet: what they would be without other programs, which take the share `others` of
    the processors; None where these take next to nothing, or where the device is no CPU."""

    now: Rates
    quiet: Rates | None = None
    others: float = 0.0


class Timed(NamedTuple):
    """A training step: images per second by the clock on the wall and by the time on the processors, summed over all
    threads; and the share of the threads' time that they were on a processor."""

    wall: float
    processor: float
    share: float


def speeds(recipe: Recipe, size: tuple[int, int]) -> Speeds:
    """Images per second of training on the recipe's device. size: height and width of the images."""
    device = pick_device(recipe.train.device)
    student, teacher = (recipe.build_network(100, 0).to(device) for _ in range(2))
    folded = Folded(teacher, pixel_dtype(settle_precision(recipe.train.precision, device)), 0)

    def timed() -> tuple[Timed, Timed]:
        return _time_steps(recipe, student, None, size, device), _time_steps(recipe, student, folded, size, device)

    plain, distilled = timed()
    now, share = Rates(plain.wall, distilled.wall), min(plain.share, distilled.share)
    if device.type != "cpu" or share > BUSY:
        return Speeds(now)
    threads = torch.get_num_threads()
    if threads > 1:  # they spin while they wait for one that has no processor, so their time says too much
        torch.set_num_threads(1)
        try:
            plain, distilled = timed()
        finally:
            torch.set_num_threads(threads)
    quiet = Rates(threads * plain.processor, threads * distilled.processor)
    return Speeds(now, quiet, 1 - share)


def plain_rate(recipe: Recipe, size: tuple[int, int], device: torch.device) -> float:
    """Images per second of training without a teacher, on a network of its own."""
    rate = _time_steps(recipe, recipe.build_network(100, 0).to(device), None, size, device).wall
    if device.type == "cuda":
        torch.cuda.empty_cache()  # another run may share the GPU
    return rate


def busy(others: float, quiet: str) -> str:
    """The line that says so where other programs slow this one down. quiet: how long it would take without them."""
    return (
        f"note: other programs took {100 * others:.0f} % of the processors while this was timed, which slows several "
        f"threads down more than in proportion; on a quiet machine about {quiet} at best"
    )


def _time_steps(
    recipe: Recipe, student: Network, teacher: Folded | None, size: tuple[int, int], device: torch.device
) -> Timed:
    """Time an uncompiled training step on one resident batch, which is what bounds a run: the median of as many steps
    as it takes until that is steady."""
    batch, precision = recipe.train.batch_size, settle_precision(recipe.train.precision, device)
    if device.type == "cpu":  # a large one takes minutes and says the same
        batch = min(batch, max(2, TIMED_PIXELS // (size[0] * size[1])))
    images = torch.zeros(batch, 3, *size, dtype=pixel_dtype(precision), device=device)
    images = images.to(memory_format=torch.channels_last)
    walls: list[float] = []
    processors: list[float] = []
    began = time.perf_counter()
    while not steady(walls[1:], time.perf_counter() - began):  # the first one warms up
        wall, processor = time.perf_counter(), time.process_time()
        with multiplying_in(precision, device):
            if teacher is not None:
                teacher(images)
            with autocast(precision, device):
                loss = student(images).scaled_logits.float().sum()
            loss.backward()
        student.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    walls, processors = walls[1:], processors[1:]
    share = sum(processors) / (sum(walls) * torch.get_num_threads())
    return Timed(batch / float(np.median(walls)), batch / float(np.median(processors)), share)


def steady(seconds: list[float], spent: float) -> bool:
    """Whether the median of the steps timed so far will do."""
    if len(seconds) < FEWEST:
        return False
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return len(seconds) >= MOST or spent > LONGEST or bool(high - low < STEADY * middle)
