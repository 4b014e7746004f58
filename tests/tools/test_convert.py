"""`fastil convert`: bytes kept or pixels right, everything noted, and one clear line where it cannot go on."""

import errno
import fcntl
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import SOAK, assert_user_error, environment
from converting import (
    as_stored,
    decoded,
    encoded,
    left_of,
    outputs,
    photo,
    photos,
    png_chunks,
    psnr,
    run,
    sha256,
    write,
    zoo,
)
from PIL import Image

from fastil.data.formats.beton import Beton
from fastil.data.formats.manifest import manifest_path, read_manifest
from fastil.errors import UserError
from fastil.tools import files as tool_files
from fastil.tools import reporting
from fastil.tools.audit import item_of
from fastil.tools.convert import COMMIT_BYTES
from fastil.tools.files import ReadBack
from fastil.tools.journal import Journal
from fastil.tools.reporting import Reporter

INTERRUPTED = 20 if SOAK else 2
SMALL_PAGE = 2 << 20  # bytes, of a small file
ZOO = zoo()
PSNR = 30  # dB, of a JPEG of quality 95 with 4:2:0 chroma against the pixels it was made of
# LUCIR's ImageNet-100, as places in the sorted wnids, in its order of learning.
LUCIR = """637,509,782,85,238,852,911,622,722,748,394,906,44,928,508,105,262,812,419,390,523,658,761,11,856,192,174,478,
275,494,127,836,446,842,75,539,850,160,142,437,912,400,699,542,783,493,215,108,288,507,337,979,133,665,988,990,989,14,
600,632,413,224,323,859,240,312,886,219,999,7,894,274,186,966,123,126,470,260,284,466,590,650,324,548,77,597,730,62,289,
54,490,471,704,959,391,634,279,473,512,303"""


def zoo_folder(root):
    return write(root, {f"train/{'ab'[n % 2]}/{name}": kind.content for n, (name, kind) in enumerate(ZOO.items())})


@pytest.fixture(scope="module")
def zoo_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    run(zoo_folder(folder / "in"), folder / "x.beton")
    return folder / "x.beton"


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "in", photos(7))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """None of these tests cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def stored(path):
    """By name without its folders: the row and the bytes."""
    with Beton(path) as file:
        return {Path(file.name(i)).name: (i, file.encoded(i)) for i in range(len(file))}


def manifest_of(path):
    return read_manifest(manifest_path(path))


def refused(source, out, *words, **options):
    with pytest.raises(UserError) as error:
        run(source, out, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


def left(folder):
    """Names of what a conversion has left, and sizes."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


# Bytes and pixels


@pytest.mark.parametrize("name", [name for name, kind in ZOO.items() if kind.reason is None])
def test_the_bytes_of_an_upright_rgb_jpeg_are_kept(zoo_file, name):
    i, content = stored(zoo_file)[name]
    assert content == ZOO[name].content
    assert i not in [changed.id for changed in manifest_of(zoo_file).reencoded]


@pytest.mark.parametrize("name", [name for name, kind in ZOO.items() if kind.reason is not None])
def test_another_image_becomes_an_upright_rgb_jpeg_and_is_listed_with_its_reason(zoo_file, name):
    i, content = stored(zoo_file)[name]
    expected = ZOO[name].pixels
    assert content == as_stored(expected)
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode, dict(image.getexif())) == ("JPEG", "RGB", {})
        found = np.asarray(image)
    assert found.shape == expected.shape
    assert psnr(found, expected) > PSNR
    listed = {changed.id: changed for changed in manifest_of(zoo_file).reencoded}
    assert listed[i].reason == ZOO[name].reason
    assert Path(listed[i].source).name == name


def test_raw_files_hold_the_pixels(tmp_path):
    run(zoo_folder(tmp_path / "in"), tmp_path / "x.beton", mode="raw")
    with Beton(tmp_path / "x.beton") as file:
        assert file.mode == "raw"
        for i in range(len(file)):
            np.testing.assert_array_equal(file.image(i), ZOO[Path(file.name(i)).name].pixels, err_msg=file.name(i))
    reasons = {Path(changed.source).name: changed.reason for changed in manifest_of(tmp_path / "x.beton").reencoded}
    assert reasons == {name: kind.reason or "--mode raw" for name, kind in ZOO.items()}


def test_reencode_encodes_the_kept_ones_too(tmp_path):
    run(zoo_folder(tmp_path / "in"), tmp_path / "x.beton", mode="reencode", quality=70)
    for name, (_, content) in stored(tmp_path / "x.beton").items():
        assert content == as_stored(ZOO[name].pixels, quality=70), name


def test_the_quality_is_that_of_what_is_encoded(tmp_path):
    grey = photo(16, 16)[..., 0]
    files = {f"train/{c}/1.png": encoded(grey, "PNG") for c in "ab"} | {"train/b/2.jpg": encoded(photo(9, 9))}
    run(write(tmp_path / "in", files), tmp_path / "x.beton", quality=42)
    found = stored(tmp_path / "x.beton")
    tables = [
        Image.open(io.BytesIO(content)).quantization for content in (found["1.png"][1], encoded(grey, quality=42))
    ]
    assert tables[0][0] == tables[1][0]
    assert found["2.jpg"][1] == files["train/b/2.jpg"]
    assert manifest_of(tmp_path / "x.beton").parameters["storage"]["quality"] == 42


