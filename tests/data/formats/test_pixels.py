"""From encoded images to upright RGB pixels: bounds, orientation, colour, and the check that a JPEG decodes."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from conftest import SOAK, encoded
from PIL import Image, ImageCms

from fastil.data.formats.pixels import (
    MOST_PIXELS,
    ORIENTATION,
    as_array,
    check_decodes,
    decode,
    open_image,
    orientation,
    plain_jpeg,
    to_rgb,
    upright,
)

DAMAGED = 2000 if SOAK else 200  # images of each kind


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


# Opening


def png_header(width, height):
    """Enough of a PNG to be opened, not decoded."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, data)
    )


def test_an_image_up_to_the_bound_opens_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own bound lies below
        assert open_image(png_header(10_000, MOST_PIXELS // 10_000)).size == (10_000, 10_000)


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_001), (100_000_001, 1), (1, 100_000_001)])
def test_a_decompression_bomb_is_refused(width, height):
    with pytest.raises(ValueError, match=f"{width}x{height} pixels, more than the 100,000,000 .* --max-pixels lifts"):
        open_image(png_header(width, height))


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_an_enormous_bomb_is_refused_by_pillow(width, height):
    with pytest.raises(Image.DecompressionBombError):
        open_image(png_header(width, height))


@pytest.mark.parametrize("content", [b"text", b"\xff\xd8", bytes(1000), b"%PDF-1.4\n" + bytes(100)])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_the_common_formats_open(kind):
    assert open_image(encoded(noise(5, 7), kind)).size == (7, 5)


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA"])
def test_other_formats_are_not_opened(kind):
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(encoded(noise(16, 16), kind))


# Orientation

F = np.array([[1, 2], [3, 0], [4, 0]])  # an F: its stem 1, 3, 4 on the left, an arm 2 on top
# What is stored under each tag so that a viewer shows the F: EXIF says where the first row and column of the file are.
STORED = {
    1: [[1, 2], [3, 0], [4, 0]],
    2: [[2, 1], [0, 3], [0, 4]],  # top, right
    3: [[0, 4], [0, 3], [2, 1]],  # bottom, right
    4: [[4, 0], [3, 0], [1, 2]],  # bottom, left
    5: [[1, 3, 4], [2, 0, 0]],  # left, top
    6: [[2, 0, 0], [1, 3, 4]],  # right, top
    7: [[0, 0, 2], [4, 3, 1]],  # right, bottom
    8: [[4, 3, 1], [0, 0, 2]],  # left, bottom
}


def tagged(value, tag=ORIENTATION):
    exif = Image.Exif()
    exif[tag] = value
    return exif


