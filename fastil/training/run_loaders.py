"""The loaders of a run: training images augmented and plain, and test images."""

from functools import partial

import torch
from torch import Tensor

from fastil import ranks
from fastil.data import Dataset, Split, make_loader
from fastil.data.loaders.choose import check_resident, choose
from fastil.data.loaders.streaming import Streaming
from fastil.data.sources import image_size
from fastil.data.transforms import transforms
from fastil.protocol import Ids
from fastil.recipe import Recipe
from fastil.training.speed import plain_rate


class RunLoaders:
    """One loader for each way of seeing a split, for the whole run: a step only hands it other ids.

    train: training images, augmented. plain: the same images by the test-time transform, for herding, class means and
    imprinting. test: test images. exemplars: how many the run keeps at its end. before: the loader of a run that is
    resumed, which loader=auto keeps. Raises UserError where the recipe's loader, or memory=resident, cannot be had.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, device: torch.device, exemplars: int, before: str | None = None
    ) -> None:
        streamed, size = not isinstance(dataset.train, Split), image_size(recipe.data, dataset)
        backend, self.why = recipe.data.loader, "as asked for"
        if before is not None and backend in ("auto", before):
            backend, self.why = before, "as before the stop"
        if backend == "auto":
            trained, held = partial(plain_rate, recipe, size, device), recipe.data.memory == "resident"
            backend, self.why = ranks.from_first(
                lambda: choose(dataset.train, dataset.val, device, size, trained, held)
            )
        augmented, plain = transforms(recipe.data, size, streamed=streamed)
        self.train = make_loader(dataset.train, backend, augmented, device)
        self.keeps_exemplars = recipe.data.memory == "resident"
        if self.keeps_exemplars:
            check_resident(dataset.train, exemplars, self.train.name, device)
        # A resident loader crops only what its plans ask for, so that one serves both.
        self.plain = self.train if plain == augmented else make_loader(dataset.train, backend, plain, device)
        self.test = make_loader(dataset.val, backend, plain, device)
        self.streams = isinstance(self.train, Streaming)
        self.pixels: dict[str, Tensor] = {}  # "ids" and "images" of exemplars whose pixels were learned

    def keep(self, exemplars: Ids) -> None:
        """Keep the exemplars decoded where they are trained on, if that was asked for."""
        if self.keeps_exemplars:
            self.train.keep(exemplars)

    def overlay(self, pixels: dict[str, Tensor]) -> None:
        """Show other pixels for some training images from now on, if there are any."""
        self.pixels = pixels or self.pixels
        if pixels:
            for loader in {self.train, self.plain}:
                loader.overlay(**pixels)

    def close(self) -> None:
        """Free what the loaders hold."""
        for loader in (self.train, self.plain, self.test):
            loader.close()
