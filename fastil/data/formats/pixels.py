"""From what a source holds to upright RGB pixels. Pillow says what an image is; simplejpeg decodes plain JPEGs."""

import contextlib
import io
import struct
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # JPEG opens MPO as well
MOST_PIXELS = 100_000_000  # a decompression bomb beyond
ORIENTATION = 0x0112  # EXIF tag
FRAMES, APP2, START_OF_SCAN = (0xC0, 0xC1, 0xC2), 0xE2, 0xDA  # markers; frames: baseline, extended, progressive
# Segments that say nothing about how an image is shown, in lengths that every reader takes: JFIF, Adobe's, comment,
# Huffman and quantisation tables, restart interval.
PLAIN = {
    0xE0: (16,), 0xEE: (14,), 0xFE: range(2, 1 << 16), 0xC4: range(2, 1 << 16), 0xDB: range(2, 1 << 16), 0xDD: (4,),
}  # fmt: skip
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
    if not {"exif", "xmp"} & image.info.keys() and image.format not in ("PNG", "WEBP"):  # nothing to parse
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


def plain_jpeg(head: bytes) -> tuple[int, int] | None:
    """Width and height of an upright JPEG with three components of 8 bits, by all that stands before its first scan.
    None where something is there, or missing, that Pillow should look at: EXIF, a second picture, damage."""
    size, at = None, 2
    if not head.startswith(b"\xff\xd8"):
        return None
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], head[at + 2] << 8 | head[at + 3]
        if marker == START_OF_SCAN:
            return size
        if marker in FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", head.ljust(at + 10, b"\0"), at + 4)
            if size is not None or (length, precision, components) != (17, 8, 3):
                return None
            if not 1 <= width * height <= MOST_PIXELS:
                return None
            size = (width, height)
        elif marker == APP2:  # a colour profile, which changes no pixel, or the list of further pictures
            if not (length >= 16 and head.startswith(b"ICC_PROFILE\0", at + 4)):
                return None
        elif length not in PLAIN.get(marker, ()):
            return None
        at += 2 + length
    return None


def decode(content: bytes) -> NDArray[np.uint8] | None:
    """uint8 [h, w, 3], the pixels of a JPEG that plain_jpeg knows, as Pillow decodes them but in less time. None:
    there is damage in it, and Pillow has to say whether it can be lived with."""
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content)
    except ValueError:
        return None
    return pixels


def check_decodes(content: bytes) -> None:
    """Decode every coefficient of an image. Of a JPEG at an eighth of the size and without colour, which leaves out
    only inverse transforms that cannot fail. Raises what Pillow raises; it has the last word on what is damage."""
    if content.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):
            simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1)
            return
    image = open_image(content)
    if image.format == "JPEG":
        image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()


def as_array(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]."""
    return np.asarray(image)
