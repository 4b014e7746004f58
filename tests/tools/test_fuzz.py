"""Damaged sources: a conversion of one is refused in a line, or ends in a file that is good and holds what Pillow sees.

Short counts here; FASTIL_SOAK=1 (make soak) has the full ones. A case is made of its kind and number alone.
"""

import dataclasses
import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import tarfile
import warnings
from collections import defaultdict
from functools import partial

import numpy as np
import pytest
from conftest import SOAK
from converting import as_stored, encoded, grey_of, photo, rgb_of_cmyk, run, turned, write, zoo
from PIL import Image
from scipy.io import savemat

from fastil.data.formats import cifar, detect
from fastil.data.formats.beton import Beton
from fastil.data.formats.manifest import manifest_path, read_manifest
from fastil.errors import UserError
from fastil.tools.reporting import Reporter
from fastil.tools.verify import verify

CASES = 1000 if SOAK else 60
SECONDS = 20  # of a processor, for a case
ZOO = {name: kind.content for name, kind in zoo().items()}
TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
WNIDS = ["n01440764", "n02110341"]
ROWS = 24 + 3 * 1041  # of a .beton: where the rows begin


# Small sources. Each is a folder; the path to convert lies in it.


def jpegs(count):
    return [encoded(photo(20, 26, seed)) for seed in range(count)]


def tar_bytes(files):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def animals():
    """An image of every kind in two classes, two of them for validation."""
    files = {f"train/{'ab'[n % 2]}/{name}": content for n, (name, content) in enumerate(ZOO.items())}
    return files | {f"val/{c}/1.jpg": content for c, content in zip("ab", jpegs(2), strict=True)}


def folder(root):
    return write(root, animals())


def folder_tar(root):
    write(root, {"set.tar": tar_bytes(animals())})
    return root / "set.tar"


def devkit():
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    names.append("num_train_images")
    none, some = np.zeros((1, 0)), np.array([[1.0, 2.0]])
    rows = [
        (1, WNIDS[1], "dog", "a dog", 0, none, 0, 3), (2, WNIDS[0], "tench", "a fish", 0, none, 0, 3),
        (3, "n00001740", "entity", "all", 2, some, 1, 0),
    ]  # fmt: skip
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in names])
    for row, values in enumerate(rows):
        for name, value in zip(names, values, strict=True):
            synsets[row, 0][name] = value if isinstance(value, str | np.ndarray) else np.array([[float(value)]])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    home = "ILSVRC2012_devkit_t12/data"
    truth = b"2\n1\n1\n2\n"
    return gzip.compress(
        tar_bytes({f"{home}/meta.mat": meta.getvalue(), f"{home}/ILSVRC2012_validation_ground_truth.txt": truth})
    )


def ilsvrc(root):
    photos = jpegs(10)
    archives = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{n}.JPEG": photos[3 * k + n] for n in range(3)})
        for k, wnid in enumerate(WNIDS)
    }
    val = {f"ILSVRC2012_val_{n + 1:08d}.JPEG": photos[6 + n] for n in range(4)}
    return write(root, {TRAIN: tar_bytes(archives), VAL: tar_bytes(val), DEVKIT: devkit()})


def idx(root):
    noise = np.random.default_rng(0)
    for prefix, count in (("train", 9), ("t10k", 6)):
        images = noise.integers(0, 256, (count, 5, 7), np.uint8)
        head = bytes([0, 0, 8, 3]) + b"".join(struct.pack(">I", size) for size in images.shape)
        labels = bytes([0, 0, 8, 1]) + struct.pack(">I", count) + bytes(n % 3 for n in range(count))
        write(root, {f"{prefix}-images-idx3-ubyte": head + images.tobytes(), f"{prefix}-labels-idx1-ubyte": labels})
    return root


def cifar_rows(count):
    return np.random.default_rng(count).integers(0, 256, (count, 3072), np.uint8), [n % 10 for n in range(count)]


def cifar_pickle(root):
    names = {b"label_names": [f"class{n}".encode() for n in range(10)]}
    files = {"batches.meta": pickle.dumps(names, protocol=2)}
    for name, count in (("data_batch_1", 20), ("test_batch", 10)):
        rows, labels = cifar_rows(count)
        files[name] = pickle.dumps({b"data": rows, b"labels": labels}, protocol=2)
    return write(root, {f"cifar-10-batches-py/{name}": content for name, content in files.items()})


