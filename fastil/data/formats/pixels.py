"""From the content of a source to upright RGB pixels: the one way in for every reader of images.

Pillow decides what an image is; simplejpeg decodes plain JPEGs. `fastil run`, `plan`, `predict` and `convert` recognise
the same formats by content, turn images by the same rule and refuse the same ones.
"""

import contextlib
import io
import struct
import warnings
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from fastil.data.formats.records import Extent, Item, Source, Unreadable
from fastil.errors import UserError

# The formats that are read, with their files' endings. JPEG opens MPO as well. EPS is left out: it starts a program.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",),
    "GIF": (".gif",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm", ".pnm"), "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"), "HEIF": (".heic", ".heif"),
}  # fmt: skip
FEATURES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # Pillow may be built without these
HELP = dict.fromkeys(FEATURES, "pip install -U pillow") | {"HEIF": "pip install pillow-heif"}
MOST_PIXELS = 100_000_000  # more is a decompression bomb
MOST_BYTES = 1 << 29  # of an image file; an uncompressed one with that many pixels has fewer
THIN = 32  # times as long as wide: the ends of a longer image are cut off before it is scaled
ORIENTATION = 0x0112  # EXIF tag
FRAMES, APP2, START_OF_SCAN = (0xC0, 0xC1, 0xC2), 0xE2, 0xDA  # markers; frames: baseline, extended, progressive
# Segments that do not change how an image is shown, in lengths that every reader accepts: JFIF, Adobe's, comment,
# Huffman and quantisation tables, restart interval.
PLAIN = {
    0xE0: (16,), 0xEE: (14,), 0xFE: range(2, 1 << 16), 0xC4: range(2, 1 << 16), 0xDB: range(2, 1 << 16), 0xDD: (4,),
}  # fmt: skip
T = Image.Transpose
TURNS = {
    2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270, 7: T.TRANSVERSE,
    8: T.ROTATE_90,
}  # fmt: skip
BACK = {6: 8, 8: 6}  # the turns that are not their own opposite
Exif = Literal["upright", "ignore"]


@dataclass(frozen=True)
class Reading:
    """How images are read.

    exif: "upright" turns them as the camera's tag says; "ignore" takes the pixels as stored, as other toolboxes do.
    max_pixels: an image with more is refused.
    """

    exif: Exif = "upright"
    max_pixels: int = MOST_PIXELS

    def __post_init__(self) -> None:
        if self.exif not in get_args(Exif):
            raise UserError(f"exif={self.exif}: use one of {', '.join(get_args(Exif))}")
        if self.max_pixels < 1:
            raise UserError(f"max_pixels={self.max_pixels}: must be at least 1")

    @property
    def max_bytes(self) -> int:
        """The largest size of an image file: 8 bytes a pixel, as for RGBA with 16 bits each."""
        return max(MOST_BYTES, 8 * self.max_pixels)


DEFAULT = Reading()


def reading_of(source: Source, how: Reading) -> Reading:
    """Return how to read the images of this source, if `how` was asked for."""
    return replace(how, exif="ignore") if source.settled else how


@cache
def formats() -> tuple[str, ...]:
    """Return the formats of FORMATS that Pillow reads here."""
    if find_spec("pillow_heif") is not None:
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    lacking = {name for name, feature in FEATURES.items() if name in Image.OPEN and not features.check(feature)}
    return tuple(name for name in FORMATS if name in Image.OPEN and name not in lacking)


@cache
def suffixes() -> frozenset[str]:
    """Return the endings of the files of `formats`."""
    return frozenset(suffix for name in formats() for suffix in FORMATS[name])


def advice(suffix: str) -> str:
    """Return what to do about image files whose ending is not among `suffixes`."""
    missing = next((name for name, endings in FORMATS.items() if suffix in endings and name in HELP), None)
    return f"{HELP[missing]}, or convert them" if missing else "convert them to JPEG or PNG"


def content_of(item: Item, how: Reading = DEFAULT) -> bytes | NDArray[np.uint8]:
    """Return the bytes of an image file, or pixels [h, w, 3]. Raises Unreadable if they cannot be read, and ValueError
    for a file that is too large to be an image.
    """
    if isinstance(item, Unreadable):
        raise item
    if not isinstance(item, Extent):
        return item
    if item.size > how.max_bytes:
        raise ValueError(f"{item.size:,} bytes, no image has so many")
    return item.read()


def open_image(content: bytes, how: Reading = DEFAULT) -> Image.Image:
    """Return the image with its header read. Raises ValueError if it is no image, has more than max_pixels or
    floating-point samples, and whatever Pillow raises.
    """
    if not content:
        raise ValueError("no bytes in it")
    if how.max_pixels > MOST_PIXELS:
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound, which is global
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Pillow's own, lower bound, and about metadata
        image = Image.open(io.BytesIO(content), formats=formats())
    if image.width * image.height > how.max_pixels:
        raise ValueError(
            f"{image.width}x{image.height} pixels, more than the {how.max_pixels:,} that are taken for an image; "
            "max_pixels= or --max-pixels lifts that"
        )
    if image.mode.startswith("F"):
        raise ValueError("floating-point samples have no agreed range; convert it to 8 bits")
    return image


