"""From what a source holds to upright RGB pixels. Pillow decodes, here and in the reference loader."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # JPEG opens MPO as well
MOST_PIXELS = 100_000_000  # a decompression bomb beyond
ORIENTATION = 0x0112  # EXIF tag
T = Image.Transpose
TURNS = {
    2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270, 7: T.TRANSVERSE,
    8: T.ROTATE_90,
}  # fmt: skip


def open_image(content: bytes) -> Image.Image:
    """The image with its header read. Raises ValueError for more than MOST_PIXELS, and whatever Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, lower bound, and remarks about metadata
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, a decompression bomb")
    return image


def orientation(image: Image.Image) -> int:
    """1 to 8, as cameras write it; 1: upright, or no such tag, or an unreadable one, as viewers take it."""
    if image.format == "TIFF":  # Pillow turns it while it loads it
        return 1
    if "exif" not in image.info and image.format not in ("PNG", "WEBP"):  # nothing to parse
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block raises many kinds
        return 1
    return value if value in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits: grayscale, palette and CMYK are converted, 16-bit samples lose their low byte, alpha is dropped."""
    if image.mode.startswith("I"):  # 16-bit grayscale opens as I or I;16, which convert("RGB") would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point samples have no agreed range; convert it to 8 bits")
    if "transparency" in image.info:  # a palette with transparent entries, which Pillow wants spelled out
        image = image.convert("RGBA")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its orientation tag says. (Pillow's own function also rewrites the EXIF block, and fails on damage.)"""
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def check_decodes(image: Image.Image) -> None:
    """Decode every coefficient of a JPEG: at an eighth of the size and without colour, which leaves out only inverse
    transforms that cannot fail. Raises what Pillow raises."""
    if image.format == "JPEG":
        image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()


def as_array(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]."""
    return np.asarray(image)