def cifar_binary(root):
    files = {"batches.meta.txt": "".join(f"class{n}\n" for n in range(10)).encode()}
    for name, count in (("data_batch_1.bin", 20), ("test_batch.bin", 10)):
        rows, labels = cifar_rows(count)
        files[name] = b"".join(bytes([label]) + row.tobytes() for row, label in zip(rows, labels, strict=True))
    return write(root, {f"cifar-10-batches-bin/{name}": content for name, content in files.items()})


def parquet(root):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root.mkdir()
    for split, count in (("train", 9), ("validation", 4)):
        images = [{"bytes": content, "path": f"{split}{n}.jpg"} for n, content in enumerate(jpegs(count))]
        table = pa.table({"image": images, "label": [n % 2 for n in range(count)]})
        features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=4)
    return root


def webdataset(root):
    for split, count in (("train", 9), ("val", 4)):
        files = {}
        for n, content in enumerate(jpegs(count)):
            label = {"cls": str(n % 2).encode()} if n % 3 else {"json": json.dumps({"label": n % 2}).encode()}
            files |= {f"{n:04d}.{end}": part for end, part in ({"jpg": content} | label).items()}
        write(root, {f"{split}-0000.tar": tar_bytes(files)})
    return root


def beton(root, mode="auto"):
    source = write(root.with_name("source"), animals())
    root.mkdir()
    run(source, root / "set.beton", mode=mode, max_side=40)
    return root / "set.beton"


SOURCES = {
    "folder": folder, "folder-tar": folder_tar, "ilsvrc": ilsvrc, "idx": idx, "cifar10 pickles": cifar_pickle,
    "cifar10 binary": cifar_binary, "parquet": parquet, "webdataset": webdataset, "beton": beton,
    "beton of pixels": partial(beton, mode="raw"),
}  # fmt: skip


# What other readers find in a source: (name, class, content) of the samples of a split. A class is None where it is too
# much to find out.


