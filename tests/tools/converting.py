"""Images of every kind with the pixels that must come out of them, folders of them, and conversions of these."""

import hashlib
import io
import struct
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from conftest import encoded
from making import png, write_tar
from PIL import Image

from fastil.data import DataConfig, load_dataset
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

COMMIT = 1 << 14  # bytes; small, so that short conversions have many commits
DEFAULTS = {
    "kind": None, "val": None, "classes": None, "per_class": None, "mode": "auto", "max_side": None,
    "squash": None, "quality": 95, "check": True, "on_corrupt": "fail", "workers": 1,
}  # fmt: skip


def run(source, out, *, dry_run=False, reporter=None, commit_bytes=COMMIT, **options):
    """`fastil convert` in this process."""
    chosen = options_of(**(DEFAULTS | options))
    return convert(Path(source), Path(out), chosen, reporter or Reporter(), dry_run, commit_bytes)


def photo(height, width, seed=0):
    """Something with the smooth shades and an edge of a photograph."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 32
    waves = [np.sin(x * a + y * b + c) for a, b, c in random.uniform(-2, 2, (3, 3))]
    pixels = 128 + 60 * np.stack(waves, axis=-1) + random.normal(0, 2, (height, width, 1))
    pixels[height // 3 : height // 2, width // 4 : width // 2] += random.integers(-60, 60)
    return pixels.clip(0, 255).astype(np.uint8)


def decoded(content):
    """What Pillow reads, neither turned nor converted."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def as_stored(pixels, quality=95):
    """The JPEG that pixels become."""
    return encoded(pixels, quality=quality, subsampling="4:2:0")


def psnr(a, b):
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


def turned(pixels, tag):
    """Upright, of pixels that a camera noted this EXIF orientation for."""
    return {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels, 1),
    }[tag]  # fmt: skip


