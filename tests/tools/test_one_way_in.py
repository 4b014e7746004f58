"""What users met: images that one way in took and another refused, that vanished without a word, or hung."""

import os
import socket
import stat
import struct
import threading
import time

import numpy as np
import pytest
from conftest import encoded
from converting import in_both, load, photo, tagged, tree, write
from converting import run as convert
from making import png, refused, write_tar
from PIL import Image, features

from fastil.data.formats import pixels
from fastil.data.formats.beton import Beton
from fastil.data.formats.detect import open_source
from fastil.data.formats.pixels import middle, square, suffixes
from fastil.errors import UserError

# One reader


def test_a_run_turns_images_as_a_conversion_does(tmp_path):
    """A run saw a red left half where the .betons of the same folder had a red top."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = (250, 0, 0), (0, 0, 250)  # as it lies in the file
    content = encoded(pixels, quality=95, exif=tagged(6))  # turned clockwise: red on top
    write(tmp_path / "in", {f"{split}/{name}/0.jpg": content for split in ("train", "val") for name in "ab"})
    convert(tmp_path / "in", tmp_path / "x.beton")
    for path in (tmp_path / "in", tmp_path / "x.beton"):
        found = load(path, size=16).train.images[0].astype(int)
        assert found[2, :, 0].min() > 200 > 50 > found[13, :, 0].max()
    found = load(tmp_path / "in", size=16, exif="ignore").train.images[0].astype(int)
    assert found[:, 2, 0].min() > 200 > 50 > found[:, 13, 0].max()


def formats():
    """By name of a file, an image that either every way in takes, or none."""
    shades = photo(24, 32)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    huge = b"IHDR" + struct.pack(">IIBBBBB", 10_001, 10_000, 1, 0, 0, 0, 0)
    found = {
        "eps.jpg": (eps, "not an image of a known format"),
        "big.png": (encoded(Image.new("1", (10_001, 10_000)), "PNG"), "10001x10000 pixels, more than the 100,000,000"),
        "f32.tif": (encoded(shades[..., 0].astype(np.float32), "TIFF"), "floating-point"),
        "empty.png": (b"", "no bytes in it"),
        "ico.png": (encoded(shades, "ICO"), "not an image of a known format"),
        "jpeg 2000.jpg": (encoded(shades, "JPEG2000"), None),
    }
    assert huge in found["big.png"][0][:40]
    return found | ({"avif.jpg": (encoded(shades, "AVIF"), None)} if features.check("avif") else {})


@pytest.mark.parametrize("name", formats())
def test_every_way_in_takes_the_same_images(tmp_path, capsys, name):
    """A run took all of these, EPS by starting Ghostscript, and images of 176 megapixels; a conversion refused AVIF and
    JPEG 2000, and told a TIFF of floats only once it wrote."""
    content, problem = formats()[name]
    folder = write(tmp_path / "in", tree(cat=(".png", 3), dog=(".png", 3)) | {f"train/cat/{name}": content})
    if problem is None:
        assert len(load(folder).train.labels) == 7
        convert(folder, tmp_path / "x.beton", mode="raw")
        assert len(Beton(tmp_path / "x.beton")) == 7
        return
    convert(folder, tmp_path / "x.beton", dry_run=True)
    assert problem in capsys.readouterr().out
    for work in (lambda: load(folder), lambda: convert(folder, tmp_path / "x.beton")):
        with pytest.raises(UserError, match=name) as error:
            work()
        assert problem in str(error.value)
    assert len(load(folder, on_corrupt="skip").train.labels) == 6
    convert(folder, tmp_path / "x.beton", on_corrupt="skip")
    assert len(Beton(tmp_path / "x.beton")) == 6


def test_the_bound_on_pixels_is_lifted_by_one_key(tmp_path, monkeypatch):
    """And Pillow's own with it, which ends in an error at twice its number."""
    folder = write(tmp_path / "in", tree(cat=(".png", 2), dog=(".png", 2)))
    (folder / "train/cat/big.png").write_bytes(encoded(photo(60, 100), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)
    with pytest.raises(UserError, match=r"big\.png"):
        load(folder)
    assert len(load(folder, max_pixels=100_000_001).train.labels) == 5
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)
    convert(folder, tmp_path / "x.beton", max_pixels=100_000_001, mode="jpeg")
    with Beton(tmp_path / "x.beton") as file:
        assert len(file) == 5
    small = write(tmp_path / "small", tree(cat=(".png", 2), dog=(".png", 2)))
    with pytest.raises(UserError, match="8x8 pixels, more than the 63"):
        load(small, max_pixels=63)


