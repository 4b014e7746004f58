"""Small files that claim to be large, and long lists: what a source takes of the memory, in a process of its own."""

import gzip
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import SOAK, encoded, environment
from converting import run as convert
from converting import tree, write
from making import png, refused, tar_bytes
from PIL import Image

MOST_MEMORY = 600  # MiB, of a whole process

# Sizes that are promised


def idx_header(*sizes):
    return bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)


def idx_set(root, images):
    """Files of two images each, but for the training images."""
    root.mkdir(exist_ok=True)
    for prefix in ("train", "t10k"):
        raw = {"images-idx3": idx_header(2, 4, 4) + bytes(32), "labels-idx1": idx_header(2) + bytes([0, 1])}
        for part, content in raw.items():
            (root / f"{prefix}-{part}-ubyte.gz").write_bytes(gzip.compress(content))
    (root / "train-images-idx3-ubyte.gz").write_bytes(images)
    return root


def test_an_idx_file_that_promises_more_than_there_are_labels_is_not_read(tmp_path):
    refused("2000000 images but 2 labels", path=idx_set(tmp_path, gzip.compress(idx_header(2_000_000, 32, 32))))


@pytest.mark.parametrize("more", [1, 1 << 20])
def test_an_idx_file_that_holds_more_than_it_promises_is_refused(tmp_path, more):
    path = idx_set(tmp_path, gzip.compress(idx_header(2, 4, 4) + bytes(32 + more)))
    refused("more bytes of data, its header promises 32", path=path)


MEASURED = """
import sys
from pathlib import Path
from fastil.errors import UserError

def peak():  # KiB; what getrusage counts begins with the process that this one was forked from
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

try:
    {work}
except UserError as error:
    print(error)
print(peak() // 1024)
"""


def peak(work, *arguments):
    """MiB that a process of its own took at most, and what it printed."""
    code = MEASURED.format(work=work)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    return int(last), "\n".join(said)


def test_a_gzip_bomb_is_read_as_far_as_its_header_promises(tmp_path):
    """The bomb unpacks to 2 GiB in `make soak`, otherwise to 1 GiB."""
    size = 2 << 30 if SOAK else 1 << 30
    block, bomb = gzip.compress(bytes(1 << 24), 9), tmp_path / "train-images-idx3-ubyte.gz"
    idx_set(tmp_path, gzip.compress(idx_header(2, 4, 4)) + block * (size >> 24))
    assert bomb.stat().st_size < 3 << 20
    work = "from fastil.data.formats.detect import open_source; open_source(Path(sys.argv[1]))"
    most, said = peak(work, tmp_path)
    assert "more bytes of data, its header promises 32" in said
    assert most < 200


THIN = {"a PNG of 1 x 100,000": ("PNG", (1, 100_000)), "a PNG of 100,000 x 1": ("PNG", (100_000, 1)),
        "a JPEG of 1 x 65,000": ("JPEG", (1, 65_000))}  # fmt: skip


@pytest.mark.parametrize(("kind", "size"), THIN.values(), ids=THIN)
def test_a_thin_image_does_not_fill_the_memory_of_a_run(tmp_path, kind, size):
    """274 bytes took 2.1 GB at 32 pixels."""
    folder = write(tmp_path, tree(cat=(".png", 1), dog=(".png", 1)))
    (folder / "train/cat/thin.png").write_bytes(encoded(Image.new("RGB", size, (9, 99, 200)), kind))
    work = (
        "from fastil.data import DataConfig, load_dataset; "
        "found = load_dataset(DataConfig(dataset='folder', data=sys.argv[1], size=224)); "
        "print(found.train.images[1, 100, 100].tolist())"
    )
    most, said = peak(work, folder)
    assert most < MOST_MEMORY
    assert np.abs(np.array(eval(said)) - (9, 99, 200)).max() < 4


@pytest.mark.parametrize("backend", ["threads", "reference"])
def test_a_thin_image_does_not_fill_the_memory_of_a_streamed_run(tmp_path, backend):
    """A JPEG of 1 x 65,000 would have taken 12 GB."""
    thin = encoded(Image.new("RGB", (1, 65_000), (9, 99, 200)))
    files = {f"train/{name}/{i}.jpg": thin for name in "ab" for i in range(2)}
    convert(write(tmp_path / "in", files), tmp_path / "x.beton")
    work = (
        "import numpy as np, torch; from fastil.data import make_loader; from fastil.data.formats.beton import Beton; "
        "from fastil.plan import Transform; "
        "shown = Transform(224, 224, 0, False, (0., 0., 0.), (1., 1., 1.), resize=256); "
        "loader = make_loader(Beton(sys.argv[1]), sys.argv[2], shown, 'cpu'); images = loader.whole(np.arange(4)); "
        "print((images[:, :, 100, 100] * 255).round().int().tolist()); loader.close()"
    )
    most, said = peak(work, tmp_path / "x.beton", backend)
    assert most < MOST_MEMORY
    assert np.abs(np.array(eval(said)) - (9, 99, 200)).max() < 4


def test_many_samples_of_webdataset_take_little_memory(tmp_path):
    """1.5 kB each."""
    count, content = 150_000 if SOAK else 15_000, png(1)
    member = tar_bytes({"x": content})[512:-1024].rstrip(b"\0").ljust(-(-len(content) // 512) * 512, b"\0")
    with open(tmp_path / "train-0.tar", "wb") as file:
        for i in range(count):
            for suffix, size, body in (("png", len(content), member), ("cls", 1, b"%d" % (i % 10) + bytes(511))):
                info = tarfile.TarInfo(f"n0144{i % 10}/{i:08d}.{suffix}")
                info.size = size
                file.write(info.tobuf(tarfile.USTAR_FORMAT) + body)
        file.write(bytes(1024))
    work = (
        "from fastil.data.formats.detect import open_source; "
        "begun = peak(); source = open_source(Path(sys.argv[1])); "
        "print(len(source.train), (peak() - begun) * 1024 / len(source.train))"
    )
    most, said = peak(work, tmp_path)
    found, each = said.split()
    assert int(found) == count
    assert float(each) < 700  # bytes
    assert most < MOST_MEMORY
