"""What happens to one image on its way into a .beton: it is inspected, checked, and encoded again only if necessary."""

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray
from PIL import Image

from fastil.data.formats import pixels
from fastil.data.formats.manifest import RESIZED
from fastil.data.formats.pixels import DEFAULT, Reading
from fastil.data.formats.records import Extent, Item, Unreadable

HEAD = 1 << 13  # bytes read of an image for its header; most headers fit
LOSSLESS = ("PNG", "BMP", "PPM", "GIF")  # formats that are lossless with any options
SMALL_SIDE = 96  # pixels, of STL-10, the largest of the small sets: 27 KB as pixels, about what it takes as a PNG
SMALL_FILE = 1 << 20  # bytes; none of an image that small has more
Mode = Literal["auto", "jpeg", "reencode", "raw"]
PIXELS = "pixels"  # instead of the format of an image file
RAW_SIDE, JPEG_SIDE = 65_535, 65_500  # pixels: the most that a row holds, and that libjpeg encodes and decodes
MADE = {"raw": "decoded to pixels", "jpeg": "encoded again", "mixed": "decoded or encoded again"}  # by mode of storage
MODE_NAMES = {"L": "grayscale", "LA": "grayscale", "P": "palette", "1": "black and white", "RGBA": "with alpha"}


@dataclass(frozen=True)
class Storage:
    """How images are stored.

    mode: "jpeg" keeps the bytes of every upright RGB JPEG and encodes the others, "reencode" encodes all of them, "raw"
    stores pixels, "auto" is "raw" for a source of only pixels or small lossless images and "jpeg" otherwise. quality:
    of encoded images, 4:2:0. max_side: longer sides are shrunk to it, antialiased; None: kept. squash: every image gets
    this width and height, whatever its shape (LUCIR's code can train on such a copy of ImageNet, 256x256). check:
    decode kept JPEGs too. reading: how images are read.
    """

    mode: Mode = "auto"
    quality: int = 95
    max_side: int | None = None
    squash: int | None = None
    check: bool = True
    reading: Reading = DEFAULT

    @property
    def made(self) -> str:
        """What happens to images whose bytes are not kept, for people."""
        return MADE["raw" if self.mode == "raw" else "jpeg"]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height as stored."""
        if self.squash is not None:
            return self.squash, self.squash
        longer = max(width, height)
        if self.max_side is None or longer <= self.max_side:
            return width, height
        return max(1, round(width * self.max_side / longer)), max(1, round(height * self.max_side / longer))


class Head(NamedTuple):
    """The header of an image. width, height: as stored; size: bytes in the source; reasons: why its bytes cannot be
    kept; problem: why it cannot be read.
    """

    format: str
    mode: str
    width: int
    height: int
    size: int
    reasons: tuple[str, ...]
    problem: str | None

    def kept(self, storage: Storage) -> bool:
        """Whether the source's bytes are stored."""
        return not self.reasons and storage.mode == ("raw" if self.format == PIXELS else "jpeg")


class Prepared(NamedTuple):
    """An image as it is stored. content: None means the bytes of the source. crc32: of what is stored; None if nobody
    has read it yet. problem: why it cannot be stored. source: crc32 of the source's bytes if others are stored.
    """

    content: bytes | None
    width: int
    height: int
    crc32: int | None
    problem: str | None
    source: int | None = None


def look(item: Item, storage: Storage) -> Head:
    """Return the Head of an image: no pixel is decoded, and of a plain JPEG no more is read."""
    try:
        if isinstance(item, Extent) and 0 < item.size <= storage.reading.max_bytes:
            plain = pixels.plain_jpeg(item.front(HEAD), storage.reading)
            if plain is not None:
                return stored("JPEG", "RGB", plain, item.size, [], storage)
        return _look(pixels.content_of(item, storage.reading), storage)
    except MemoryError:
        raise  # it is not about the image
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        size = 0 if isinstance(item, Unreadable) else len(item) if isinstance(item, bytes) else item.size
        return Head("unknown", "", 0, 0, size, (), pixels.reason_of(error))


def _look(content: bytes | NDArray[np.uint8], storage: Storage) -> Head:
    """Return the Head, or raise whatever is wrong with the image."""
    reasons: list[str] = []
    if not isinstance(content, bytes):
        height, width = content.shape[:2]
        if storage.mode != "raw":
            reasons.append(PIXELS)
        return stored(PIXELS, "RGB", (width, height), content.nbytes, reasons, storage)
    plain = pixels.plain_jpeg(content, storage.reading)
    if plain is not None:
        return stored("JPEG", "RGB", plain, len(content), [], storage)
    image = pixels.open_image(content, storage.reading)
    kind = str(image.format)
    if kind != "JPEG":
        reasons.append(kind)
    if image.mode != "RGB":
        reasons.append(MODE_NAMES.get(image.mode, image.mode))
    if pixels.orientation(image, storage.reading) != 1:
        reasons.append("turned by its EXIF tag")
    return stored(kind, image.mode, pixels.size_of(image, storage.reading), len(content), reasons, storage)


def stored(kind: str, mode: str, size: tuple[int, int], count: int, reasons: list[str], storage: Storage) -> Head:
    """Return the Head of an image with this width and height when upright."""
    width, height = storage.size(*size)
    if (width, height) != size:
        reasons.append(RESIZED[storage.squash is not None])
    problem = None
    longest = RAW_SIDE if storage.mode == "raw" else JPEG_SIDE
    if max(width, height) > longest:
        problem = f"{width}x{height} pixels, the format holds sides up to {longest:,}; use --max-side"
    return Head(kind, mode, width, height, count, tuple(reasons), problem)


def small_lossless(content: bytes, how: Reading) -> bool | None:
    """Return whether this is an image that JPEG would spoil to save little. None: it cannot be read."""
    try:
        image = pixels.open_image(content, how)
    except Exception:  # Pillow's readers raise many kinds on damaged files
        return None
    if max(image.size) > SMALL_SIDE:
        return False
    if image.format == "TIFF":
        return "jpeg" not in str(image.info.get("compression"))
    return image.format in LOSSLESS or (image.format == "WEBP" and b"VP8L" in content[12:64])


def prepare(item: Item, storage: Storage) -> Prepared:
    """Return the image as it is stored; whatever is wrong with it is its `problem`."""
    try:
        content = pixels.content_of(item, storage.reading)
        head = _look(content, storage)
        if head.problem is not None:
            return Prepared(None, 0, 0, None, head.problem)
        if head.kept(storage):
            if storage.check and isinstance(content, bytes):
                pixels.check_decodes(content, storage.reading)
            return Prepared(None, head.width, head.height, crc32(content), None)
        image = pixels.decoded(content, storage.reading)
        size = storage.size(*image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        new = encode(image, storage)
        return Prepared(new, image.width, image.height, crc32(new), None, crc32(content))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        return Prepared(None, 0, 0, None, pixels.reason_of(error))


def encode(image: Image.Image, storage: Storage) -> bytes:
    """Return RGB pixels as they are stored."""
    if storage.mode == "raw":
        return image.tobytes()
    file = io.BytesIO()
    image.save(file, "JPEG", quality=storage.quality, subsampling="4:2:0")
    return file.getvalue()
