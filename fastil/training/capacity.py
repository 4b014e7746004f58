"""Whether the settings of a run can fit the memory of its device, said before it is asked for."""

from collections.abc import Sequence

import torch

from fastil import ranks
from fastil.data.loaders.choose import memory_of
from fastil.device import pixel_dtype, settle_precision
from fastil.errors import UserError
from fastil.plan import share_of
from fastil.recipe import Recipe
from fastil.training.step_plan import StepPlan


def check_batch(
    recipe: Recipe, steps: Sequence[StepPlan], size: tuple[int, int], device: torch.device, handed_on: int = 0
) -> None:
    """Raise UserError where a training step needs more memory than the device has, by what it needs at the least.

    size: height and width of an image. handed_on: numbers that are kept of an image (`compiling.cost_per_image`), where
    the network is known.
    """
    (height, width), processes = size, ranks.count()
    batch = recipe.train.batch_size
    # The batches of Meta's B_t are always full.
    largest = batch if recipe.loss.loss == "meta_balanced" else max(plan.visits // plan.epochs for plan in steps)
    shown, trained = (share_of(images, 0, processes) for images in (batch, min(batch, largest)))
    kept = handed_on * pixel_dtype(settle_precision(recipe.train.precision, device)).itemsize
    needed, there = max(shown * 12 * height * width, trained * kept), memory_of(device)
    if needed > there:
        each = "" if processes == 1 else f" in each of {processes} processes"
        raise UserError(
            f"batch_size={batch}: a training step on images of {width}x{height} takes {needed / 2**30:,.0f} GiB at the "
            f"least{each}, and {device} has {there / 2**30:,.0f}; lower batch_size, or the size of the images"
        )