def tagged(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def png_chunks(header, data=b""):
    """A PNG of a header (IHDR without its last three bytes) and compressed data."""
    parts = [b"IHDR" + header + bytes(3), b"IDAT" + zlib.compress(data), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


def deep_png(pixels):
    """16 bits per channel, which Pillow does not write."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return png_chunks(struct.pack(">IIBB", width, height, 16, 2), lines)


def grey_of(values):
    return np.repeat(values[..., None], 3, axis=2)


def rgb_of_cmyk(cmyk):
    """(255 - c) (255 - k) / 255, rounded as Pillow does."""
    light = 255 - cmyk[..., 3:].astype(np.int64)
    product = cmyk[..., :3] * light + 128
    return (light - (((product >> 8) + product) >> 8)).clip(0, 255).astype(np.uint8)


class Kind(NamedTuple):
    """content: of the file; pixels: upright RGB; reason: why its bytes cannot be kept, None if they are."""

    content: bytes
    pixels: np.ndarray
    reason: str | None


def kept(content):
    return Kind(content, decoded(content), None)


def zoo():
    """By file name, an image of every kind that has to come out right."""
    shades = photo(45, 66)
    palette = Image.fromarray(shades).quantize(16)
    colours = np.array(palette.getpalette()[: 16 * 3], np.uint8).reshape(-1, 3)[np.asarray(palette)]
    other = Image.fromarray(255 - shades).quantize(16)
    grey, bits = shades[..., 0], shades[..., 1] > 128
    deep = shades.astype(np.uint16) << 8 | np.random.default_rng(1).integers(0, 256, shades.shape, np.uint16)
    alpha = np.dstack([shades, grey])
    kinds = {
        "plain.jpg": kept(encoded(shades, quality=90)),
        "progressive.jpg": kept(encoded(shades, quality=80, progressive=True)),
        "full chroma.jpg": kept(encoded(shades, subsampling="4:4:4")),
        "noted upright.jpg": kept(encoded(shades, exif=tagged(1))),
        "noted nonsense.jpg": kept(encoded(shades, exif=tagged(9))),
        "pixel.jpg": kept(encoded(photo(1, 1))),
        "wide.JPG": kept(encoded(photo(2, 3000))),
        "high.jpeg": kept(encoded(photo(3000, 2))),
        "a PNG.JPEG": Kind(encoded(shades, "PNG"), shades, "PNG"),
        "webp.webp": Kind(encoded(shades, "WEBP", lossless=True), shades, "WEBP"),
        "bmp.bmp": Kind(encoded(shades, "BMP"), shades, "BMP"),
        "ppm.ppm": Kind(encoded(shades, "PPM"), shades, "PPM"),
        "tiff.tif": Kind(encoded(shades, "TIFF"), shades, "TIFF"),
        "grey.png": Kind(encoded(grey, "PNG"), grey_of(grey), "PNG, grayscale"),
        "grey and alpha.png": Kind(
            encoded(np.dstack([grey, bits * np.uint8(255)]), "PNG"), grey_of(grey), "PNG, grayscale"
        ),
        "alpha.png": Kind(encoded(alpha, "PNG"), shades, "PNG, with alpha"),
        "bits.png": Kind(encoded(bits, "PNG"), grey_of(bits * np.uint8(255)), "PNG, black and white"),
        "deep.png": Kind(encoded(deep[..., 0], "PNG"), grey_of((deep[..., 0] >> 8).astype(np.uint8)), "PNG, I;16"),
        "deep colour.png": Kind(deep_png(deep), (deep >> 8).astype(np.uint8), "PNG"),
        "palette.png": Kind(encoded(palette, "PNG"), colours, "PNG, palette"),
        "clear palette.png": Kind(encoded(palette, "PNG", transparency=3), colours, "PNG, palette"),
        "moving.gif": Kind(encoded(palette, "GIF", save_all=True, append_images=[other]), colours, "GIF, palette"),
        "turned.png": Kind(encoded(shades, "PNG", exif=tagged(6)), turned(shades, 6), "PNG, turned by its EXIF tag"),
        "turned.tif": Kind(encoded(shades, "TIFF", exif=tagged(8)), turned(shades, 8), "TIFF"),
    }
    grey_jpeg = encoded(grey, quality=90)
    kinds["grey.jpg"] = Kind(grey_jpeg, grey_of(decoded(grey_jpeg)), "grayscale")
    cmyk = encoded(Image.fromarray(shades).convert("CMYK"), quality=90)
    kinds["cmyk.jpg"] = Kind(cmyk, rgb_of_cmyk(decoded(cmyk)), "CMYK")
    two = encoded(shades, "MPO", save_all=True, append_images=[Image.fromarray(255 - shades)])
    kinds["stereo.jpg"] = Kind(two, decoded(two), "MPO")
    for tag in range(2, 9):
        content = encoded(shades, exif=tagged(tag))
        kinds[f"turned {tag}.jpg"] = Kind(content, turned(decoded(content), tag), "turned by its EXIF tag")
    return kinds


def write(root, files):
    """files: relative name to bytes."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tree(**classes):
    """train/ and val/ of these classes: by name, (ending, how many) of the training images; two images each for val."""
    files = {}
    for number, (name, (suffix, count)) in enumerate(classes.items()):
        files |= {f"train/{name}/{i}{suffix}": png(10 * number + i) for i in range(count)}
        files |= {f"val/{name}/{i}.png": png(10 * number + i) for i in range(2)}
    return files


def in_both(tmp_path, files):
    """A folder of these files, and a tar of it."""
    return write(tmp_path / "folder", files), write_tar(tmp_path / "packed.tar", list(files.items()))


def load(path, **keys):
    """`dataset=folder`."""
    return load_dataset(DataConfig(dataset="folder", data=str(path), **({"size": 8} | keys)))


def photos(count, classes=2, size=(20, 30), split="train"):
    """Relative name to bytes of JPEGs, every third of them grayscale, spread over the classes."""
    files = {}
    for i in range(count):
        pixels = photo(*size, seed=i)
        files[f"{split}/class{i % classes}/{i:04d}.jpg"] = encoded(pixels[..., 0] if i % 3 == 2 else pixels)
    return files


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def outputs(folder, name="x"):
    """What a conversion leaves, by file name: bytes of the manifests, checksums of the rest."""
    files = sorted(path for path in Path(folder).iterdir() if path.name.startswith(f"{name}."))
    return {path.name: path.read_text() if path.suffix == ".json" else sha256(path) for path in files}


def left_of(process, seconds=10):
    """The processes of its session that still run; those that are just ending have so long for it."""
    until = time.monotonic() + seconds
    while session_of(process) and time.monotonic() < until:
        time.sleep(0.02)
    return session_of(process)


def session_of(process):
    """The processes of its session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == process.pid and state != "Z":
                found.append(int(entry.name))
    return found