def size_by_tag(image):
    """Width and height once it is upright, from the header alone."""
    return image.size[::-1] if orientation(image) > 4 else image.size


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", STORED)
def test_an_image_is_turned_as_its_tag_says(tag, kind):
    stored = (np.array(STORED[tag])[..., None] * [60, 30, 10]).astype(np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = open_image(encoded(stored, kind, exif=tagged(tag), **options))
    assert orientation(image) == (1 if kind == "TIFF" else tag)  # Pillow turns a TIFF while it loads it
    assert size_by_tag(image) == (2, 3)
    np.testing.assert_array_equal(as_array(to_rgb(upright(image))), F[..., None] * [60, 30, 10])


@pytest.mark.parametrize("tag", STORED)
def test_a_jpeg_is_turned_as_its_tag_says(tag):
    blocks = (np.array(STORED[tag])[..., None] * [60, 60, 60]).astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    image = open_image(encoded(blocks, quality=95, exif=tagged(tag)))
    assert orientation(image) == tag
    found = as_array(to_rgb(upright(image)))[8::16, 8::16]
    assert np.abs(found.astype(int) - 60 * F[..., None]).max() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_an_image_without_a_tag_is_upright(kind):
    image = open_image(encoded(noise(5, 7), kind))
    assert orientation(image) == 1
    assert upright(image) is image


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_a_tag_that_means_nothing_leaves_the_image_as_it_is(value):
    image = open_image(encoded(noise(5, 7), exif=tagged(value)))
    assert orientation(image) == 1
    assert upright(image).size == (7, 5)


def exif_entry(kind, count, value):
    """An EXIF block with an orientation of another type."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI4sI", 1, ORIENTATION, kind, count, value, 0)


@pytest.mark.parametrize(
    "block",
    [
        exif_entry(2, 2, b"6\0"),
        exif_entry(3, 2, struct.pack("<HH", 6, 6)),
        exif_entry(4, 1, struct.pack("<I", 6)),
        exif_entry(7, 1, b"\6"),
        exif_entry(11, 1, struct.pack("<f", 6.0)),
        exif_entry(11, 1, struct.pack("<f", 6.5)),
        exif_entry(3, 0, b""),
        exif_entry(99, 1, b"\6"),
    ],
    ids=["text", "two", "long", "bytes", "float", "fraction", "none", "unknown"],
)
@pytest.mark.filterwarnings("ignore:Metadata Warning")
def test_a_tag_of_another_type_turns_the_image_or_not_but_does_not_stop_it(block):
    image = open_image(encoded(noise(5, 7), exif=block))
    assert orientation(image) in (1, 6)
    assert upright(image).size == size_by_tag(image)


@pytest.mark.parametrize(
    "block", [b"", b"MM", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(30), b"\0" * 100, b"Exif" * 20]
)
def test_a_broken_exif_block_leaves_the_image_as_it_is(block):
    image = open_image(encoded(noise(5, 7), exif=b"Exif\0\0" + block))
    assert orientation(image) == 1
    assert upright(image).size == (7, 5)


def test_random_damage_to_an_exif_block_never_makes_an_image_unreadable():
    exif = tagged(6)
    for tag, value in ((0x010F, "Maker"), (0x0110, "Model of it"), (0x011A, 72.0), (0x0132, "2020:01:01 00:00:00")):
        exif[tag] = value
    exif.get_ifd(0x8769)[0x9286] = b"a comment"
    exif.get_ifd(0x8825)[1] = "N"
    block = exif.tobytes()
    whole, random = encoded(noise(4, 6), exif=block), np.random.default_rng(0)
    start, failed = whole.index(block) + 6, []
    for number in range(DAMAGED):
        content = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            content[start + random.integers(len(block) - 6)] = random.choice([0, 128, 255, random.integers(256)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(bytes(content))
            try:
                assert upright(image).size == size_by_tag(image)
            except Exception as error:
                failed.append((number, repr(error)))
    assert not failed


# Colour


def test_rgb_stays_as_it_is():
    pixels = noise(5, 7)
    np.testing.assert_array_equal(as_array(to_rgb(open_image(encoded(pixels, "PNG")))), pixels)
    assert as_array(to_rgb(Image.fromarray(pixels))).dtype == np.uint8


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "TIFF")])
def test_grayscale_is_repeated_and_alpha_dropped(mode, kind):
    pixels = noise(5, 7, len(mode))
    pixels[:2, :, -1] = 0
    image = open_image(encoded(Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode), kind))
    assert image.mode == mode
    expected = pixels[..., :3] if mode == "RGBA" else pixels[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(as_array(to_rgb(image)), expected)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(5))])
def test_a_palette_shows_its_colours(transparency):
    colours, index = noise(5, 1).reshape(5, 3), noise(6, 8)[..., 0] % 5
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = to_rgb(open_image(encoded(image, "PNG", **options)))
    np.testing.assert_array_equal(as_array(found), colours[index])


def test_grayscale_and_rgb_with_a_transparent_colour():
    grey, rgb = noise(5, 7)[..., 0], noise(5, 7)
    found = to_rgb(open_image(encoded(grey, "PNG", transparency=3)))
    np.testing.assert_array_equal(as_array(found), grey[..., None].repeat(3, axis=2))
    found = to_rgb(open_image(encoded(rgb, "PNG", transparency=(1, 2, 3))))
    np.testing.assert_array_equal(as_array(found), rgb)


def test_black_and_white():
    bits = noise(5, 7)[..., 0] > 100
    found = to_rgb(open_image(encoded(Image.fromarray(bits), "PNG")))
    np.testing.assert_array_equal(as_array(found), 255 * bits[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_becomes_rgb(kind):
    ink = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 255, 255, 0): (255, 0, 0),
           (0, 0, 0, 255): (0, 0, 0), (255, 255, 0, 0): (0, 0, 255), (0, 0, 0, 155): (100, 100, 100)}  # fmt: skip
    for cmyk, rgb in ink.items():
        image = open_image(encoded(Image.new("CMYK", (16, 16), cmyk), kind))
        assert image.mode == "CMYK"
        assert np.abs(as_array(to_rgb(image)).astype(int) - rgb).max() <= (2 if kind == "JPEG" else 0), (cmyk, rgb)


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")])
def test_sixteen_bits_lose_the_low_byte(kind, order):
    values = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    image = open_image(encoded(Image.fromarray(values.astype(order)), kind))
    assert image.mode.startswith("I")
    np.testing.assert_array_equal(as_array(to_rgb(image)), (values // 256)[..., None].repeat(3, axis=2))


def test_thirty_two_bits_are_cut_to_sixteen():
    values = np.array([[-5, 0, 255, 256, 65535, 65536, 2**31 - 1]], dtype=np.int32)
    image = open_image(encoded(Image.fromarray(values), "TIFF"))
    assert image.mode == "I"
    assert as_array(to_rgb(image))[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_floating_point_samples_are_refused():
    """By the header, so that a dry run tells them."""
    for kind in ("TIFF", "PPM"):
        with pytest.raises(ValueError, match="floating-point"):
            open_image(encoded(Image.fromarray(np.ones((3, 3), dtype=np.float32)), kind))


# The check that a JPEG decodes


def jpegs():
    random = np.random.default_rng(0)
    y, x = np.mgrid[:123, :181] / 32
    waves = [128 + 100 * np.sin(x * a + y * b + c) for a, b, c in random.uniform(-3, 3, (3, 3))]
    rgb = Image.fromarray((np.stack(waves, -1) + random.normal(0, 8, (123, 181, 3))).clip(0, 255).astype(np.uint8))
    grey, cmyk = rgb.convert("L"), rgb.convert("CMYK")
    return {
        "baseline": encoded(rgb, quality=85),
        "progressive": encoded(rgb, quality=85, progressive=True),
        "grayscale": encoded(grey, quality=85),
        "grayscale progressive": encoded(grey, progressive=True),
        "CMYK": encoded(cmyk, quality=85),
        "CMYK progressive": encoded(cmyk, progressive=True),
        "4:4:4": encoded(rgb, subsampling="4:4:4"),
        "4:2:2": encoded(rgb, subsampling="4:2:2"),
        "restart markers": encoded(rgb, restart_marker_blocks=4),
        "restart markers, a row": encoded(rgb, restart_marker_rows=1),
        "own tables": encoded(rgb, optimize=True),
        "stored as RGB": encoded(rgb, keep_rgb=True),
        "5x3 pixels": encoded(rgb.resize((5, 3))),
    }


JPEGS = jpegs()


def damaged(content, way, random):
    """way: 0, 1 cut; 2 bits turned; 3 bytes replaced; 4 a marker where none belongs; 5 zeros; 6 bytes left out."""
    content = bytearray(content)
    if way == 0:
        del content[random.integers(20, len(content)) :]
    elif way == 1:
        del content[-random.integers(1, 60) :]
    elif way in (2, 3):
        for _ in range(random.integers(1, 8)):
            at = random.integers(2, len(content))
            content[at] = content[at] ^ 1 << random.integers(8) if way == 2 else random.integers(256)
    elif way == 4:
        at = random.integers(len(content) // 2, len(content) - 2)
        content[at : at + 2] = bytes([0xFF, random.integers(0xC0, 0x100)])
    else:
        at, size = random.integers(len(content) // 3, len(content) - 2), random.integers(1, 400)
        content[at : at + size] = bytes(len(content[at : at + size]) if way == 5 else 0)
    return bytes(content)


def fails(work, *arguments):
    try:
        work(*arguments)
    except Exception:  # Pillow raises many kinds
        return True
    return False


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.filterwarnings("ignore")
def test_the_check_of_a_jpeg_says_what_a_full_decode_says(kind):
    whole, random = JPEGS[kind], np.random.default_rng(len(kind))
    assert not fails(lambda: check_decodes(whole))
    verdicts = []
    for number in range(DAMAGED):
        content = damaged(whole, number % 7, random)
        if fails(open_image, content):
            continue
        expected = fails(Image.open(io.BytesIO(content), formats=("JPEG",)).load)
        assert fails(lambda content=content: check_decodes(content)) == expected, number
        verdicts.append(expected)
    assert 0.2 < np.mean(verdicts) < 0.9


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_the_check_of_other_formats_decodes_them(kind):
    whole = encoded(noise(40, 60), kind)
    check_decodes(whole)
    assert fails(lambda: check_decodes(whole[: len(whole) // 2]))


# Plain JPEGs, which are known by their markers


def seen_by_pillow(content):
    """Width and height of an upright JPEG of three components; None of anything else."""
    try:
        image = open_image(content)
    except Exception:  # Pillow raises many kinds
        return None
    plain = (image.format, image.mode, orientation(image), image.bits) == ("JPEG", "RGB", 1, 8)
    return image.size if plain else None


def headers():
    """JPEGs with all that may stand before the first scan, by name."""
    rgb = Image.fromarray(noise(37, 52))
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return JPEGS | {
        "profile": encoded(rgb, icc_profile=profile),
        "long profile": encoded(rgb, icc_profile=profile * 40),  # in two segments
        "comment": encoded(rgb, comment=b"\xff\xd8 no image"),
        "turned": encoded(rgb, exif=exif),
        "two pictures": encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
    }


PLAIN_ONES = {
    "baseline", "progressive", "4:4:4", "4:2:2", "restart markers", "restart markers, a row", "own tables",
    "stored as RGB", "5x3 pixels", "profile", "long profile", "comment",
}  # fmt: skip
HEADERS = headers()


@pytest.mark.parametrize("kind", HEADERS)
def test_a_plain_jpeg_is_known_by_its_markers_and_nothing_else_is_taken_for_one(kind):
    content = HEADERS[kind]
    assert plain_jpeg(content) == (seen_by_pillow(content) if kind in PLAIN_ONES else None)
    assert (seen_by_pillow(content) is not None) == (kind in PLAIN_ONES)


@pytest.mark.parametrize("kind", ["baseline", "progressive", "profile", "comment", "two pictures", "stored as RGB"])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_header_is_taken_for_a_plain_one_only_where_pillow_does(kind):
    content = HEADERS[kind]
    scan = content.index(b"\xff\xda")
    for at in range(scan):
        for value in {content[at] ^ 1, content[at] ^ 0x80, 0, 255, 0xE1, 0xC3} - {content[at]}:
            changed = content[:at] + bytes([value]) + content[at + 1 :]
            found = plain_jpeg(changed)
            # A table that Pillow refuses is left to the decoder, which refuses it as well.
            assert found in (None, seen_by_pillow(changed)) or fails(check_decodes, changed), (at, value)


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_is_cut_off_is_nothing(kind):
    content = HEADERS[kind]
    scan = content.index(b"\xff\xda")
    assert all(plain_jpeg(content[:end]) is None for end in range(scan))


@pytest.mark.parametrize("kind", sorted(PLAIN_ONES))
def test_what_decodes_quickly_are_the_pixels_that_pillow_sees(kind):
    np.testing.assert_array_equal(decode(HEADERS[kind]), np.asarray(Image.open(io.BytesIO(HEADERS[kind]))))


def test_a_jpeg_that_is_cut_short_is_left_to_pillow():
    whole = HEADERS["baseline"]
    assert decode(whole[: len(whole) // 2]) is None


@pytest.mark.parametrize(("size", "plain"), [((10_000, 10_000), True), ((10_001, 10_000), False), ((0, 9), False)])
def test_a_jpeg_that_claims_too_many_pixels_or_none_is_no_plain_one(size, plain):
    content = bytearray(HEADERS["baseline"])
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", *size[::-1])
    assert plain_jpeg(bytes(content)) == (size if plain else None)
