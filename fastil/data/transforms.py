"""The transforms by which the images of a recipe become what the network sees."""

from dataclasses import replace

from fastil.data.sources import DataConfig
from fastil.errors import UserError
from fastil.plan import Transform

RESIZE = 256 / 224  # short side before the central crop, over the side of the crop


def transforms(config: DataConfig, size: tuple[int, int], *, streamed: bool) -> tuple[Transform, Transform]:
    """Return the transforms of training images and of all others. size: height and width of what the network sees.

    Streamed images are trained on in random resized crops, and otherwise seen by their centre, as ImageNet's are
    (resize to 256, crop 224, and in proportion for another size).
    """
    plain = Transform(*size, config.pad, config.flip, tuple(config.mean), tuple(config.std))
    if not streamed:
        return plain, plain
    if config.pad:
        raise UserError(f"pad={config.pad}: images that are streamed are trained on in random resized crops; set pad=0")
    return replace(plain, pad=0, resized=True), replace(plain, pad=0, resize=round(size[0] * RESIZE))