@pytest.mark.parametrize("size", [(70, 1), (1, 70), (200, 3), (3, 201), (1000, 7), (31, 1), (640, 20), (20, 645)])
def test_a_thin_image_is_cut_and_then_scaled_to_nearly_what_it_was(size):
    """Pillow scales a whole image; what is cut off is not in the central square. Ordinary images are not touched."""
    image = Image.fromarray(photo(size[1], size[0]))
    scale = 16 / min(size)
    width, height = (max(16, round(side * scale)) for side in size)
    left, top = (width - 16) // 2, (height - 16) // 2
    whole = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 16, top + 16))
    found = np.asarray(square(image, 16)).astype(int)
    if max(size) <= 32 * min(size):
        assert middle(image.size) == (0, 0, *size)
        np.testing.assert_array_equal(found, whole)
    else:
        assert max(middle(image.size)) <= max(size)
        assert np.abs(found - np.asarray(whole)).mean() < 4  # half a pixel further


# What is left out

LOST = {f"train/cat/{i}.jpg": png(i) for i in range(3)} | {f"train/dog/{i}.jpg": png(i) for i in range(3)}
VAL = {f"val/{name}/{i}.jpg": png(i) for name in ("cat", "dog") for i in range(2)}


def test_what_is_left_out_is_counted_by_class_and_ending_in_a_folder_and_in_a_tar(tmp_path):
    """A tar dropped them without a word; a folder gave their number and one name."""
    lost = {"train/dog/4.heic": b"1", "train/dog/5.HEIC": b"1", "train/cat/6.jxl": b"1", "train/cat/sub/7.jpg": png(7),
            "val/cat/8.jxl": b"1", "train/cat/8.txt": b"1", "train/list.csv": b"1"}  # fmt: skip
    notes = [
        ".jxl: 1 in class cat, 1 in class cat of val left out; convert them to JPEG or PNG",
        ".txt: 1 in class cat left out",
        "images in folders below their class: 1 in class cat left out; move them up",
        "1 files in no class folder are left out, such as train/list.csv",
    ]
    if ".heic" not in suffixes():
        notes.insert(0, ".heic: 2 in class dog left out; pip install pillow-heif, or convert them")
    for path in in_both(tmp_path, LOST | VAL | lost):
        source = open_source(path)
        assert sorted(source.notes) == sorted(notes)
        assert len(source.train) == 6 + (2 if ".heic" in suffixes() else 0)


@pytest.mark.parametrize(
    ("lost", "complaint"),
    [
        ({f"train/dog/{i}.jxl": b"1" for i in range(3, 6)}, "train/dog: 3 of its 6 files .* (3 .jxl); convert them to"),
        ({f"train/cat/sub/{i}.jpg": png(i) for i in range(5)}, "train/cat: 5 of its 8 .* (5 in folders below); move"),
        ({f"val/dog/{i}.psd": b"1" for i in range(9)}, "val/dog: 9 of its 11 files"),
        (
            {f"train/{name}/{i}.psd": b"1" for i in range(4, 9) for name in ("dog", "cat")},
            "train/cat: 5 of its 8 files would .* (and so for class dog)",
        ),
    ],
)
def test_a_class_that_would_lose_half_of_its_files_is_an_error(tmp_path, lost, complaint):
    for path in in_both(tmp_path, LOST | VAL | lost):
        with pytest.raises(UserError, match=complaint.replace("(", r"\(").replace(")", r"\)")):
            open_source(path)


def test_companions_of_images_are_no_loss(tmp_path):
    """Captions, labels and the like are as many as images."""
    captions = {name.replace(".jpg", suffix): b"1" for name in LOST for suffix in (".txt", ".json", ".xml")}
    for path in in_both(tmp_path, LOST | VAL | captions):
        assert [note.partition(" left")[0] for note in open_source(path).notes] == [
            f"{suffix}: 3 in class cat, 3 in class dog" for suffix in (".json", ".txt", ".xml")
        ]


def test_a_format_that_pillow_was_built_without_is_left_out_with_what_brings_it(tmp_path, monkeypatch):
    check = features.check
    monkeypatch.setattr(features, "check", lambda name: name != "jpg_2000" and check(name))
    pixels.formats.cache_clear()
    pixels.suffixes.cache_clear()
    try:
        write(tmp_path, LOST | VAL | {"train/dog/9.jp2": b"1"})
        assert open_source(tmp_path).notes == (".jp2: 1 in class dog left out; pip install -U pillow, or convert them",)
    finally:
        pixels.formats.cache_clear()
        pixels.suffixes.cache_clear()


@pytest.mark.skipif(".heic" not in suffixes(), reason="pip install pillow-heif")
def test_heic_is_read_where_its_reader_is_installed(tmp_path):
    write(tmp_path, tree(cat=(".png", 3), dog=(".png", 3)))
    Image.fromarray(photo(24, 32)).save(tmp_path / "train/cat/photo.heic", quality=95)
    assert len(load(tmp_path).train.labels) == 7


# Special files


def special_files(place):
    """Makes one of each kind, by name."""

    def listen(path):
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.close()

    return {"a named pipe": os.mkfifo, "a socket": listen}[place]


