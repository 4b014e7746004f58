"""The reference loader: Pillow, one image after the other. It is what the other loaders mean, and slow."""

from collections.abc import Generator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastil.data.streaming import Box, Streaming, central
from fastil.plan import EpochPlan, Transform

BILINEAR = Image.Resampling.BILINEAR  # antialiased, as Pillow's filters are


class Reference(Streaming):
    """See `Streaming`."""

    name = "reference"

    def frames(self, plan: EpochPlan, first: int) -> Generator[Tensor, None, None]:
        for part in list(plan.batches())[first:]:
            images = [
                np.asarray(render(self.decoded(i), box, self.transform_of(i, box)))
                for i, box in zip(plan.ids[part].tolist(), plan.boxes[part].tolist(), strict=True)
            ]
            yield torch.from_numpy(np.stack(images))

    def decoded(self, i: int) -> Image.Image:
        content = self.content(i)
        return Image.fromarray(content) if isinstance(content, np.ndarray) else self.by_pillow(i, content)


def render(image: Image.Image, box: Box, transform: Transform) -> Image.Image:
    """A box of an image at the size of the output; outside the image is black."""
    top, left, height, width = box
    image = image.crop((left, top, left + width, top + height))
    if transform.resize is not None:
        size, box = central((height, width), transform)
        image = image.resize(size[::-1], BILINEAR)
        image = image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
    elif (height, width) != (transform.height, transform.width):
        image = image.resize((transform.width, transform.height), BILINEAR)
    return image