@pytest.mark.parametrize("side", [1, 7, 40, 66])
def test_longer_sides_are_made_so_long_antialiased(tmp_path, side):
    source = zoo_folder(tmp_path / "in")
    run(source, tmp_path / "x.beton", mode="raw", max_side=side)
    run(source, tmp_path / "y.beton", max_side=side)
    jpegs = stored(tmp_path / "y.beton")
    reasons = {changed.id: changed.reason for changed in manifest_of(tmp_path / "y.beton").reencoded}
    with Beton(tmp_path / "x.beton") as file:
        for i in range(len(file)):
            kind = ZOO[Path(file.name(i)).name]
            row, content = jpegs[Path(file.name(i)).name]
            height, width = kind.pixels.shape[:2]
            if max(height, width) <= side:
                np.testing.assert_array_equal(file.image(i), kind.pixels)
                assert content == (as_stored(kind.pixels) if kind.reason else kind.content)
                assert reasons.get(row) == kind.reason
                continue
            scale = side / max(height, width)
            size = max(1, round(width * scale)), max(1, round(height * scale))
            assert max(size) == side
            smaller = np.asarray(Image.fromarray(kind.pixels).resize(size, Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(file.image(i), smaller)
            assert content == as_stored(smaller)
            assert "larger than --max-side" in reasons[row]


@pytest.mark.parametrize("side", [1, 30, 64])
def test_squashed_images_are_as_wide_as_high_whatever_their_shape(tmp_path, side):
    source = zoo_folder(tmp_path / "in")
    run(source, tmp_path / "x.beton", mode="raw", squash=side)
    run(source, tmp_path / "y.beton", squash=side)
    jpegs = stored(tmp_path / "y.beton")
    reasons = {changed.id: changed.reason for changed in manifest_of(tmp_path / "y.beton").reencoded}
    with Beton(tmp_path / "x.beton") as file:
        assert (file.sizes == side).all()
        for i in range(len(file)):
            kind = ZOO[Path(file.name(i)).name]
            row, content = jpegs[Path(file.name(i)).name]
            squashed = np.asarray(Image.fromarray(kind.pixels).resize((side, side), Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(file.image(i), squashed)
            if kind.pixels.shape[:2] == (side, side) and kind.reason is None:
                assert content == kind.content
            else:
                assert content == as_stored(squashed)
                assert kind.pixels.shape[:2] == (side, side) or "of another size than --squash" in reasons[row]


def test_a_squashed_copy_is_what_lucirs_script_makes(tmp_path):
    """gen_resized_imagenet.py: convert to RGB, resize to (256, 256) by Pillow's bilinear filter; stored here without
    its loss by mode=raw."""
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    content = encoded(image, quality=90)
    run(
        write(tmp_path / "in", {f"train/{c}/1.jpg": content for c in "ab"}),
        tmp_path / "x.beton",
        mode="raw",
        squash=256,
    )
    by_script = Image.open(io.BytesIO(content)).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
    with Beton(tmp_path / "x.beton") as file:
        np.testing.assert_array_equal(file.image(0), np.asarray(by_script))


def test_a_checkerboard_made_smaller_is_grey(tmp_path):
    """Antialiasing, seen: every second pixel white gives grey, not white or black."""
    board = np.where(np.indices((64, 64)).sum(0) % 2, 255, 0).astype(np.uint8)
    files = {f"train/{c}/1.png": encoded(board, "PNG") for c in "ab"}
    run(write(tmp_path / "in", files), tmp_path / "x.beton", mode="raw", max_side=8)
    with Beton(tmp_path / "x.beton") as file:
        assert file.image(0).shape == (8, 8, 3)
        assert np.abs(file.image(0).astype(int) - 127).max() <= 2


def idx_folder(folder, train, val):
    folder.mkdir()
    for prefix, (images, labels) in (("train", train), ("t10k", val)):
        head = bytes([0, 0, 8, 3]) + b"".join(struct.pack(">I", size) for size in images.shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = bytes([0, 0, 8, 1]) + struct.pack(">I", len(labels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return folder


@pytest.mark.parametrize("options", [{}, {"max_side": 4}, {"mode": "jpeg"}])
def test_pixels_stay_pixels_unless_asked_otherwise(tmp_path, options):
    images = np.random.default_rng(0).integers(0, 256, (6, 6, 8), np.uint8)
    labels = np.array([2, 0, 1, 1, 0, 2], np.uint8)
    source = idx_folder(tmp_path / "in", (images, labels), (images[:3], labels[:3]))
    assert run(source, tmp_path / "x.beton", **options) == [tmp_path / "x.beton", tmp_path / "x.val.beton"]
    with Beton(tmp_path / "x.beton") as file:
        order = np.argsort(labels, kind="stable")
        assert file.labels.tolist() == sorted(labels)
        assert [file.name(i) for i in range(6)] == [f"{i:06d}" for i in order]
        for i, row in enumerate(order):
            pixels = np.repeat(images[row][..., None], 3, axis=2)
            if "max_side" in options:
                pixels = np.asarray(Image.fromarray(pixels).resize((4, 3), Image.Resampling.BILINEAR))
            if "mode" in options:
                assert file.encoded(i) == as_stored(pixels)
            else:
                np.testing.assert_array_equal(file.image(i), pixels)
    reasons = {"pixels"} if "mode" in options else {"larger than --max-side"} if options else set()
    assert {changed.reason for changed in manifest_of(tmp_path / "x.beton").reencoded} == reasons


# Order, names, checksums


def rows(path):
    """(mode, width, height, place, label, id) of every sample and (id, place, size) of the last table, read by hand."""
    raw = path.read_bytes()
    version, fields, page, count, table = struct.unpack_from("<HHIQQ", raw)
    assert (version, fields, page) == (2, 3, SMALL_PAGE)
    found = [struct.unpack_from("<BHHQ3xqq", raw, 24 + 3 * 1041 + 32 * i) for i in range(count)]
    return found, [struct.unpack_from("<QQQ", raw, table + 24 * i) for i in range(count)], raw


def test_samples_are_sorted_by_class_and_everything_in_the_manifest_is_so(tmp_path):
    files = {}
    for split, count in (("train", 11), ("val", 5)):
        for i in range(count):
            name = f"{split}/{['zebra', 'ant', 'Yak'][i % 3]}/{97 * i % 31:02d}.jpg"
            files[name] = encoded(photo(10 + i, 20 - i, seed=i), quality=60 + i)
    source = write(tmp_path / "in", files | {"train/ant/.hidden.jpg": b"not an image", "notes.txt": b"x"})
    run(source, tmp_path / "x.beton")
    names = ["Yak", "ant", "zebra"]
    for split, path in (("train", tmp_path / "x.beton"), ("val", tmp_path / "x.val.beton")):
        mine = sorted((name for name in files if name.startswith(split)), key=lambda n: (n.split("/")[1], n))
        labels = [names.index(name.split("/")[1]) for name in mine]
        found, places, raw = rows(path)
        assert [row[5] for row in found] == [place[0] for place in places] == list(range(len(mine)))
        assert [row[4] for row in found] == labels == sorted(labels)
        assert [row[3] for row in found] == [place[1] for place in places]
        contents = [raw[place : place + size] for _, place, size in places]
        assert contents == [files[name] for name in mine]
        assert [(0, *Image.open(io.BytesIO(content)).size) for content in contents] == [row[:3] for row in found]
        manifest = manifest_of(path)
        assert manifest.names == mine
        assert manifest.class_names == names
        assert manifest.counts == [labels.count(label) for label in range(3)]
        assert manifest.crc32 == [zlib.crc32(files[name]) for name in mine]
        assert (manifest.sha256, manifest.bytes, manifest.images) == (sha256(path), len(raw), len(mine))
        assert (manifest.split, manifest.source["path"]) == (split, str(source))
        assert manifest.reencoded == manifest.skipped == manifest.notes == []


def test_a_tar_and_its_folder_give_the_same_file(tmp_path):
    files = photos(12) | photos(4, split="val")
    write(tmp_path / "in", files)
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name in sorted(files, key=lambda name: zlib.crc32(name.encode())):
            tar.add(tmp_path / "in" / name, name)
    run(tmp_path / "in", tmp_path / "x.beton")
    run(tmp_path / "in.tar", tmp_path / "y.beton")
    for end in (".beton", ".val.beton"):
        assert sha256(tmp_path / f"x{end}") == sha256(tmp_path / f"y{end}")
        assert manifest_of(tmp_path / f"x{end}").names == manifest_of(tmp_path / f"y{end}").names


def test_a_beton_converts_to_the_same_beton(small, tmp_path):
    run(small, tmp_path / "x.beton", val="same")
    run(tmp_path / "x.beton", tmp_path / "y.beton")
    for end in (".beton", ".val.beton"):
        assert sha256(tmp_path / f"x{end}") == sha256(tmp_path / f"y{end}")
        ours, theirs = (manifest_of(tmp_path / f"{name}{end}") for name in "yx")
        assert (ours.names, ours.class_names, ours.crc32) == (theirs.names, theirs.class_names, theirs.crc32)
        assert ours.reencoded == []


def test_names_of_any_bytes_survive(tmp_path):
    write(tmp_path / "in", {f"train/{c}/1.jpg": encoded(photo(8, 8)) for c in ("a b", "ç,é")})
    os.rename(tmp_path / "in/train/a b/1.jpg", os.fsencode(tmp_path / "in/train/a b") + b"/\xff\n.jpg")
    run(tmp_path / "in", tmp_path / "x.beton")
    manifest = manifest_of(tmp_path / "x.beton")
    assert manifest.class_names == ["a b", "ç,é"]
    assert os.fsencode(manifest.names[0]) == b"train/a b/\xff\n.jpg"
    refused(tmp_path / "in", tmp_path / "x.beton", "another conversion", quality=1)
    run(tmp_path / "in", tmp_path / "x.beton")


def test_a_sample_larger_than_a_page_makes_pages_larger(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), np.uint8)
    files = {"train/a/1.png": encoded(noise, "PNG", compress_level=0), "train/b/1.jpg": encoded(photo(9, 9))}
    run(write(tmp_path / "in", files), tmp_path / "x.beton", mode="raw")
    with Beton(tmp_path / "x.beton") as file:
        assert file.page_size == 16 << 20
        np.testing.assert_array_equal(file.image(0), noise)


def test_the_worst_jpeg_stays_below_the_bound_that_pages_are_chosen_by(tmp_path):
    random = np.random.default_rng(0)
    grey = np.repeat(random.integers(0, 2, (200, 200, 1), np.uint8) * np.uint8(255), 3, axis=2)
    blocks = random.integers(0, 2, (100, 100, 3), np.uint8).repeat(2, axis=0).repeat(2, axis=1) * np.uint8(255)
    for noise in (grey, blocks, random.integers(0, 2, (200, 200, 3), np.uint8) * np.uint8(255)):
        assert len(as_stored(noise, quality=100)) < noise.nbytes


# Which classes, how many images


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 classes of two images each in a tar."""
    path = tmp_path_factory.mktemp("thousand") / "in.tar"
    contents = [encoded(photo(2, 2, seed)) for seed in range(2)]
    with tarfile.open(path, "w") as tar:
        for label in range(1000):
            for number, content in enumerate(contents):
                info = tarfile.TarInfo(f"train/n{label:08d}/{number}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", ["lucir", "first100", "7", "names", "a file", "a file with titles", "many names"])
def test_classes_are_chosen_and_numbered_in_the_order_of_the_source(thousand, tmp_path, form):
    chosen = {
        "lucir": sorted(map(int, LUCIR.split(","))), "first100": range(100), "7": range(7),
        "many names": range(0, 900, 9),
    }.get(form, [3, 500, 999])  # fmt: skip
    names = [f"n{label:08d}" for label in chosen]
    classes = form
    if form in ("names", "many names"):
        classes = ", ".join(reversed(names))
    elif form.startswith("a file"):
        title = " tench, Tinca tinca" if "titles" in form else ""
        (tmp_path / "list.txt").write_text("\n".join(f"{name}{title}" for name in reversed(names)) + "\n\n")
        classes = str(tmp_path / "list.txt")
    run(thousand, tmp_path / "x.beton", classes=classes, per_class=1)
    manifest = manifest_of(tmp_path / "x.beton")
    assert manifest.class_names == names
    assert manifest.names == [f"train/{name}/0.jpg" for name in names]
    assert manifest.counts == [1] * len(names)
    with Beton(tmp_path / "x.beton") as file:
        assert file.labels.tolist() == list(range(len(names)))


def test_a_file_names_classes_with_spaces(tmp_path):
    write(tmp_path / "in", {f"train/{c}/1.jpg": encoded(photo(8, 8)) for c in ("big cat", "big dog", "bird")})
    (tmp_path / "list").write_text("bird\nbig cat\n")
    run(tmp_path / "in", tmp_path / "x.beton", classes=str(tmp_path / "list"))
    assert manifest_of(tmp_path / "x.beton").class_names == ["big cat", "bird"]


def test_per_class_takes_the_first_training_images_of_each(tmp_path):
    source = write(tmp_path / "in", photos(9, classes=2) | photos(6, split="val"))
    run(source, tmp_path / "x.beton", per_class=3)
    assert manifest_of(tmp_path / "x.beton").names == [
        f"train/class{c}/{i:04d}.jpg" for c in (0, 1) for i in (c, c + 2, c + 4)
    ]
    assert manifest_of(tmp_path / "x.val.beton").counts == [3, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": "lucir"}, ["1,000 classes", "has 2"]),
        ({"classes": "0"}, ["there are 2"]),
        ({"classes": "3"}, ["there are 2"]),
        ({"classes": "class0,nothing"}, ["nothing", "class0"]),
        ({"classes": "class0,class0"}, ["twice"]),
        ({"classes": ""}, ["no class"]),
        ({"classes": "/dev/null"}, ["no class /dev/null"]),
        ({"per_class": 0}, ["--per-class 0"]),
        ({"max_side": 0}, ["--max-side 0"]),
        ({"squash": 0}, ["--squash 0"]),
        ({"squash": 70_000}, ["--squash 70000", "at most 65,500"]),
        ({"max_side": 9, "squash": 9}, ["--max-side and --squash", "drop one"]),
        ({"quality": 0}, ["--quality 0"]),
        ({"quality": 101}, ["--quality 101"]),
        ({"workers": 0}, ["--workers 0"]),
        ({"mode": "png"}, ["--mode png", "reencode"]),
        ({"on_corrupt": "report"}, ["--on-corrupt report", "skip"]),
        ({"kind": "zip"}, ["zip", "folder"]),
    ],
)
def test_options_that_make_no_sense_are_refused(small, tmp_path, options, words):
    refused(small, tmp_path / "x.beton", *words, **options)
    assert left(tmp_path) == {}


def test_a_list_of_classes_that_is_no_text_is_refused(small, tmp_path):
    (tmp_path / "list").write_bytes(b"\xff\xfe\x00")
    refused(small, tmp_path / "x.beton", tmp_path / "list", "not a text file", classes=str(tmp_path / "list"))
    (tmp_path / "list").write_bytes(b"\n\n")
    refused(small, tmp_path / "x.beton", "no class", classes=str(tmp_path / "list"))


# Validation images


def test_val_may_lie_elsewhere_or_be_train(tmp_path):
    source = write(tmp_path / "in", photos(5))
    elsewhere = write(tmp_path / "other", photos(4, split="."))
    run(source, tmp_path / "x.beton", val=str(elsewhere))
    assert manifest_of(tmp_path / "x.val.beton").names == [f"class{c}/{i:04d}.jpg" for c in (0, 1) for i in (c, c + 2)]
    assert manifest_of(tmp_path / "x.val.beton").split == "val"
    run(source, tmp_path / "y.beton", val="same")
    assert sha256(tmp_path / "y.beton") == sha256(tmp_path / "y.val.beton")
    assert "smoke test" in manifest_of(tmp_path / "y.val.beton").notes[0]
    assert run(source, tmp_path / "z.beton") == [tmp_path / "z.beton"]
    assert "no validation images" in manifest_of(tmp_path / "z.beton").notes[0]
    shutil.rmtree(elsewhere / "class1")
    refused(source, tmp_path / "w.beton", "class0", val=str(elsewhere))


# Images that cannot be read


def truncated(content):
    return content[: len(content) * 2 // 3]


DAMAGED = {
    "empty.jpg": b"",
    "text.jpg": b"this is not an image",
    "cut.jpg": truncated(encoded(photo(60, 60))),
    "cut.png": truncated(encoded(photo(60, 60), "PNG")),
    "bomb.png": png_chunks(struct.pack(">IIBB", 60000, 60000, 8, 2)),
    "float.tif": encoded(np.ones((8, 8), np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_image_that_cannot_be_read_is_named_and_left_out_if_asked(tmp_path, name):
    source = write(tmp_path / "in", photos(7) | {f"train/class0/{name}": DAMAGED[name]})
    began = time.monotonic()
    refused(source, tmp_path / "x.beton", source / "train/class0" / name, "repair or remove", "--on-corrupt skip")
    run(source, tmp_path / "y.beton", on_corrupt="skip")
    assert time.monotonic() - began < 5
    manifest = manifest_of(tmp_path / "y.beton")
    assert [(one.id, one.source) for one in manifest.skipped] == [(-1, f"train/class0/{name}")]
    assert manifest.skipped[0].reason
    assert "0x" not in manifest.skipped[0].reason
    run(write(tmp_path / "good", photos(7)), tmp_path / "z.beton")
    assert sha256(tmp_path / "y.beton") == sha256(tmp_path / "z.beton")


def test_several_bad_headers_are_named_at_once_before_anything_is_written(tmp_path):
    source = write(tmp_path / "in", photos(7) | {f"train/class0/bad{i}.jpg": b"x" for i in range(8)})
    message = refused(source, tmp_path / "x.beton", *(f"bad{i}.jpg" for i in range(5)), "3 more")
    assert "bad5" not in message
    assert left(tmp_path) == {}


@pytest.mark.parametrize("remedy", ["skip", "repair", "remove"])
def test_after_an_image_that_failed_what_is_written_is_gone_on_with(tmp_path, capsys, remedy):
    """The damage is behind its header, so it is found in the middle of the work."""
    bad = f"train/class1/{5:04d}.jpg"
    good = photos(40) | {bad: encoded(photo(60, 60))}
    source = write(tmp_path / "in", good | {bad: truncated(good[bad])})
    refused(source, tmp_path / "x.beton", source / bad, "What is written stays", commit_bytes=1)
    assert set(left(tmp_path)) == {"x.beton.partial", "x.beton.journal"}
    if remedy == "repair":
        (source / bad).write_bytes(good[bad])
    elif remedy == "remove":
        (source / bad).unlink()
    options = {"on_corrupt": "skip"} if remedy == "skip" else {}
    capsys.readouterr()
    run(source, tmp_path / "x.beton", **options)
    assert "going on after 22 images" in capsys.readouterr().out  # 20 of class 0, and 2 before the damaged one
    run(source, tmp_path / "y.beton", **options)
    assert sha256(tmp_path / "x.beton") == sha256(tmp_path / "y.beton")
    ours, theirs = (json.loads((tmp_path / f"{name}.manifest.json").read_text()) for name in "xy")
    assert ours == theirs
    assert len(ours["skipped"]) == (remedy == "skip")


def test_an_image_that_changed_in_what_is_written_is_written_again(tmp_path):
    bad = f"train/class1/{39:04d}.jpg"
    source = write(tmp_path / "in", photos(40) | {bad: truncated(encoded(photo(60, 60)))})
    refused(source, tmp_path / "x.beton", bad, commit_bytes=1)
    write(source, {bad: encoded(photo(60, 60)), "train/class0/0006.jpg": encoded(photo(31, 31))})
    run(source, tmp_path / "x.beton")
    run(source, tmp_path / "y.beton")
    assert sha256(tmp_path / "x.beton") == sha256(tmp_path / "y.beton")


def test_what_was_left_out_is_not_gone_on_with_where_that_is_an_error(tmp_path):
    source = write(tmp_path / "in", photos(9) | {"train/class0/0001x.jpg": truncated(encoded(photo(60, 60)))})
    source = write(source, {"train/class1/x.jpg": truncated(encoded(photo(60, 60)))})

    class Stop(Reporter):
        def begin(self, stage, *others):
            if stage == "read back":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "x.beton", on_corrupt="skip", reporter=Stop())
    refused(source, tmp_path / "x.beton", "class0/0001x.jpg", "was left out", "--on-corrupt skip")
    run(source, tmp_path / "x.beton", on_corrupt="skip")
    assert len(manifest_of(tmp_path / "x.beton").skipped) == 2


@pytest.mark.parametrize("content", [b"x", truncated(encoded(photo(60, 60)))])
def test_a_class_without_a_readable_image_is_an_error(tmp_path, content):
    source = write(tmp_path / "in", photos(4) | {"train/other/1.jpg": content, "train/other/2.jpg": content})
    refused(source, tmp_path / "x.beton", "class other", "left out", "--classes", on_corrupt="skip")
    assert not (tmp_path / "x.beton").exists()
    (tmp_path / "x.beton.partial").unlink(missing_ok=True)
    run(source, tmp_path / "x.beton", on_corrupt="skip", classes="class0,class1")


def test_a_class_without_images_is_an_error(tmp_path):
    source = write(tmp_path / "in", photos(4))
    (source / "train/class2").mkdir()
    refused(source, tmp_path / "x.beton", "class2")


def test_without_the_check_kept_bytes_are_not_decoded(tmp_path):
    bad = truncated(encoded(photo(60, 60)))
    source = write(tmp_path / "in", photos(4) | {"train/class0/bad.jpg": bad})
    run(source, tmp_path / "x.beton", check=False)
    assert stored(tmp_path / "x.beton")["bad.jpg"][1] == bad


def test_a_side_that_the_format_cannot_hold_is_refused(tmp_path):
    source = write(tmp_path / "in", photos(2) | {"train/class0/long.png": encoded(photo(1, 70_000), "PNG")})
    refused(source, tmp_path / "x.beton", "long.png", "70000x1", "--max-side")
    refused(source, tmp_path / "x.beton", "long.png", "65501x1", "up to 65,500", max_side=65_501)
    for number, options in enumerate([{"max_side": 65_500}, {"max_side": 65_535, "mode": "raw"}]):
        run(source, tmp_path / f"{number}.beton", **options)
        with Beton(tmp_path / f"{number}.beton") as file:
            assert file.image(int(file.sizes.max(axis=1).argmax())).shape == (1, options["max_side"], 3)


# What is said


def test_a_dry_run_writes_nothing_and_says_what_there_is(tmp_path, capsys):
    source = write(
        tmp_path / "in", photos(7) | {"train/class1/bad.jpg": b"x", "train/class1/a.png": ZOO["alpha.png"][0]}
    )
    assert run(source, tmp_path / "x.beton", dry_run=True) == []
    assert left(tmp_path) == {}
    text = capsys.readouterr().out
    for words in (
        "folder: in, 2 classes", "train: 9 images, 4 to 5 per class", "JPEG 7", "PNG 1", "unknown 1", "RGB 5", "L 2",
        "RGBA 1", "30 to 66 wide (median 30)", "20 to 45 high (median 20)", "5 kept as they are, 3 encoded again",
        "grayscale: 2", "PNG, with alpha: 1", "bad.jpg (not an image of a known format)", "output    about",
        "no validation images", "free disk space",
    ):  # fmt: skip
        assert words in text, (words, text)


def test_the_audit_for_programs_tells_the_size_of_what_is_written(tmp_path, capsys):
    source = write(tmp_path / "in", photos(60, size=(50, 60)))
    run(source, tmp_path / "x.beton", dry_run=True, reporter=Reporter(as_json=True))
    (audit,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (audit["event"], audit["kind"], audit["source"]) == ("audit", "folder", "in")
    (split,) = audit["splits"]
    assert split["counts"] == [30, 30]
    assert (split["images"], split["kept"], split["problems"]) == (60, 40, [])
    assert split["reasons"] == {"grayscale": 20}
    run(source, tmp_path / "x.beton")
    assert split["projected_bytes"] == (tmp_path / "x.beton").stat().st_size  # whole pages, so the estimate is exact


@pytest.mark.parametrize("dry_run", [True, False])
def test_parquet_is_audited_in_the_order_it_is_read_and_leaves_no_copy(tmp_path, capsys, dry_run):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = list(photos(9).values())
    contents[4] = truncated(encoded(photo(60, 60)))
    images = [{"bytes": content, "path": f"{i}.jpg"} for i, content in enumerate(contents)]
    labels = [2, 0, 1] * 3
    (tmp_path / "in").mkdir()
    parquet.write_table(pa.table({"image": images, "label": labels}), tmp_path / "in/train-0.parquet", row_group_size=2)
    if dry_run:
        run(tmp_path / "in", tmp_path / "x.beton", dry_run=True)
        assert left(tmp_path) == {}
        assert "JPEG 9" in capsys.readouterr().out
        return
    refused(tmp_path / "in", tmp_path / "x.beton", "train-0.parquet: row 4 (4.jpg)")
    assert set(left(tmp_path)) == {"x.beton.partial", "x.beton.journal"}
    run(tmp_path / "in", tmp_path / "x.beton", on_corrupt="skip")
    assert set(left(tmp_path)) == {"x.beton", "x.manifest.json"}
    with Beton(tmp_path / "x.beton") as file:
        assert [file.name(i) for i in range(8)] == [f"{i}.jpg" for i in (1, 7, 2, 5, 8, 0, 3, 6)]


def test_every_line_of_json_is_an_object(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reporting, "LINE_EVERY", 0.0)
    run(small, tmp_path / "x.beton", val="same", reporter=Reporter(as_json=True))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {event["event"] for event in events} == {"audit", "progress", "written"}
    progress = [event for event in events if event["event"] == "progress" and event["stage"] == "convert train"]
    assert [event["done"] for event in progress] == list(range(1, 8))
    assert all(event["total"] == 7 for event in progress)
    written = [event for event in events if event["event"] == "written"]
    assert [event["sha256"] for event in written] == [sha256(tmp_path / f"x{end}.beton") for end in ("", ".val")]
    run(small, tmp_path / "x.beton", val="same", reporter=Reporter(as_json=True))
    assert "finished" in capsys.readouterr().out


def test_the_command_writes_json_to_stdout_and_mistakes_to_stderr(fastil, small, tmp_path):
    process = fastil("convert", small, "x.beton", "--json", "--val", "same", "--workers", 1)
    assert (process.returncode, process.stderr) == (0, "")
    events = [json.loads(line)["event"] for line in process.stdout.splitlines()]
    assert events == ["audit", "written", "written"]
    process = fastil("convert", small, "x.beton", "--json", "--quality", 50, "--workers", 1)
    assert_user_error(process, "x.beton", "another conversion")
    assert process.stdout == ""


# Workers


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    source = zoo_folder(tmp_path / "in")
    found = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        run(source, folder / "x.beton", workers=workers, on_corrupt="skip")
        found.append(outputs(folder))
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"x.beton", "x.manifest.json"}


def test_neither_torch_nor_the_network_is_needed(small, tmp_path):
    """In the command and in its workers."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, sys\n"
        "class Refuse:\n"
        "    def find_spec(name, *others):\n"
        "        assert name.split('.')[0] not in ('torch', 'requests', 'urllib3', 'http'), name\n"
        "sys.meta_path.insert(0, Refuse)\n"
        "def refuse(*arguments):\n"
        "    raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        f"open({str(tmp_path / 'seen')!r}, 'a').write('x')\n"
    )
    command = [sys.executable, "-m", "fastil.cli", "convert", str(small), str(tmp_path / "x.beton"), "--workers", "2"]
    inherited = environment()
    inherited["PYTHONPATH"] = os.pathsep.join((str(tmp_path), inherited["PYTHONPATH"]))
    process = subprocess.run(command, env=inherited, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert len((tmp_path / "seen").read_text()) >= 3  # it was there in all processes
    for command in ("verify", "info"):
        command = [sys.executable, "-m", "fastil.cli", command, str(tmp_path / "x.beton")]
        assert subprocess.run(command, env=inherited, capture_output=True).returncode == 0


# Outputs that are in the way


@pytest.mark.parametrize(
    ("name", "words"), [("x", "must end in .beton"), (".beton", "must end"), ("no/x.beton", "no such folder")]
)
def test_an_output_of_another_name_is_refused(small, tmp_path, name, words):
    refused(small, tmp_path / name, words, tmp_path / "no" if "/" in name else name)
    assert left(tmp_path) == {}


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs /proc")
def test_a_folder_that_cannot_be_written_to_is_refused(small, tmp_path):
    refused(small, "/proc/x.beton", "/proc/x.beton.partial", "cannot be written")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(small, tmp_path / "locked/x.beton", "cannot be written (Permission denied)")


def test_a_file_from_before_there_was_squash_is_known_again(small, tmp_path, capsys):
    run(small, tmp_path / "x.beton")
    before = (tmp_path / "x.beton").stat().st_mtime_ns
    path = manifest_path(tmp_path / "x.beton")
    manifest = json.loads(path.read_text())
    manifest["parameters"]["storage"].pop("squash", None)
    path.write_text(json.dumps(manifest))
    run(small, tmp_path / "x.beton")
    assert "converted already" in capsys.readouterr().out
    assert (tmp_path / "x.beton").stat().st_mtime_ns == before
    refused(small, tmp_path / "x.beton", "another conversion (other --squash)", squash=9)
    refused(small, tmp_path / "x.beton", "another conversion (other --quality)", quality=9)


def test_a_file_of_another_conversion_is_never_overwritten(small, tmp_path):
    run(small, tmp_path / "x.beton")
    before = {path: path.stat() for path in tmp_path.iterdir()}
    other = write(tmp_path / "elsewhere/in", photos(7))
    for source, options in (
        (small, {"quality": 94}), (small, {"mode": "raw"}), (small, {"max_side": 9}), (small, {"squash": 9}),
        (small, {"per_class": 1}), (other, {}),
    ):  # fmt: skip
        refused(source, tmp_path / "x.beton", tmp_path / "x.beton", "another conversion", **options)
    run(small, tmp_path / "x.beton")  # nothing to do
    assert all(path.stat().st_mtime_ns == status.st_mtime_ns for path, status in before.items())
    (small / "train/class0/0000.jpg").rename(small / "train/class0/0001.jpg")
    refused(small, tmp_path / "x.beton", "another conversion")
    (tmp_path / "y.beton").write_text("precious")
    refused(small, tmp_path / "y.beton", "y.beton", "exists, without a manifest")
    assert (tmp_path / "y.beton").read_text() == "precious"
    manifest_path(tmp_path / "x.beton").unlink()
    refused(small, tmp_path / "x.beton", "exists, without a manifest")


def test_a_second_conversion_is_refused_while_the_first_is_at_work(small, tmp_path):
    messages = []

    class Second(Reporter):
        def begin(self, stage, *others):
            super().begin(stage, *others)
            if stage not in messages:
                messages.append(stage)
                refused(small, tmp_path / "x.beton", "x.beton.partial", "another conversion is writing it")

    run(small, tmp_path / "x.beton", reporter=Second())
    assert messages == ["audit train", "convert train", "read back"]
    assert set(left(tmp_path)) == {"x.beton", "x.manifest.json"}


@pytest.mark.parametrize("options", [{}, {"quality": 50}])
def test_a_conversion_that_another_has_overtaken_does_not_touch_its_file(small, tmp_path, monkeypatch, options):
    """It finishes between the first look for the file and the lock."""
    real = tool_files.opened

    def late(path):
        monkeypatch.undo()
        run(small, tmp_path / "x.beton")
        return real(path)

    monkeypatch.setattr("fastil.tools.convert.opened", late)
    if options:
        refused(small, tmp_path / "x.beton", "another conversion", **options)
    else:
        run(small, tmp_path / "x.beton")
    assert set(left(tmp_path)) == {"x.beton", "x.manifest.json"}
    run(small, tmp_path / "y.beton")
    assert sha256(tmp_path / "x.beton") == sha256(tmp_path / "y.beton")


def test_a_lock_on_a_file_that_was_finished_meanwhile_is_no_lock(small, tmp_path, monkeypatch):
    run(small, tmp_path / "y.beton")
    real = fcntl.flock

    def finished_before(file, operation):
        os.replace(tmp_path / "x.beton.partial", tmp_path / "x.beton")
        shutil.copyfile(tmp_path / "y.beton", tmp_path / "x.beton")
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", finished_before)
    refused(small, tmp_path / "x.beton", "has just finished it")
    assert sha256(tmp_path / "x.beton") == sha256(tmp_path / "y.beton")


# Disks


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(small, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1_000_000))
    refused(small, tmp_path / "x.beton", tmp_path, "4.2 MB are needed", "1.0 MB are free")
    assert left(tmp_path) == {}


def test_a_file_size_limit_is_one_line_and_a_later_run_writes_the_same_bytes(fastil, tmp_path):
    files = {f"train/{c}/{i}.jpg": encoded(photo(200, 200, i)) for c in "ab" for i in range(40)}
    source = write(tmp_path / "in", files)
    run(source, tmp_path / "y.beton")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_PAGE + 200_000,) * 2)

    process = fastil("convert", source, "x.beton", "--workers", 1, preexec_fn=limit)
    assert_user_error(process, "x.beton.partial", "File too large", "goes on from what is in place")
    assert fastil("convert", source, "x.beton", "--workers", 1).returncode == 0
    assert sha256(tmp_path / "x.beton") == sha256(tmp_path / "y.beton")
    assert set(left(tmp_path)) == {f"{name}.{end}" for name in "xy" for end in ("beton", "manifest.json")}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_any_write_that_fails_is_one_line_and_a_later_run_writes_the_same_bytes(small, tmp_path, monkeypatch, number):
    """Each sync in turn: of the samples, the journal, the tables, the whole file, the manifest and the folder."""
    run(small, tmp_path / "y.beton", commit_bytes=2000)
    failing, real = 0, os.fsync
    while True:
        failing += 1
        calls = []

        def sync(descriptor, failing=failing, calls=calls):
            calls.append(descriptor)
            if len(calls) == failing:
                raise OSError(number, os.strerror(number))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", sync)
        folder = tmp_path / str(failing)
        folder.mkdir()
        try:
            run(small, folder / "x.beton", commit_bytes=2000)
        except UserError as error:
            message = str(error)
        else:
            assert len(calls) < failing
            break
        assert "\n" not in message
        assert str(folder / "x.") in message
        assert os.strerror(number) in message
        assert "goes on from what is in place" in message
        monkeypatch.setattr(os, "fsync", real)
        run(small, folder / "x.beton", commit_bytes=2000)
        assert sha256(folder / "x.beton") == sha256(tmp_path / "y.beton")
        assert set(left(folder)) == {"x.beton", "x.manifest.json"}
    assert failing > 10


def test_other_bytes_from_the_disk_are_seen_before_the_file_gets_its_name(small, tmp_path):
    class Damage(Reporter):
        def begin(self, stage, *others):
            super().begin(stage, *others)
            if stage == "read back":
                with open(tmp_path / "x.beton.partial", "r+b") as file:
                    file.seek(SMALL_PAGE + 700)
                    file.write(b"\1\2\3")

    refused(small, tmp_path / "x.beton", "sample 0 is not what was read of its source", reporter=Damage())
    assert not (tmp_path / "x.beton").exists()
    (tmp_path / "x.beton.partial").unlink()
    run(small, tmp_path / "x.beton")
    run(small, tmp_path / "y.beton")
    assert sha256(tmp_path / "x.beton") == sha256(tmp_path / "y.beton")


@pytest.mark.parametrize("options", [{}, {"mode": "reencode"}, {"check": False}])
@pytest.mark.parametrize("skipped", [0, 2])
def test_the_checksum_is_that_of_the_file_whatever_was_known_before_it(tmp_path, options, skipped):
    """Where no image is encoded again and none is left out, all places are known before, and the file is read back
    while it is written."""
    files = {name: encoded(photo(30 + i, 40, seed=i)) for i, name in enumerate(photos(9))}
    for name in list(files)[3 : 3 + skipped]:
        files[name] = files[name][: len(files[name]) // 2] if options.get("check", True) else b"no image"
    run(write(tmp_path / "in", files), tmp_path / "x.beton", on_corrupt="skip", commit_bytes=1500, **options)
    manifest = manifest_of(tmp_path / "x.beton")
    assert manifest.sha256 == sha256(tmp_path / "x.beton")
    assert (manifest.images, len(manifest.skipped)) == (9 - skipped, skipped)


@pytest.mark.parametrize("grey", [False, True])
def test_a_source_that_changes_after_an_image_was_checked_is_an_error(tmp_path, monkeypatch, grey):
    source = write(tmp_path / "in", {name: encoded(photo(30, 40, i)) for i, name in enumerate(photos(9))})
    if grey:
        (source / "train/class0/0000.jpg").write_bytes(encoded(photo(30, 40)[..., 0]))

    def changing(records, i):
        if i == 4:
            path = Path(records.where(i))
            path.write_bytes(path.read_bytes()[:-9] + b"otherwise")
        return item_of(records, i)

    monkeypatch.setattr("fastil.tools.writing.item_of", changing)
    refused(source, tmp_path / "x.beton", "sample 4 is not what was read of its source", commit_bytes=1500)
    assert not (tmp_path / "x.beton").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_file_begins_with_is_known_before_and_it_is_read_once(tmp_path, monkeypatch, workers):
    """Unless an image is encoded again or left out, or the conversion goes on: then all of it is read at the end."""
    reads = []

    class Seen(ReadBack):
        def to(self, end, placed, reporter=None):
            reads.append((self.position, end))
            super().to(end, placed, reporter)

    monkeypatch.setattr("fastil.tools.writing.ReadBack", Seen)
    files = {name: encoded(photo(30 + i, 40, seed=i)) for i, name in enumerate(photos(9))}
    source, options = write(tmp_path / "in", files), {"commit_bytes": 1500, "workers": workers}
    run(source, tmp_path / "x.beton", **options)
    size = (tmp_path / "x.beton").stat().st_size
    assert reads[0][0] == SMALL_PAGE
    assert reads[-1][1] == size
    assert all(one[1] == next[0] for one, next in pairwise(reads))
    assert len(reads) > 3
    for name, content in (("again", encoded(photo(30, 40)[..., 0])), ("left out", encoded(photo(30, 40))[:-300])):
        reads.clear()
        write(tmp_path / name, files | {"train/class0/0004.jpg": content})
        run(tmp_path / name, tmp_path / f"{name}.beton", on_corrupt="skip", **options)
        assert reads[-1] == (0, (tmp_path / f"{name}.beton").stat().st_size)


def test_a_journal_tells_of_nothing_that_is_not_on_the_disk(tmp_path, monkeypatch):
    calls = []
    append, real = Journal.append, os.fsync

    def sync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    def noted(journal, record):
        calls.append("record")
        append(journal, record)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Journal, "append", noted)
    run(write(tmp_path / "in", photos(9)), tmp_path / "x.beton", commit_bytes=1500)
    records = [at for at, call in enumerate(calls) if call == "record"]
    assert len(records) > 4
    for at in records[1:]:  # the first tells what the conversion is
        assert calls[at - 1] == "x.beton.partial"
        assert calls[at + 1] == "x.beton.journal"


@pytest.mark.parametrize("size", [0, SMALL_PAGE, -1])
def test_a_file_that_was_cut_is_not_converted_already(small, tmp_path, size):
    run(small, tmp_path / "x.beton")
    whole = (tmp_path / "x.beton").stat().st_size
    os.truncate(tmp_path / "x.beton", size if size >= 0 else whole - 1)
    refused(small, tmp_path / "x.beton", "its manifest says", f"{whole:,}", "remove it and convert again")


@pytest.mark.parametrize("where", ["fastil.data.formats.pixels.check_decodes", "fastil.data.formats.pixels.open_image"])
def test_no_memory_is_no_damaged_image(small, tmp_path, monkeypatch, where):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(where, full)
    with pytest.raises(MemoryError):
        run(small, tmp_path / "x.beton", on_corrupt="skip")


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    source = write(tmp_path / "in", photos(4))
    with open(source / "train/class0/movie.jpg", "wb") as file:
        file.truncate(3 << 30)
    refused(source, tmp_path / "x.beton", "movie.jpg", "3,221,225,472 bytes, no image has so many")
    run(source, tmp_path / "x.beton", on_corrupt="skip")
    assert len(manifest_of(tmp_path / "x.beton").skipped) == 1


def test_reads_may_come_in_pieces(small, tmp_path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, rooms, at: real(descriptor, [rooms[0][:100]], at))
    run(small, tmp_path / "x.beton")
    monkeypatch.undo()
    run(small, tmp_path / "y.beton")
    assert sha256(tmp_path / "x.beton") == sha256(tmp_path / "y.beton")


@pytest.mark.parametrize("workers", [0, -1, 99_999])
def test_a_number_of_workers_that_makes_no_sense_is_refused(fastil, small, tmp_path, workers):
    run(small, tmp_path / "x.beton")
    for command in (("convert", small, tmp_path / "y.beton"), ("verify", tmp_path / "x.beton")):
        assert_user_error(fastil(*command, "--workers", workers), f"--workers {workers}: must lie between 1 and 1024")


# Ctrl-C


def interruptible():
    """A suite in the background of a shell would hand down that the signal is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs /proc")
def test_ctrl_c_is_one_line_leaves_no_process_and_the_same_command_goes_on(tmp_path):
    source = write(tmp_path / "in", photos(200, size=(300, 400)))
    command = [sys.executable, "-m", "fastil.cli", "convert", str(source), "--workers", "2"]
    moments = random.Random(0)
    run(source, tmp_path / "x.beton", commit_bytes=COMMIT_BYTES)
    expected = sha256(tmp_path / "x.beton")
    stopped = 0
    for number in range(INTERRUPTED):
        out = tmp_path / f"{number}.beton"
        process = subprocess.Popen(
            [*command, str(out)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=interruptible,
        )  # fmt: skip
        sign = out.with_name(f"{out.name}.{'partial' if number else 'journal'}")  # the latter: it copies now
        while process.poll() is None and not sign.exists():
            time.sleep(0.01)
        time.sleep(moments.random() * 1.5 if number else 0)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=300)[1]
        assert errors in ("", "stopped; the same command goes on\n")
        if not out.exists():  # else it was too late, maybe while Python itself ended
            stopped += 1
            assert process.returncode == 130
            assert errors
        assert left_of(process, 60) == []
        assert subprocess.run([*command, str(out)], env=environment(), capture_output=True).returncode == 0
        assert sha256(out) == expected
        out.unlink()
    assert stopped


def test_ctrl_c_in_this_process_leaves_what_was_committed(small, tmp_path, capsys):
    class Stop(Reporter):
        def advance(self, *others):
            super().advance(*others)
            if self.stage == "convert train" and self.done == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "x.beton", commit_bytes=1, reporter=Stop())
    assert set(left(tmp_path)) == {"x.beton.partial", "x.beton.journal"}
    run(small, tmp_path / "x.beton")
    assert "going on after 4 images" in capsys.readouterr().out
    run(small, tmp_path / "y.beton")
    assert outputs(tmp_path, "x")["x.beton"] == outputs(tmp_path, "y")["y.beton"]


def test_options_of_another_run_do_not_go_on_with_what_is_there(small, tmp_path):
    class Stop(Reporter):
        def begin(self, stage, *others):
            if stage == "read back":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "x.beton", reporter=Stop())
    partial = tmp_path / "x.beton.partial"
    before = sha256(partial)
    for key, value in (
        ("quality", 50), ("mode", "raw"), ("max_side", 9), ("squash", 9), ("check", False), ("val", "same"),
        ("per_class", 1), ("classes", "class1,class0"),
    ):  # fmt: skip
        name = f"(other --{key.replace('_', '-')})"
        refused(small, tmp_path / "x.beton", partial, "another conversion", name, "remove it", **{key: value})
    assert sha256(partial) == before
    partial.unlink()
    run(small, tmp_path / "x.beton", quality=50)
    run(small, tmp_path / "y.beton", quality=50)
    assert sha256(tmp_path / "x.beton") == sha256(tmp_path / "y.beton")


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_a_changed_sample_of_a_beton_does_not_pass_into_another_file(small, tmp_path, mode):
    run(small, tmp_path / "x.beton", mode=mode)
    with Beton(tmp_path / "x.beton") as beton:
        at = int(beton.starts[3]) + int(beton.lengths[3]) // 2
    content = bytearray((tmp_path / "x.beton").read_bytes())
    content[at] ^= 1
    (tmp_path / "x.beton").write_bytes(content)
    refused(tmp_path / "x.beton", tmp_path / "y.beton", "x.beton", "has changed since it was written")
    assert not (tmp_path / "y.beton").exists()


# Small lossless images


def lossless(size, kind="PNG", **options):
    """A folder's files: two classes of noise in one format."""
    random = np.random.default_rng(size)
    return {
        f"{split}/{name}/{i}.{kind.lower()}": encoded(
            random.integers(0, 256, (size, size - 1, 3), dtype=np.uint8), kind, **options
        )
        for split in ("train", "val")
        for name in ("a", "b")
        for i in range(2)
    }


@pytest.mark.parametrize(
    ("files", "mode"),
    [
        (lossless(96), "raw"),
        (lossless(97), "jpeg"),
        (lossless(20) | lossless(97, "BMP"), "jpeg"),
        (lossless(20) | {"val/b/9.jpg": encoded(photo(20, 20))}, "jpeg"),  # among lossless ones, in the last class
        (lossless(20) | {"train/a/0.png": b"no image"}, "raw"),
        (lossless(20, "BMP"), "raw"),
        (lossless(20, "PPM"), "raw"),
        (lossless(20, "TIFF", compression="tiff_lzw"), "raw"),
        (lossless(20, "TIFF", compression="jpeg"), "jpeg"),
        (lossless(20, "WEBP", lossless=True), "raw"),
        (lossless(20, "WEBP"), "jpeg"),
    ],
)
def test_small_lossless_images_stay_what_they_are_unless_asked_otherwise(tmp_path, capsys, files, mode):
    source = write(tmp_path / "in", files)
    run(source, tmp_path / "x.beton", on_corrupt="skip")
    with Beton(tmp_path / "x.beton") as file, Beton(tmp_path / "x.val.beton") as val:
        assert (file.mode, val.mode) == (mode, mode)
        for i in range(len(file)) if mode == "raw" else ():
            np.testing.assert_array_equal(file.image(i), decoded(files[file.name(i)]))
    printed = capsys.readouterr().out
    for said in ("all images are lossless and no larger than 96x96", "decoded to pixels", "alpha and the low byte"):
        assert (said in printed) == (mode == "raw")
    assert ("encoded again" in printed) == (mode == "jpeg")
    run(source, tmp_path / "y.beton", on_corrupt="skip", mode="jpeg")
    with Beton(tmp_path / "y.beton") as file:
        assert file.mode == "jpeg"


def test_a_conversion_of_the_other_mode_is_not_gone_on_with(tmp_path):
    """As a version that made JPEGs of them would have left it, finished or not."""
    source = write(tmp_path / "in", lossless(20))
    run(source, tmp_path / "x.beton", mode="jpeg")
    with pytest.raises(UserError, match=r"another conversion \(other --mode\)"):
        run(source, tmp_path / "x.beton")