@pytest.mark.parametrize("kind", ["a named pipe", "a socket"])
@pytest.mark.parametrize("name", ["photo.jpg", "noise", "notes.txt"])
def test_a_special_file_among_the_images_is_refused_at_once(tmp_path, monkeypatch, kind, name):
    """A named pipe was waited for, for ever."""
    write(tmp_path / "in", tree(cat=(".png", 2), dog=(".png", 2)))
    monkeypatch.chdir(tmp_path / "in/train/cat")  # the name of a socket has to be short
    special_files(kind)(name)
    refused(f"cat/{name}: is {kind}", path=tmp_path / "in")


def test_a_file_that_becomes_a_pipe_while_it_is_read_is_not_waited_for(tmp_path):
    records = open_source(write(tmp_path, tree(cat=(".png", 2), dog=(".png", 2)))).train
    (tmp_path / "train/cat/0.png").unlink()
    os.mkfifo(tmp_path / "train/cat/0.png")
    with pytest.raises(UserError, match=r"cat/0\.png: cannot be read"):
        records.content(0)


PIPES = {
    "idx": ["train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte"],
    "cifar": ["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"],
    "cifar binary": ["cifar-10-batches-bin/data_batch_1.bin", "cifar-10-batches-bin/batches.meta.txt"],
    "tiny": ["wnids.txt"], "beton": ["x.beton"], "manifest": ["x.manifest.json"], "parquet": ["train-0.parquet"],
    "shard": ["train-0.tar"], "devkit": ["ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz"],
}  # fmt: skip


@pytest.mark.parametrize("names", PIPES.values(), ids=PIPES)
def test_a_pipe_in_place_of_any_file_of_a_source_ends_at_once(tmp_path, names):
    """In whatever way: a thread that still waits after ten seconds would wait for ever."""
    if "manifest.json" in names[0]:
        convert(write(tmp_path / "in", tree(cat=(".png", 2), dog=(".png", 2))), tmp_path / "x.beton")
        (tmp_path / names[0]).unlink()
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    path = tmp_path / "x.beton" if names[0].startswith("x.") else tmp_path
    ended = []

    def work():
        try:
            open_source(path)
        except UserError:
            ended.append(True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert ended
    assert stat.S_ISFIFO(os.stat(tmp_path / names[0]).st_mode)


PLACES = {
    "in a folder": ("in/train/dog/pipe.jpg", "in"), "for a folder": ("pipe", "pipe"),
    "for a .beton": ("x.beton", "x.beton"), "among shards": ("shards/train-1.tar", "shards"),
    "for a tar": ("pipe.tar", "pipe.tar"),
}  # fmt: skip


@pytest.mark.parametrize(("pipe", "data"), PLACES.values(), ids=PLACES)
def test_the_commands_refuse_a_pipe_and_never_open_it(start, tmp_path, pipe, data):
    """A writer without a reader cannot open it, so one that can has found a command that reads."""
    write(tmp_path / "in", tree(cat=(".png", 2), dog=(".png", 2)))
    write_tar(tmp_path / "shards/train-0.tar", {"0.png": png(0), "0.cls": b"0", "1.png": png(1), "1.cls": b"1"})
    os.mkfifo(tmp_path / pipe)
    settings = ["base_classes=1", "increment=1"]
    commands = [["convert", data, "y.beton"], ["run", "folder", "--data", data, *settings]]
    if data == "in":
        commands.append(["plan", "folder", "--data", data, *settings])
    processes = [start(*command) for command in commands]
    while any(process.poll() is None for process in processes):
        with pytest.raises(OSError, match="No such device"):
            os.open(tmp_path / pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 2, said
        assert pipe in said, said
        assert "a named pipe" in said, said


# Skipping


def test_skip_skips_whatever_cannot_be_read(tmp_path):
    """A dangling link ended the listing, whatever was to be skipped."""
    folder = write(tmp_path / "in", tree(cat=(".png", 3), dog=(".png", 3)))
    (folder / "train/cat/link.png").symlink_to("nowhere")
    (folder / "train/dog/loop.jpg").symlink_to("loop.jpg")
    (folder / "val/dog/empty.jpg").write_bytes(b"")
    dataset = load(folder, on_corrupt="skip")
    assert (len(dataset.train.labels), len(dataset.val.labels)) == (6, 4)
    assert "cat/link.png (cannot be read (No such file" in dataset.notes[0]
    convert(folder, tmp_path / "x.beton", on_corrupt="skip")
    assert len(Beton(tmp_path / "x.beton")) == 6
    with pytest.raises(UserError, match=r"link\.png \(cannot be read .*on_corrupt=skip"):
        load(folder)
    with pytest.raises(UserError, match=r"unreadable: .*link\.png .*--on-corrupt skip"):
        convert(folder, tmp_path / "y.beton")


def test_a_class_folder_that_is_a_link_to_nothing_is_an_error(tmp_path):
    write(tmp_path, tree(cat=(".png", 2), dog=(".png", 2)))
    (tmp_path / "train/emu").symlink_to("nowhere")
    refused("train/emu: links to nothing", path=tmp_path)