def orientation(image: Image.Image, how: Reading = DEFAULT) -> int:
    """Return how Pillow's pixels of an image still have to be turned, 1 to 8 as in EXIF; 1: not at all. An unreadable
    tag counts as none, as in viewers.
    """
    found = _tag(image)
    if image.format == "TIFF":  # Pillow turns it on loading
        return BACK.get(found, found) if how.exif == "ignore" else 1
    return found if how.exif == "upright" else 1


def _tag(image: Image.Image) -> int:
    parsed = ("PNG", "WEBP", "TIFF")  # formats in which Pillow may have to look for the tag
    if not {"exif", "xmp"} & image.info.keys() and image.format not in parsed:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block raises many kinds
        return 1
    return value if value in range(1, 9) else 1


def size_of(image: Image.Image, how: Reading = DEFAULT) -> tuple[int, int]:
    """Return width and height of an image from `open_image`, once it is turned."""
    return image.size[::-1] if orientation(image, how) > 4 else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Return RGB, 8 bits: grayscale, palette and CMYK are converted, 16 bits lose the low byte, alpha is dropped."""
    if image.mode.startswith("I"):  # 16-bit grayscale opens as I or I;16, which convert("RGB") would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in image.info:  # a palette with transparent entries, which Pillow wants converted first
        image = image.convert("RGBA")
    return image.convert("RGB")


def upright(image: Image.Image, how: Reading = DEFAULT) -> Image.Image:
    """Return the image, decoded and turned as `orientation` says. (Pillow's own function also rewrites the EXIF block,
    and fails if that is damaged.)
    """
    if image.format != "TIFF":  # a TIFF would lose its tag
        image.load()  # before a PNG is asked for its tag, which would load it and hide damage
    turn = TURNS.get(orientation(image, how))
    return image if turn is None else image.transpose(turn)


def decoded(content: bytes | NDArray[np.uint8], how: Reading = DEFAULT) -> Image.Image:
    """Return RGB pixels of an image, upright unless `how` says otherwise. Raises like `open_image`."""
    if not isinstance(content, bytes):
        return Image.fromarray(content)
    quick = decode(content) if plain_jpeg(content, how) is not None else None
    return Image.fromarray(quick) if quick is not None else to_rgb(upright(open_image(content, how), how))


def square(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of the image after its short side was resized to `size` (bilinear, antialiased)."""
    part = middle(image.size)
    if part != (0, 0, *image.size):
        image = image.crop(part)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the part (left, top, right, bottom) of an image of this width and height that is at most THIN times as
    long as wide: all of an ordinary one. This bounds the memory that scaling takes.
    """
    cut = []
    for side, other in (size, size[::-1]):
        beyond = max(0, side - THIN * other) // 2
        cut.append((beyond, side - beyond))
    (left, right), (top, bottom) = cut
    return left, top, right, bottom


def open_stored(content: bytes | memoryview, pixels: int) -> Image.Image:
    """Return a JPEG of a .beton with its header read. It was accepted when it was converted, and is shown as it is.
    pixels: how many its row says it has. Raises whatever Pillow raises.
    """
    if pixels > MOST_PIXELS:
        Image.MAX_IMAGE_PIXELS = None
    return Image.open(io.BytesIO(content), formats=("JPEG",))


def reason_of(error: Exception) -> str:
    """Return what is wrong with an image, in one line without the address that Pillow gives an unnamed stream."""
    if isinstance(error, Unreadable):
        return error.reason
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split()) or type(error).__name__


def plain_jpeg(head: bytes, how: Reading = DEFAULT) -> tuple[int, int] | None:
    """Return width and height of an upright JPEG with three components of 8 bits, judged by everything before its first
    scan. None if it holds or lacks something that Pillow should look at: EXIF, a second picture, damage.
    """
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
            if not 1 <= width * height <= how.max_pixels:
                return None
            size = (width, height)
        elif marker == APP2:  # a colour profile, which changes no pixel, or a list of further pictures
            if not (length >= 16 and head.startswith(b"ICC_PROFILE\0", at + 4)):
                return None
        elif length not in PLAIN.get(marker, ()):
            return None
        at += 2 + length
    return None


def decode(content: bytes) -> NDArray[np.uint8] | None:
    """Return the pixels of a JPEG that plain_jpeg accepts, uint8 [h, w, 3], as Pillow decodes them but faster. None: it
    is damaged, and Pillow has to decide whether that is tolerable.
    """
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content)
    except ValueError:
        return None
    return pixels


def check_decodes(content: bytes, how: Reading = DEFAULT) -> None:
    """Decode every coefficient of an image. A JPEG is decoded at an eighth of its size and without colour, which leaves
    out only inverse transforms that cannot fail. Raises what Pillow raises; Pillow has the last word on what is damage.
    """
    if content.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):
            simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1)
            return
    image = open_image(content, how)
    if image.format == "JPEG":
        image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()


def as_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the image as uint8 [h, w, 3]."""
    return np.asarray(image)
