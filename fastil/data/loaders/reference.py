"""The reference loader: Pillow, one image after the other. It defines what the other loaders compute, and is slow."""

from collections.abc import Generator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastil.data.loaders.frames import Box, frame_of
from fastil.data.loaders.streaming import Streaming
from fastil.plan import EpochPlan

BILINEAR = Image.Resampling.BILINEAR  # antialiased, as Pillow's filters are


class Reference(Streaming):
    """See `Streaming`."""

    name = "reference"

    def frames(self, plan: EpochPlan, parts: list[slice]) -> Generator[Tensor, None, None]:
        for part in parts:
            images = [
                np.asarray(frame_of(self.image(i), box, self.transform_of(i, box), resize))
                for i, box in zip(plan.ids[part].tolist(), plan.boxes[part].tolist(), strict=True)
            ]
            yield torch.from_numpy(np.stack(images))

    def image(self, i: int) -> Image.Image:
        """Return image i as Pillow has it."""
        content = self.content(i)
        return Image.fromarray(content) if isinstance(content, np.ndarray) else self.by_pillow(i, content)


def resize(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """The resize of `frame_of` by Pillow."""
    top, left, height, width = box
    image = image.crop((left, top, left + width, top + height))
    return image if (height, width) == size else image.resize(size[::-1], BILINEAR)