def members(content):
    """Name to bytes of the files of a tar."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            if member.isfile():
                name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                found[name] = tar.extractfile(member).read()
    return found


def of_folder(path, split):
    for file in sorted((path / split).rglob("*")):
        if file.is_file():
            yield str(file.relative_to(path)), file.parent.name, file.read_bytes()


def of_folder_tar(path, split):
    for name, content in members(path.read_bytes()).items():
        yield name, name.split("/")[1] if name.count("/") > 1 else None, content


def of_ilsvrc(path, split):
    if split == "val":
        yield from ((name, None, content) for name, content in members((path / VAL).read_bytes()).items())
        return
    for archive, content in members((path / TRAIN).read_bytes()).items():
        for name, image in members(content).items():
            yield f"{archive}/{name}", archive.removesuffix(".tar"), image


def of_idx(path, split):
    prefix = "train" if split == "train" else "t10k"
    images = (path / f"{prefix}-images-idx3-ubyte").read_bytes()
    count, height, width = struct.unpack_from(">III", images, 4)
    labels = (path / f"{prefix}-labels-idx1-ubyte").read_bytes()[8:]
    pixels = np.frombuffer(images, np.uint8, count * height * width, 16).reshape(count, height, width)
    for n in range(count):
        yield f"{n:06d}", str(labels[n]), grey_of(pixels[n])


class OnlyArrays(pickle.Unpickler):
    """Enough for the pickles above, whatever became of them."""

    def find_class(self, module, name):
        if name not in ("_reconstruct", "ndarray", "dtype", "encode", "_frombuffer"):
            raise pickle.UnpicklingError(name)
        return super().find_class(module, name)


def of_cifar_pickles(path, split):
    name = {"train": "data_batch_1", "val": "test_batch"}[split]
    batch = OnlyArrays(io.BytesIO((path / "cifar-10-batches-py" / name).read_bytes()), encoding="bytes").load()
    rows = np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for n, (pixels, label) in enumerate(zip(rows, batch[b"labels"], strict=True)):
        yield f"{n:06d}", int(label), pixels


def of_cifar_binary(path, split):
    name = {"train": "data_batch_1.bin", "val": "test_batch.bin"}[split]
    raw = np.fromfile(path / "cifar-10-batches-bin" / name, np.uint8).reshape(-1, 3073)
    for n, row in enumerate(raw):
        yield f"{n:06d}", int(row[0]), row[1:].reshape(3, 32, 32).transpose(1, 2, 0)


def of_parquet(path, split):
    import pyarrow.parquet as pq

    (file,) = path.glob(f"{split}*.parquet")
    table = pq.read_table(file)
    for row in table.to_pylist():
        yield row["image"]["path"], int(row["label"]), row["image"]["bytes"]


def of_webdataset(path, split):
    parts = members((path / f"{split}-0000.tar").read_bytes())
    for name, content in parts.items():
        key, _, end = name.partition(".")
        if end in ("cls", "json"):
            continue
        label = int(parts[f"{key}.cls"]) if f"{key}.cls" in parts else json.loads(parts[f"{key}.json"])["label"]
        yield name, label, content


def of_beton(path, split):
    raw = (path if split == "train" else path.with_name("set.val.beton")).read_bytes()
    count, table = struct.unpack_from("<QQ", raw, 8)
    sizes = {}
    for at in range(table, len(raw), 24):
        _, place, size = struct.unpack_from("<QQQ", raw, at)
        sizes[place] = max(size, sizes.get(place, 0))
    for n in range(count):
        mode, width, height, place, label = struct.unpack_from("<BHHQ3xq", raw, ROWS + 32 * n)
        content = raw[place : place + sizes[place]]
        yield None, label, np.frombuffer(content, np.uint8).reshape(height, width, 3) if mode else content


FOUND = {
    "folder": of_folder, "folder-tar": of_folder_tar, "ilsvrc": of_ilsvrc, "idx": of_idx,
    "cifar10 pickles": of_cifar_pickles, "cifar10 binary": of_cifar_binary, "parquet": of_parquet,
    "webdataset": of_webdataset, "beton": of_beton, "beton of pixels": of_beton,
}  # fmt: skip


def upright_rgb(content):
    """Pixels by Pillow, turned and converted by this test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content))
        tag = 1
        if image.format != "TIFF":  # which Pillow turns by itself
            try:
                tag = image.getexif().get(0x0112, 1)
            except Exception:  # a damaged block is no block
                tag = 1
        mode, pixels = image.mode, np.asarray(image)
        if mode == "P":
            pixels = np.asarray(image.convert("RGBA"))
        elif mode == "LA":
            pixels = grey_of(pixels[..., 0])
        elif mode == "L":
            pixels = grey_of(pixels)
        elif mode == "1":
            pixels = grey_of(pixels * np.uint8(255))
        elif mode.startswith("I"):
            pixels = grey_of((pixels.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
        elif mode == "CMYK":
            pixels = rgb_of_cmyk(pixels)
        elif mode not in ("RGB", "RGBA", "RGBX"):
            pixels = np.asarray(image.convert("RGB"))
    return turned(pixels[..., :3], tag if tag in range(1, 9) else 1)


def is_right(stored, raw, content):
    """Whether a sample is what its source holds."""
    if isinstance(content, np.ndarray):
        return stored == (content.tobytes() if raw else as_stored(content))
    try:
        if raw or stored != content:
            pixels = upright_rgb(content)
            return stored == (pixels.tobytes() if raw else as_stored(pixels))
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return (image.format, image.mode) == ("JPEG", "RGB")
    except Exception:  # one that was left out, of the same class
        return False


def check(path, kind, source, split):
    """That a file is good and every sample in it right."""
    assert verify(path, None, 1, Reporter()) == []
    by_name = defaultdict(list)
    for n, (name, label, content) in enumerate(FOUND[kind](source, split)):
        by_name[name].append((label, content, n))
    manifest = read_manifest(manifest_path(path))
    used = set()
    with Beton(path) as file:
        for i in range(len(file)):
            name, label = manifest.names[i], int(file.labels[i])
            same = [
                n
                for known, content, n in by_name[None if kind.startswith("beton") else name]
                if n not in used
                and known in (None, label, manifest.class_names[label])
                and is_right(file.encoded(i), file.mode == "raw", content)
            ]
            assert same, f"sample {i} ({name}) is not in the source"
            used.add(same[0])


# Damage


def damaged(content, moments):
    """With a few bytes changed, gone, or come in between; mostly where there are not only zeros."""
    content = bytearray(content)
    for _ in range(1 + moments.randrange(3)):
        filled = np.flatnonzero(np.frombuffer(bytes(content), np.uint8))
        if not len(filled):
            break
        at = int(filled[moments.randrange(len(filled))])
        if moments.randrange(3) == 0:  # headers are at the front and the end, and at blocks
            at = moments.choice([moments.randrange(600), -1 - moments.randrange(600), at // 512 * 512]) % len(content)
        length = moments.choice([1, 1, 2, 4, 8, 100, 512, 2000])
        way = moments.randrange(8)
        if way < 3:
            content[at] ^= 1 << moments.randrange(8)
        elif way == 3:
            content[at] = moments.choice([0, 1, 127, 128, 255, 48, 57])
        elif way == 4:
            del content[at:]
        elif way == 5:
            content[at:at] = moments.choice([bytes(length), b"\xff" * length, moments.randbytes(length)])
        elif way == 6:
            del content[at : at + length]
        else:
            other = moments.randrange(len(content))
            a, b = sorted((at, other))
            length = min(length, b - a, len(content) - b)
            content[a : a + length], content[b : b + length] = content[b : b + length], content[a : a + length]
    return bytes(content)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """By kind: a folder, and the path in it to convert."""
    made = {}

    def make(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp("intact") / "set"
            made[kind] = root, SOURCES[kind](root).relative_to(root)
        return made[kind]

    return make


@pytest.fixture
def small_cifar(monkeypatch):
    """20 and 10 images instead of 50,000 and 10,000, with checksums that nobody compares."""
    small = dataclasses.replace(
        cifar.CIFAR10, train=(cifar.File("data_batch_1", "", 20),), test=cifar.File("test_batch", "", 10),
        binary_train=("data_batch_1.bin",),
    )  # fmt: skip
    kind = detect.Kind(
        "", lambda path, asked: detect._open_cifar(small, path, dataclasses.replace(asked, verify=False))
    )
    monkeypatch.setitem(detect.KINDS, "cifar10", kind)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Hang(BaseException):
    """What no reader of images can swallow."""


@pytest.fixture(autouse=True)
def no_hang():
    def ring(number, frame):
        raise Hang(f"{SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, ring)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("kind", SOURCES)
def test_an_intact_source_is_right(intact, small_cifar, tmp_path, kind):
    """So that the check below means something."""
    root, path = intact(kind)
    for split, file in zip(("train", "val"), run(root / path, tmp_path / "x.beton"), strict=True):
        check(file, kind, root / path, split)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_damaged_source_is_refused_or_right(intact, small_cifar, tmp_path, capfd, kind):
    root, path = intact(kind)
    ended = refused = 0
    for number in range(CASES // len(SOURCES)):
        moments, case = random.Random(f"{kind} {number}"), f"{kind}, case {number}"
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root, work / "set")
        files = sorted(file for file in (work / "set").rglob("*") if file.is_file())
        for file in moments.sample(files, min(len(files), moments.choice([1, 1, 1, 2]))):
            file.write_bytes(damaged(file.read_bytes(), moments))
        options = moments.choice([{}, {"on_corrupt": "skip"}, {"on_corrupt": "skip", "mode": "raw"}])
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with warnings.catch_warnings(record=True) as noise:
                warnings.simplefilter("always")
                outputs = run(work / "set" / path, work / "x.beton", **options)
        except UserError as error:
            outputs, message, refused = [], str(error), refused + 1
        except (Exception, Hang) as error:
            raise AssertionError(case) from error
        else:
            message = ""
        signal.setitimer(signal.ITIMER_PROF, 0)
        assert not noise, (case, [str(one.message) for one in noise])
        assert " at 0x" not in message, (case, message)
        assert len(message) < 2000, (case, message)
        assert capfd.readouterr().err == "", case
        for split, file in zip(("train", "val"), outputs, strict=False):
            try:
                check(file, kind, work / "set" / path, split)
            except BaseException as error:
                raise AssertionError(case) from error
            ended += 1
    print(f"{kind}: {ended} files of damaged sources are good, {refused} sources were refused")
    assert (ended and refused) or CASES < 100
