"""The loaders of a run: training images augmented and plain, and test images."""

import torch
from torch import Tensor

from fastil.data import Dataset, Split, make_loader
from fastil.data.loaders.choose import check_resident, choose
from fastil.data.loaders.streaming import Streaming
from fastil.data.sources import image_size
from fastil.data.transforms import transforms
from fastil.protocol import Ids
from fastil.recipe import Recipe


class RunLoaders:
    """One loader for each way of seeing a split, for the whole run: a step only hands it other ids.

    train: training images, augmented. plain: the same images by the test-time transform, for herding, class means and
    imprinting. test: test images. exemplars: how many the run keeps at its end. Raises UserError where the recipe's
    loader, or memory=resident, cannot be had.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device, exemplars: int) -> None:
        streamed, backend = not isinstance(dataset.train, Split), recipe.data.loader
        augmented, plain = transforms(recipe.data, image_size(recipe.data, dataset), streamed=streamed)
        self.train = make_loader(dataset.train, backend, augmented, device)
        self.keeps_exemplars = recipe.data.memory == "resident"
        if self.keeps_exemplars:
            check_resident(dataset.train, exemplars, self.train.name, device)
        # A resident loader crops only what its plans ask for, so that one serves both.
        self.plain = self.train if plain == augmented else make_loader(dataset.train, backend, plain, device)
        self.test = make_loader(dataset.val, backend, plain, device)
        self.streams = isinstance(self.train, Streaming)
        self.pixels: dict[str, Tensor] = {}  # "ids" and "images" of exemplars whose pixels were learned
        self.why = choose(dataset.train, device)[1] if backend == "auto" else "as asked for"

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
