"""The network of a step as a classifier of images: what a finished run is for."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastil import files
from fastil.data.formats import pixels
from fastil.data.formats.pixels import DEFAULT, Reading
from fastil.data.formats.records import Unreadable, whole_file
from fastil.data.loaders.frames import frame_of, resized
from fastil.data.published import table
from fastil.data.transforms import transforms
from fastil.errors import UserError
from fastil.files import Damaged
from fastil.methods import Method, StepContext
from fastil.models import Network
from fastil.nearest_mean import nearest_mean_scores
from fastil.plan import Transform
from fastil.recipe import Recipe
from fastil.reporting.checkpoints import read_predictor, read_weights
from fastil.reporting.run_files import AGAIN, ProtocolFile

CPU = torch.device("cpu")
TOLERANCE = 1e-3  # by which rounding may leave the range of pixels


class Classifier(nn.Module):
    """Images to probabilities, by the predictor of the run.

    Takes uint8 [n, h, w, 3], or float [n, 3, h, w] in 0 to 1, of the size that `transform` has, and returns float32
    [n, classes] over `class_names`: the classes seen, in the order in which they were learned. The scores of nearest
    class means (iCaRL) are no probabilities; their softmax ranks the classes as they do.
    """

    mean: Tensor
    std: Tensor
    means: Tensor | None

    def __init__(
        self,
        network: Network,
        class_names: list[str],
        transform: Transform,
        method: Method | None = None,
        means: Tensor | None = None,
        reading: Reading = DEFAULT,
    ) -> None:
        super().__init__()
        self.network, self.class_names, self.transform, self.method = network, class_names, transform, method
        self.reading = reading
        self.register_buffer("mean", torch.tensor(transform.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transform.std).view(3, 1, 1), persistent=False)
        self.register_buffer("means", means, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities, float32 [n, classes], for images in 0 to 1, float32 [n, 3, h, w]."""
        out = self.network((self.checked(images) - self.mean) / self.std)
        scores: Tensor = out.scaled_logits
        if self.means is not None:
            scores = nearest_mean_scores(out.features, self.means)
        elif self.method is not None:  # no module, so it stays on the CPU when this moves to a GPU
            scores = self.method.predict(scores.to(self.method.device)).to(scores.device)
        probabilities: Tensor = scores[:, : len(self.class_names)].float().softmax(1)
        return probabilities

    def checked(self, images: Tensor) -> Tensor:
        """As [n, 3, h, w] in 0 to 1, in the type of the weights. Raises UserError for anything else, which would be
        classified, but wrongly; for values out of range only on a CPU and uncompiled: elsewhere the check would wait
        for the device, or could not be exported."""
        height, width = self.transform.height, self.transform.width
        dtype, shape = getattr(images, "dtype", None), tuple(getattr(images, "shape", ()))
        good = isinstance(images, Tensor)
        if good and dtype == torch.uint8 and shape[1:] == (height, width, 3):
            return (images.permute(0, 3, 1, 2) / 255).to(self.mean.dtype)
        good = good and images.is_floating_point() and shape[1:] == (3, height, width)
        if good and images.device.type == "cpu" and not torch.compiler.is_compiling():
            good = bool(((images >= -TOLERANCE) & (images <= 1 + TOLERANCE)).all())  # not so for NaN
        if not good:
            raise UserError(
                f"images are {type(images).__name__} {dtype} {[*shape]}: give uint8 [n, {height}, {width}, 3], or "
                f"float [n, 3, {height}, {width}] in 0 to 1, as a tensor"
            )
        return images.to(self.mean.dtype)

    def image(self, path: Path) -> NDArray[np.uint8]:
        """An image file, prepared as the test images of the run were, uint8 [h, w, 3]."""
        transform = self.transform
        try:
            content = pixels.content_of(whole_file(path), self.reading)
            whole = pixels.decoded(content, self.reading)
            if transform.resize is None and transform.height == transform.width:
                return pixels.as_array(pixels.square(whole, transform.height))
        except Unreadable as error:
            raise UserError(f"{error}; give an image file") from None
        except Exception as error:  # Pillow's readers raise many kinds on damaged files
            raise UserError(f"{path}: not a readable image ({pixels.reason_of(error)}); leave it out") from None
        array = torch.from_numpy(pixels.as_array(whole).copy())
        return frame_of(array, (0, 0, *array.shape[:2]), transform, resized).numpy()


def load_classifier(run: Path, recipe: Recipe, protocol: ProtocolFile, step: int) -> Classifier:
    """The classifier after a step, in eval mode, on the CPU. Raises UserError for what the run did not keep, and where
    it needs code that its directory names and nothing else does."""
    network = recipe.build_network(len(protocol.class_order), 0)
    weights = run / f"checkpoints/step_{step}.pt"
    files.load_weights(network, read_weights(weights, CPU), weights, AGAIN)
    method, means = None, None
    path = run / f"checkpoints/predictor_{step}.pt"
    if path.exists():
        means, method = _predictor(path, recipe, network, protocol, step)
    elif recipe.evaluation.predictor == "nme" or recipe.predicts_by_method:
        raise UserError(f"{path}: missing, as in runs of older versions, which did not keep it; train the run again")
    names = [protocol.class_names[c] for classes in protocol.steps[: step + 1] for c in classes]
    transform = transforms(
        recipe.data, _image_size(recipe, protocol), streamed=protocol.dataset.train.bytes is not None
    )[1]
    reading = Reading(recipe.data.exif, recipe.data.max_pixels)
    return Classifier(network, names, transform, method, means, reading).eval()


def _predictor(
    path: Path, recipe: Recipe, network: Network, protocol: ProtocolFile, step: int
) -> tuple[Tensor | None, Method | None]:
    """The class means of predictor_K.pt, or the method in the state that corrected its scores."""
    kept = read_predictor(path, CPU)
    if kept.means is not None:
        shape = [sum(map(len, protocol.steps[: step + 1])), network.head.weight.shape[-1]]
        if recipe.evaluation.predictor != "nme" or [*kept.means.shape] != shape or kept.means.isnan().any():
            raise Damaged(path, f"damaged (not the class means {shape} of this run)", AGAIN)
        return kept.means, None
    method = recipe.build_method(network.width, len(protocol.class_order), CPU)
    try:
        if kept.counts is not None:
            method.begin_step(StepContext(step, kept.num_old, kept.num_seen, kept.counts.numpy()))
        method.load_state_dict(kept.method or {})
    except Exception as error:  # what a method makes of another one's state
        raise Damaged(path, f"damaged (not the state of method={recipe.method.method}: {error})", AGAIN) from error
    return None, method


def _image_size(recipe: Recipe, protocol: ProtocolFile) -> tuple[int, int]:
    """Height and width of what the network is shown; runs of older versions do not say it."""
    if protocol.dataset.size is not None:
        return protocol.dataset.size
    known = table().get(recipe.data.dataset)
    if known is not None and recipe.data.dataset != "imagenet":
        return known.shape[0], known.shape[1]
    return recipe.data.size, recipe.data.size
