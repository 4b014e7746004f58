"""The .beton format: against byte layouts written out by hand, against FFCV itself, and against damage of every kind.

FFCV works in a process of its own (this file run as a script), for its writer and its loader hang where they fail.
"""

import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastil.data.formats import beton
from fastil.data.formats.beton import JPEG, RAW, Beton
from fastil.data.formats.beton_source import records_of
from fastil.data.formats.detect import open_source
from fastil.data.formats.manifest import Changed, Manifest, manifest_path, read_manifest
from fastil.errors import UserError

FUZZED = 5000 if os.environ.get("FASTIL_SOAK") else 300
PAGE = 1 << 21  # the smallest that FFCV takes
SMALL = 4096  # for files that FFCV does not see
NO_FFCV = 77  # exit status


@pytest.fixture(autouse=True)
def no_huge_allocation():
    """A number that a damaged file names must not become the size of a block of memory."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def photo(height, width, seed):
    """Something with the smooth shades and the edges of a photograph."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 32
    waves = [np.sin(x * a + y * b + c) for a, b, c in random.uniform(-2, 2, (3, 3))]
    pixels = 128 + 90 * np.stack(waves, axis=-1) + random.normal(0, 2, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 256, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def write(path, samples, labels, sizes, mode, page):
    """A file by the module's writer functions. sizes: height and width of each sample."""
    entries = np.zeros(len(samples), beton.ENTRY)
    position = beton.data_start(len(samples), page)
    with open(path, "w+b") as file:
        for i, content in enumerate(samples):
            position = beton.place(position, len(content), page)
            file.seek(position)
            file.write(content)
            height, width = sizes[i]
            entries[i] = (position, len(content), labels[i], 0, width, height)
            position += len(content)
        before = beton.front(entries, mode, page, beton.data_start(len(samples), page))
        beton.write_tables(file, entries, before, page)
        beton.write_header(file, before)
    return path


def manifest_of(labels, class_names, **others):
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    whole = Manifest(
        format=1, tool="fastil 1", beton_version=2, split="train", source={"kind": "x", "name": "set", "path": "/x"},
        parameters={"mode": "jpeg"}, libraries={"pillow": "1"}, class_names=class_names, titles=None, counts=counts,
        images=len(labels), bytes=1, sha256="0", crc32=[0] * len(labels),
        names=[f"{class_names[label]}/{i}.jpg" for i, label in enumerate(labels)],
    )  # fmt: skip
    return replace(whole, **others)


LABELS = [0, 0, 1, 2, 2]
SIZES = [(9, 16), (16, 9), (8, 8), (24, 17), (1, 1)]
PHOTOS = [photo(*size, seed) for seed, size in enumerate(SIZES)]


def small_file(folder, mode=JPEG, name="x.beton", labels=LABELS):
    samples = [jpeg(pixels) if mode == JPEG else pixels.tobytes() for pixels in PHOTOS]
    return write(folder / name, samples, labels, SIZES, mode, SMALL)


def refused(path, *words):
    with pytest.raises(UserError) as error:
        Beton(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    for word in words:
        assert word in message, (word, message)


# The bytes


def header(page, samples, table, version=2, fields=3):
    return struct.pack("<HHIQQ", version, fields, page, samples, table)


def field(kind, name):
    return struct.pack("<B16s1024x", kind, name)


def test_the_bytes_are_those_of_the_format(tmp_path):
    # The sizes make the third sample start a page, the fourth end one, and the fifth fill one by itself.
    sizes, labels = [3240, 600, 270, 3826, 4096, 1], [0, 0, 1, 5, 5, 7]
    places = [4096, 7336, 8192, 8462, 12288, 16384]
    pixels = [(1, 2), (300, 400), (65535, 1), (1, 65535), (7, 7), (256, 255)]
    samples = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    rows = [
        struct.pack("<BHHQ3xqq", 0, width, height, ptr, label, i)
        for i, ((height, width), ptr, label) in enumerate(zip(pixels, places, labels, strict=True))
    ]
    front = header(4096, 6, 20480) + field(2, b"image") + field(1, b"label") + field(1, b"id") + b"".join(rows)
    assert len(front) == 24 + 3 * 1041 + 6 * 32
    pages = samples[0] + samples[1] + bytes(256) + samples[2] + samples[3] + samples[4] + samples[5] + bytes(4095)
    table = b"".join(struct.pack("<QQQ", i, places[i], sizes[i]) for i in range(6))
    golden = front + bytes(4096 - len(front)) + pages + table

    path = write(tmp_path / "x.beton", samples, labels, pixels, JPEG, 4096)
    assert path.read_bytes() == golden

    path.write_bytes(golden)
    with Beton(path) as found:
        assert len(found) == 6
        assert found.mode == "jpeg"
        assert found.page_size == 4096
        assert found.starts.tolist() == places
        assert found.lengths.tolist() == sizes
        assert found.sizes.tolist() == [list(size) for size in pixels]
        assert found.labels.tolist() == labels
        assert found.labels.dtype == np.int64
        assert found.ids.tolist() == list(range(6))
        assert found.class_names == [str(i) for i in range(8)]
        assert [found.encoded(i) for i in range(6)] == samples


@pytest.mark.parametrize("mode", [JPEG, RAW])
def test_a_file_gives_back_what_was_written(tmp_path, mode):
    with Beton(small_file(tmp_path, mode)) as found:
        assert found.mode == ("jpeg" if mode == JPEG else "raw")
        for i, pixels in enumerate(PHOTOS):
            expected = pixels if mode == RAW else np.asarray(Image.open(io.BytesIO(jpeg(pixels))))
            np.testing.assert_array_equal(found.image(i), expected)
            assert found.encoded(i) == (jpeg(pixels) if mode == JPEG else pixels.tobytes())
            assert bytes(found.view(i)) == found.encoded(i)


def test_a_file_is_not_valid_before_its_header_is_written(tmp_path):
    path = tmp_path / "x.beton"
    entries = np.zeros(1, beton.ENTRY)
    entries[0] = (SMALL, 3, 0, 0, 1, 1)
    with open(path, "w+b") as file:
        file.seek(SMALL)
        file.write(b"rgb")
        file.flush()
        refused(path, "unfinished", "run its command again")
        before = beton.front(entries, RAW, SMALL, beton.data_start(len(entries), SMALL))
        beton.write_tables(file, entries, before, SMALL)
        file.flush()
        refused(path, "unfinished", "run its command again")
        beton.write_header(file, before)
    with Beton(path) as found:
        assert found.image(0).tolist() == [[list(b"rgb")]]


@pytest.mark.parametrize(
    ("largest", "page"),
    [(0, 1 << 23), (1, 1 << 23), (1 << 23, 1 << 23), ((1 << 23) + 1, 1 << 24), (1 << 31, 1 << 31)],
)
def test_a_page_holds_the_largest_sample(largest, page):
    assert beton.page_size_for(largest) == page


@pytest.mark.parametrize(
    ("largest", "total", "page"),
    [
        (9, 9, 1 << 21),
        (9, 1 << 21, 1 << 21),
        (9, (1 << 21) + 1, 1 << 22),
        (9, 1 << 40, 1 << 23),
        (1 << 24, 1 << 24, 1 << 24),
    ],
)
def test_a_small_file_has_small_pages(largest, total, page):
    assert beton.page_size_for(largest, total) == page


def test_a_sample_that_fits_into_no_page_is_refused():
    with pytest.raises(UserError, match="--max-side"):
        beton.page_size_for((1 << 31) + 1)


@given(st.lists(st.integers(0, 64), max_size=40), st.sampled_from([64, 128]))
def test_no_sample_straddles_a_page_and_none_leaves_one_that_it_fits_into(sizes, page):
    start = beton.data_start(len(sizes), page)
    assert start % page == 0
    assert 0 <= start - (24 + 3 * 1041 + 32 * len(sizes)) < page
    position = start
    for size in sizes:
        at = beton.place(position, size, page)
        assert at // page == max(at, at + size - 1) // page
        left = -position % page
        assert at == (position if size <= left or position % page == 0 else position + left)
        position = at + size


# FFCV's own files


def image_sizes(count, same=False):
    return [(300, 400) if same else (40 + 3 * i, 90 - 5 * i) for i in range(count)]


SOURCES = [photo(*size, 10 + i) for i, size in enumerate(image_sizes(12, same=True))]
VARIED = [photo(*size, 40 + i) for i, size in enumerate(image_sizes(12))]
CLASSES = [7, 0, 3, 3, 1, 0, 2, 7, 5, 4, 6, 1]


def ffcv_files():
    """What FFCV's writer is asked for: fields of a sample, by name, and the images."""
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField, TorchTensorField

    def image(mode):
        return RGBImageField(write_mode=mode, jpeg_quality=90, compress_probability=0.5)

    def others(tensor=True):
        more = {"blob": BytesField(), "note": JSONField(), "vector": NDArrayField(np.dtype("f4"), (3,))}
        if tensor:
            import torch

            more["tensor"] = TorchTensorField(torch.float32, (2,))
        return more

    return {
        "jpg": ({"image": image("jpg"), "label": IntField()}, VARIED),
        "raw": ({"label": IntField(), "image": image("raw")}, SOURCES),
        "after": ({"image": image("proportion"), **others(), "score": FloatField(), "number": IntField()}, VARIED),
        "before": (
            {"id": IntField(), **others(tensor=False), "score": FloatField(), "image": image("jpg"),
             "label": IntField()}, VARIED,
        ),
    }  # fmt: skip


class Samples:
    """Samples for FFCV's writer: the values of all fields of a sample."""

    def __init__(self, names, images):
        self.names, self.images = names, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        import torch

        i = int(i)  # from numpy's
        values = {
            "label": CLASSES[i], "number": CLASSES[i], "id": i, "image": self.images[i], "score": i / 3,
            "blob": np.arange(i % 4 + 1, dtype=np.uint8), "note": {"i": i, "text": "x" * i},
            "vector": np.full(3, i, "f4"), "tensor": torch.full((2,), float(i)),
        }  # fmt: skip
        return tuple(values[name] for name in self.names)


def as_ffcv(folder):
    """Write FFCV's own files there, and read fastil's with FFCV's Reader and Loader."""
    try:
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.reader import Reader
        from ffcv.writer import DatasetWriter
    except ImportError as error:
        print(error)
        sys.exit(NO_FFCV)
    warnings.simplefilter("ignore")  # numba's, about closures of FFCV
    for name, (fields, images) in ffcv_files().items():
        np.random.seed(0)  # FFCV's workers draw from copies of this; one that writes six images draws both modes
        writer = DatasetWriter(str(folder / f"{name}.beton"), fields, page_size=PAGE, num_workers=2)
        writer.from_indexed_dataset(Samples(list(fields), images), chunksize=3)
        reader = Reader(str(folder / f"{name}.beton"))
        image = reader.metadata[f"f{list(fields).index('image')}"]
        sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
        np.savez(
            folder / f"{name}.npz", mode=image["mode"], ptr=image["data_ptr"],
            size=[sizes[ptr] for ptr in image["data_ptr"].tolist()],
        )  # fmt: skip
    for name, os_cache in LOADED:
        reader = Reader(str(folder / f"fastil-{name}.beton"))
        assert reader.field_names == ["image", "label", "id"]
        loader = Loader(
            str(folder / f"fastil-{name}.beton"), batch_size=5, num_workers=2, os_cache=os_cache, drop_last=False,
            order=OrderOption.SEQUENTIAL, pipelines={"image": [SimpleRGBImageDecoder()]},
        )  # fmt: skip
        images, labels, ids = (
            np.concatenate([np.array(part) for part in parts]) for parts in zip(*loader, strict=True)
        )
        np.savez(folder / f"fastil-{name}-{os_cache}.npz", images=images, labels=labels[:, 0], ids=ids[:, 0])


LOADED = [("raw", True), ("jpeg", True), ("jpeg", False)]


def padded(samples):
    """JPEGs with bytes behind their end, so that they fill pages of PAGE bytes: one a page alone, four another one, and
    the last the rest of the last page."""
    rest = samples[5:-1]
    lengths = [PAGE, *[PAGE // 4] * 4, *map(len, rest), PAGE - sum(map(len, rest))]
    return [sample + bytes(length - len(sample)) for sample, length in zip(samples, lengths, strict=True)]


@pytest.fixture(scope="module")
def ffcv(tmp_path_factory):
    """A folder with files by FFCV and what FFCV read of files by fastil."""
    if find_spec("ffcv") is None:
        pytest.skip("FFCV is not installed (make test says why)")
    folder = tmp_path_factory.mktemp("ffcv")
    size = SOURCES[0].shape[:2]
    raw, jpegs = [pixels.tobytes() for pixels in SOURCES], padded([jpeg(pixels) for pixels in SOURCES])
    write(folder / "fastil-raw.beton", raw, CLASSES, [size] * 12, RAW, PAGE)
    write(folder / "fastil-jpeg.beton", jpegs, CLASSES, [size] * 12, JPEG, PAGE)
    child = subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=900)  # it takes 20 s of a core
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its workers, too
        pytest.fail(f"FFCV hung: {child.communicate()[0]}")
    if child.returncode == NO_FFCV:
        pytest.skip(f"FFCV cannot be imported: {output}")
    assert child.returncode == 0, output
    return folder


@pytest.mark.parametrize("name", ["jpg", "raw", "after", "before"])
def test_a_file_by_ffcv_opens(ffcv, name):
    theirs = np.load(ffcv / f"{name}.npz")
    sources = SOURCES if name == "raw" else VARIED
    content = (ffcv / f"{name}.beton").read_bytes()
    with Beton(ffcv / f"{name}.beton") as found:
        assert found.mode == {"jpg": "jpeg", "raw": "raw", "before": "jpeg", "after": "mixed"}[name]
        assert found.labels.tolist() == CLASSES
        assert (found.ids is None) == (name != "before")
        assert found.manifest is None
        assert found.class_names == [str(i) for i in range(8)]
        np.testing.assert_array_equal(found.modes, theirs["mode"])
        np.testing.assert_array_equal(found.starts, theirs["ptr"])
        np.testing.assert_array_equal(found.lengths, theirs["size"])
        if name != "before":  # where a sample has places of other fields
            np.testing.assert_array_equal(found.place_ids, np.arange(12))
        for i, pixels in enumerate(sources):
            assert found.encoded(i) == content[theirs["ptr"][i] :][: theirs["size"][i]]
            if theirs["mode"][i] == RAW:
                np.testing.assert_array_equal(found.image(i), pixels)
            else:
                encoded = Image.open(io.BytesIO(found.encoded(i)))
                np.testing.assert_array_equal(found.image(i), np.asarray(encoded))
                assert np.abs(found.image(i).astype(int) - pixels).mean() < 4


def test_a_file_by_ffcv_with_both_modes_is_a_source(ffcv):
    source = records_of(ffcv / "after.beton")
    assert source.name == "after"
    modes = np.load(ffcv / "after.npz")["mode"]
    assert set(modes.tolist()) == {JPEG, RAW}
    for i, mode in enumerate(modes):
        content = source.train.content(i)
        if mode == RAW:
            np.testing.assert_array_equal(content, VARIED[i])
        else:
            assert Image.open(io.BytesIO(content)).size == VARIED[i].shape[1::-1]


@pytest.mark.parametrize(("name", "os_cache"), LOADED)
def test_ffcv_loads_the_same_images_labels_and_ids(ffcv, name, os_cache):
    theirs = np.load(ffcv / f"fastil-{name}-{os_cache}.npz")
    assert theirs["labels"].tolist() == CLASSES
    assert theirs["ids"].tolist() == list(range(12))
    with Beton(ffcv / f"fastil-{name}.beton") as found:
        pages = (found.starts // PAGE).tolist()
        ours = np.stack([found.image(i) for i in range(12)])
    if name == "raw":
        assert pages == [1] * 5 + [2] * 5 + [3] * 2
        np.testing.assert_array_equal(theirs["images"], np.stack(SOURCES))
        np.testing.assert_array_equal(ours, np.stack(SOURCES))
    else:
        assert pages == [1] + [2] * 4 + [3] * 7
        difference = np.abs(theirs["images"].astype(int) - ours)  # FFCV decodes with the fast transform
        assert difference.mean() < 2
        assert difference.max() < 32


# Damage

ROWS = 24 + 3 * 1041
TABLE_AT = 8192  # of the small file: the table of places


def changed(path, at, form, *values):
    content = bytearray(path.read_bytes())
    struct.pack_into("<" + form, content, at, *values)
    path.write_bytes(content)
    return path


def test_the_small_file_is_laid_out_as_the_damage_below_expects(tmp_path):
    content = small_file(tmp_path).read_bytes()
    assert struct.unpack_from("<HHIQQ", content) == (2, 3, SMALL, 5, TABLE_AT)
    assert len(content) == TABLE_AT + 5 * 24
    assert struct.unpack_from("<QQQ", content, TABLE_AT)[:2] == (0, 4096)


@pytest.mark.parametrize("mode", [JPEG, RAW])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, mode):
    path = small_file(tmp_path, mode)
    content = path.read_bytes()
    for length in [*range(0, len(content), 61), *range(len(content) - 100, len(content))]:
        path.write_bytes(content[:length])
        refused(path)


HUGE = 2**63
DAMAGE = {
    "version 1": (0, "H", 1),
    "version 3": (0, "H", 3),
    "no fields": (2, "H", 0),
    "one field": (2, "H", 1),
    "a field more": (2, "H", 4),
    "65535 fields": (2, "H", 65535),
    "page size 0": (4, "I", 0),
    "page size 3": (4, "I", 3),
    "page size 4097": (4, "I", 4097),
    "page size 2^32 - 1": (4, "I", 2**32 - 1),
    "no samples": (8, "Q", 0),
    "a sample more": (8, "Q", 6),
    "2^40 samples": (8, "Q", 2**40),
    "2^59 samples": (8, "Q", 2**59),  # times 32 bytes wraps around to 0
    "2^63 samples": (8, "Q", HUGE),
    "2^64 - 1 samples": (8, "Q", 2**64 - 1),
    "table at 0": (16, "Q", 0),
    "table before the rows": (16, "Q", 24),
    "table in the rows": (16, "Q", ROWS + 32),
    "table in the samples": (16, "Q", TABLE_AT - 24 * 20),
    "table unaligned": (16, "Q", TABLE_AT - 1),
    "table a place late": (16, "Q", TABLE_AT + 24),
    "table at the end": (16, "Q", TABLE_AT + 5 * 24),
    "table behind the end": (16, "Q", TABLE_AT + 6 * 24),
    "table at 2^63": (16, "Q", HUGE),
    "table at 2^64 - 24": (16, "Q", 2**64 - 24),
    "a type that FFCV does not know": (24, "B", 7),
    "a custom type": (24, "B", 255),
    "no image field": (24, "B", 1),
    "a float for an image": (24, "B", 0),
    "two images and no label": (24 + 1041, "B", 2),
    "mode 2": (ROWS, "B", 2),
    "mode 255": (ROWS + 32, "B", 255),
    "raw, but not of this size": (ROWS, "B", 1),
    "place 0 in a row": (ROWS + 5, "Q", 0),
    "place of another in a row, off by one": (ROWS + 5, "Q", 4097),
    "place behind the file in a row": (ROWS + 5, "Q", 2**40),
    "place 2^63 in a row": (ROWS + 5, "Q", HUGE),
    "label -1": (ROWS + 16, "q", -1),
    "label -2^63": (ROWS + 16, "q", -HUGE),
    "label 2^40": (ROWS + 16, "q", 2**40),
    "label 2^63 - 1": (ROWS + 16, "q", HUGE - 1),
    "place 0 in the table": (TABLE_AT + 8, "Q", 0),
    "place in the rows in the table": (TABLE_AT + 8, "Q", ROWS),
    "place behind the file in the table": (TABLE_AT + 8, "Q", 2**40),
    "place 2^63 in the table": (TABLE_AT + 8, "Q", HUGE),
    "place 2^64 - 1 in the table": (TABLE_AT + 8, "Q", 2**64 - 1),
    "a sample up to the next and a byte": (TABLE_AT + 16, "Q", None),
    "a last sample into the table": (TABLE_AT + 4 * 24 + 16, "Q", 4096),
    "size 2^40": (TABLE_AT + 16, "Q", 2**40),
    "size 2^63": (TABLE_AT + 16, "Q", HUGE),
    "size 2^64 - 1": (TABLE_AT + 16, "Q", 2**64 - 1),
}


@pytest.mark.parametrize(("at", "form", "value"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, at, form, value):
    path = small_file(tmp_path)
    if value is None:
        value = len(jpeg(PHOTOS[0])) + 1
    refused(changed(path, at, form, value))


def test_a_place_within_a_longer_one_is_refused_behind_an_empty_one(tmp_path):
    path = small_file(tmp_path)
    first, size = struct.unpack_from("<QQ", path.read_bytes(), TABLE_AT + 8)
    second = struct.unpack_from("<QQ", path.read_bytes(), TABLE_AT + 24 + 8)[0]
    assert second == first + size
    extra = struct.pack("<QQQ", 9, first + 10, 0)  # nothing, in the middle of the first
    path.write_bytes(path.read_bytes() + extra)
    with Beton(path) as found:
        assert len(found) == 5
    refused(changed(path, TABLE_AT + 16, "Q", size + 1), "over something else")


def test_an_empty_place_does_not_hide_the_sample_at_it(tmp_path):
    path = small_file(tmp_path)
    first, size = struct.unpack_from("<QQ", path.read_bytes(), TABLE_AT + 8)
    content = path.read_bytes()
    path.write_bytes(content[:TABLE_AT] + struct.pack("<QQQ", 0, first, 0) + content[TABLE_AT:])
    with Beton(path) as found:
        assert found.lengths[0] == size
        assert found.encoded(0) == jpeg(PHOTOS[0])


@pytest.mark.parametrize("size", [0, 1, 23])
def test_a_file_without_a_header_is_refused(tmp_path, size):
    (tmp_path / "x.beton").write_bytes(bytes(size))
    refused(tmp_path / "x.beton")


def test_a_file_of_zeros_is_an_unfinished_one(tmp_path):
    (tmp_path / "x.beton").write_bytes(bytes(100_000))
    refused(tmp_path / "x.beton", "unfinished")


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path, "cannot be read")
    refused(tmp_path / "missing.beton", "No such file")


@pytest.mark.parametrize("content", [b"<html>404 not found</html>" * 1000, b"\x89PNG\r\n\x1a\n" + bytes(5000)])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "x.beton").write_bytes(content)
    refused(tmp_path / "x.beton", "not a .beton")


def test_a_jpeg_that_does_not_decode_is_named(tmp_path):
    samples = [jpeg(PHOTOS[0]), jpeg(PHOTOS[1])[:100], b"text", jpeg(PHOTOS[3])]
    sizes = [*SIZES[:3], (SIZES[3][0] + 1, SIZES[3][1])]
    with Beton(write(tmp_path / "x.beton", samples, [0, 1, 1, 1], sizes, JPEG, SMALL)) as found:
        found.image(0)
        for i, word in ((1, "does not decode"), (2, "does not decode"), (3, "17x24 pixels instead of 17x25")):
            with pytest.raises(UserError, match=f"sample {i} .*{word}") as error:
                found.image(i)
            assert len(str(error.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_jpeg_that_says_to_be_enormous_is_refused_before_it_is_decoded(tmp_path):
    content = bytearray(jpeg(PHOTOS[0]))
    at = content.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", content, at, 13000, 13000)  # half a gigabyte of pixels, which Pillow only warns of
    path = write(tmp_path / "x.beton", [bytes(content)], [0], [SIZES[0]], JPEG, SMALL)
    with Beton(path) as found, pytest.raises(UserError, match="sample 0"):
        found.image(0)


def damaged_at_random(content, random):
    """Some bytes changed, in the tables more often than in the samples; or cut, or longer."""
    content = bytearray(content)
    regions = [(0, 24), (24, ROWS), (ROWS, ROWS + 5 * 32), (TABLE_AT, TABLE_AT + 5 * 24), (0, len(content))]
    for _ in range(random.integers(1, 4)):
        first, last = regions[random.integers(len(regions))]
        at = int(random.integers(first, min(last, len(content))))
        content[at] = random.choice(
            [0, 1, 0x7F, 0x80, 0xFF, content[at] ^ 1 << random.integers(8), random.integers(256)]
        )
    kind = random.integers(10)
    if kind == 0:
        del content[random.integers(TABLE_AT) :]
    elif kind == 1:
        content += random.bytes(random.integers(1, 100))
    return bytes(content)


def works_or_refuses(work):
    try:
        return work()
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("mode", [JPEG, RAW])
def test_random_damage_never_gets_past_the_reader(tmp_path, mode):
    path = small_file(tmp_path, mode)
    whole, random = path.read_bytes(), np.random.default_rng(mode)
    opened = 0
    for _ in range(FUZZED // 2):
        path.write_bytes(damaged_at_random(whole, random))
        found = works_or_refuses(lambda: Beton(path))
        if found is None:
            continue
        opened += 1
        with found:
            works_or_refuses(lambda found=found: found.class_names)
            for i in range(len(found)):
                works_or_refuses(lambda found=found, i=i: found.encoded(i))
                works_or_refuses(lambda found=found, i=i: found.image(i))
    assert opened > FUZZED // 20


# The manifest

NAMES = ["ant", "bee", "cat"]


def with_manifest(folder, text=None, name="x.beton", mode=JPEG, labels=LABELS, **others):
    path = small_file(folder, mode, name, labels)
    manifest_path(path).write_text(manifest_of(labels, NAMES, **others).dump() if text is None else text)
    return path


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    whole = manifest_of(
        LABELS, NAMES, titles=["Ant", "Bée", "Cat"], notes=["a note"],
        names=["a.jpg", "b b.jpg", "ü.jpg", os.fsdecode(b"\xff.jpg"), "e\n.jpg"],
        reencoded=[Changed(3, os.fsdecode(b"\xff.jpg"), "CMYK")], skipped=[Changed(-1, "f.jpg", "broken")],
    )  # fmt: skip
    path = with_manifest(tmp_path, whole.dump())
    assert manifest_path(path) == tmp_path / "x.manifest.json"
    assert read_manifest(manifest_path(path)) == whole
    with Beton(path) as found:
        assert found.manifest == whole
        assert found.class_names == NAMES
        assert [found.name(i) for i in range(5)] == whole.names


def test_without_a_manifest_classes_and_samples_are_numbers(tmp_path):
    with Beton(small_file(tmp_path)) as found:
        assert found.manifest is None
        assert found.class_names == ["0", "1", "2"]
        assert found.name(3) == "00000003"


def edited(**others):
    content = json.loads(manifest_of(LABELS, NAMES).dump())
    return json.dumps({key: value for key, value in (content | others).items() if value is not Ellipsis})


BAD_MANIFESTS = {
    "empty": "",
    "cut": manifest_of(LABELS, NAMES).dump()[:-30],
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "nested": "[" * 100_000,
    "no format": edited(format=...),
    "format 2": edited(format=2),
    "format '1'": edited(format="1\n2"),
    "images as text": edited(images="5"),
    "images as float": edited(images=5.0),
    "images 4": edited(images=4),
    "true as a count": edited(counts=[2, True, 2]),
    "a class without count": edited(counts=[2, 3]),
    "a count too many": edited(counts=[2, 1, 2, 0]),
    "a negative count": edited(counts=[8, -5, 2]),
    "counts of other files": edited(counts=[2, 2, 2]),
    "no classes": edited(class_names=[], counts=[]),
    "classes as numbers": edited(class_names=[0, 1, 2]),
    "two classes": edited(class_names=["ant", "bee"]),
    "titles as text": edited(titles="abc"),
    "a title too few": edited(titles=["Ant", "Bee"]),
    "a name too few": edited(names=["a"] * 4),
    "a name too many": edited(names=["a"] * 6),
    "names as numbers": edited(names=[1, 2, 3, 4, 5]),
    "names as text": edited(names="abcde"),
    "names none": edited(names=None),
    "names that no file can have": edited(names=["a", "b", "c\ud800", "d", "e"]),
    "a checksum too few": edited(crc32=[0] * 4),
    "checksums as text": edited(crc32=["0"] * 5),
    "no checksums": edited(crc32=...),
    "a source without a name": edited(source={"kind": "x"}),
    "a source that is text": edited(source="x"),
    "changes that are numbers": edited(reencoded=[1]),
    "changes of another kind": edited(skipped=[{"id": 1}]),
    "changes with a text for a number": edited(skipped=[{"id": "1", "source": "a", "reason": "b"}]),
    "a key too many": edited(colour="red"),
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_damaged_manifest_is_refused_in_one_line(tmp_path, text):
    path = with_manifest(tmp_path, text)
    with Beton(path) as found, pytest.raises(UserError, match=r"x\.manifest\.json") as error:
        found.class_names  # noqa: B018
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError):
        records_of(path)


def test_a_manifest_that_is_no_text_or_no_file_is_refused(tmp_path):
    path = with_manifest(tmp_path)
    manifest_path(path).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="damaged"):
        read_manifest(manifest_path(path))
    manifest_path(path).unlink()
    manifest_path(path).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(manifest_path(path))


def test_a_manifest_of_another_file_is_refused(tmp_path):
    path = with_manifest(tmp_path, manifest_of(LABELS[:-1], NAMES).dump())
    with Beton(path) as found, pytest.raises(UserError, match="another file, of 4 images"):
        found.name(0)


def test_a_label_outside_the_classes_of_the_manifest_is_refused(tmp_path):
    path = with_manifest(tmp_path)
    changed(path, ROWS + 4 * 32 + 16, "q", 3)
    with Beton(path) as found, pytest.raises(UserError, match="label 3 is not one of"):
        found.class_names  # noqa: B018


def test_random_damage_never_gets_past_the_manifest(tmp_path):
    path = with_manifest(tmp_path, titles=["A", "B", "C"], skipped=[Changed(-1, "f.jpg", "broken")])
    whole, random = manifest_path(path).read_bytes(), np.random.default_rng(0)
    for _ in range(FUZZED // 2):
        content = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            at = random.integers(len(content))
            content[at : at + random.integers(3)] = random.choice([b'"', b"-", b"9", b"[", b"}", b",", b"\\ud800", b""])
        manifest_path(path).write_bytes(bytes(content))
        works_or_refuses(lambda: records_of(path))


# As a source


@pytest.mark.parametrize("mode", [JPEG, RAW])
def test_a_file_is_a_source(tmp_path, mode):
    sums = [zlib.crc32(jpeg(pixels) if mode == JPEG else pixels.tobytes()) for pixels in PHOTOS]
    path = with_manifest(tmp_path, mode=mode, titles=["Ant", "Bee", "Cat"], notes=["a note"], crc32=sums)
    with_manifest(
        tmp_path, name="x.val.beton", mode=RAW, crc32=[zlib.crc32(pixels.tobytes()) for pixels in PHOTOS]
    )  # fmt: skip
    source = records_of(path)
    assert (source.kind, source.name, source.class_names) == ("beton", "set", NAMES)
    assert source.titles == ["Ant", "Bee", "Cat"]
    assert source.notes == ("a note",)
    for records, kind in ((source.train, mode), (source.val, RAW)):
        file = path if records is source.train else tmp_path / "x.val.beton"
        assert len(records) == 5
        assert records.labels.tolist() == LABELS
        some = records.take(np.array([4, 0, 3])).take(np.array([2, 0, 1]))  # 3, 4, 0
        moved = some.relabelled(np.array([9, 8, 7]))
        assert some.labels.tolist() == [2, 2, 0]
        assert moved.labels.tolist() == [9, 8, 7]
        for number, i in enumerate([3, 4, 0]):
            for part in (some, moved):
                assert part.name(number) == records.name(i) == f"{NAMES[LABELS[i]]}/{i}.jpg"
                assert part.where(number) == records.where(i)
                assert str(file) in part.where(number)
                if kind == RAW:
                    np.testing.assert_array_equal(part.content(number), PHOTOS[i])
                else:
                    assert part.content(number) == jpeg(PHOTOS[i])
                    assert part.extent(number).read() == jpeg(PHOTOS[i])


def test_a_file_alone_is_a_source_without_validation_images(tmp_path):
    source = records_of(small_file(tmp_path))
    assert source.val is None
    assert source.titles is None
    assert (source.name, source.class_names) == ("x", ["0", "1", "2"])


def test_validation_images_of_other_classes_are_refused(tmp_path):
    path = with_manifest(tmp_path)
    with_manifest(tmp_path, manifest_of(LABELS, ["ant", "bee", "cow"]).dump(), name="x.val.beton")
    with pytest.raises(UserError, match=r"in .*x\.beton but not in .*x\.val\.beton; .*in .*x\.val\.beton but not in"):
        records_of(path)


@pytest.mark.parametrize("text", [None, "no manifest"])
def test_a_validation_label_beyond_the_classes_is_refused(tmp_path, text):
    path = with_manifest(tmp_path) if text is None else small_file(tmp_path)
    small_file(tmp_path, name="x.val.beton", labels=[0, 1, 2, 3, 3])
    with pytest.raises(UserError, match=r"x\.val\.beton: has a label 3, x\.beton only 3 classes"):
        records_of(path)


def test_fewer_classes_among_the_validation_images_are_taken(tmp_path):
    path = small_file(tmp_path)
    small_file(tmp_path, name="x.val.beton", labels=[0, 0, 0, 0, 1])
    assert records_of(path).val.labels.tolist() == [0, 0, 0, 0, 1]


def test_damaged_validation_images_are_named(tmp_path):
    path = small_file(tmp_path)
    (tmp_path / "x.val.beton").write_bytes(bytes(5000))
    with pytest.raises(UserError, match=r"x\.val\.beton: an unfinished"):
        records_of(path)


if __name__ == "__main__":
    as_ffcv(Path(sys.argv[1]))


def test_two_files_whose_labels_do_not_mean_the_same_are_no_data_set(tmp_path):
    """By their names, which the manifests have; and a file says of itself what a process that it is sent to needs."""
    write(tmp_path / "x.beton", [jpeg(np.zeros((8, 8, 3), np.uint8))] * 2, [0, 1], [(8, 8)] * 2, JPEG, SMALL)
    manifest_path(tmp_path / "x.beton").write_text(manifest_of([0, 1], ["ant", "bee"]).dump())
    write(tmp_path / "y.beton", [jpeg(np.zeros((8, 8, 3), np.uint8))] * 2, [0, 1], [(8, 8)] * 2, JPEG, SMALL)
    manifest_path(tmp_path / "y.beton").write_text(manifest_of([0, 1], ["ant", "cat"]).dump())
    with pytest.raises(UserError, match=r"class bee is in .*x.beton but not in .*y.beton; cat is in .*y.beton but not"):
        open_source(tmp_path / "x.beton", val=str(tmp_path / "y.beton"))
    assert len(open_source(tmp_path / "x.beton", val=str(tmp_path / "x.beton")).val) == 2
    with pytest.raises(UserError, match="must be one, too"):
        open_source(tmp_path / "x.beton", val=str(tmp_path))
    sent = pickle.loads(pickle.dumps(Beton(tmp_path / "x.beton")))
    assert (repr(sent), sent.labels.tolist()) == (f"Beton({str(tmp_path / 'x.beton')!r}, 2 images)", [0, 1])
