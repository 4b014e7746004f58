"""Digits, idx files, and what every source is checked for."""

import gzip
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fastil.data import DataConfig, Dataset, Split, load_dataset, published, sources
from fastil.errors import UserError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
HEIGHT, WIDTH = 3, 5


def idx_bytes(array, magic=None):
    head = magic or bytes([0, 0, 8, array.ndim])
    return head + b"".join(struct.pack(">I", size) for size in array.shape) + array.astype(np.uint8).tobytes()


def images_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH), dtype=np.uint8)


def write_idx(folder, train_labels=(0, 1, 2, 1), val_labels=(2, 0, 1), gz=False, **replaced):
    """The four files, or with NAME=bytes another content for one of them (dashes as underscores)."""
    parts = []
    for labels in (train_labels, val_labels):
        parts += [idx_bytes(images_of(len(labels), len(labels))), idx_bytes(np.array(labels, dtype=np.uint8))]
    for name, raw in zip(FILES, parts, strict=True):
        raw = replaced.get(name.replace("-", "_"), raw)
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(raw) if gz else raw)


def load_idx(folder):
    return load_dataset(DataConfig(dataset="idx", data=str(folder)))


def one_line(error):
    return "\n" not in str(error.value)


# Digits


def test_digits_give_every_fifth_image_of_a_class_to_the_test_set_and_all_others_to_training():
    bunch = load_digits()
    rows, seen = {"train": [], "val": []}, Counter()
    for row, label in enumerate(bunch.target):
        seen[label] += 1
        rows["val" if seen[label] % 5 == 0 else "train"].append(row)
    dataset = load_dataset(DataConfig(dataset="digits"))
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        sixteenths = bunch.images[rows[name]].astype(np.int64)
        expected = (sixteenths * 255 + 8) // 16  # 0 to 16 becomes 0 to 255, rounded
        assert split.images.shape == (len(rows[name]), 8, 8, 3)
        for channel in range(3):
            np.testing.assert_array_equal(split.images[..., channel], expected)
        np.testing.assert_array_equal(split.labels, bunch.target[rows[name]])
    assert dataset.class_names == [str(name) for name in bunch.target_names]


# idx


@pytest.mark.parametrize("gz", [False, True])
def test_idx_files_are_read_pixel_by_pixel(tmp_path, gz):
    write_idx(tmp_path, (0, 1, 2, 1), (2, 0, 1), gz=gz)
    dataset = load_idx(tmp_path)
    for split, labels in ((dataset.train, [0, 1, 2, 1]), (dataset.val, [2, 0, 1])):
        body = images_of(len(labels), len(labels)).tobytes()
        assert split.images.shape == (len(labels), HEIGHT, WIDTH, 3)
        assert split.images.dtype == np.uint8
        for n, y, x, c in np.ndindex(split.images.shape):
            assert split.images[n, y, x, c] == body[(n * HEIGHT + y) * WIDTH + x]
        assert split.labels.tolist() == labels
        assert split.labels.dtype == np.int64
    assert dataset.class_names == ["0", "1", "2"]


def test_val_same_of_idx_files_is_the_training_images_and_another_val_is_refused(tmp_path):
    write_idx(tmp_path)
    same = load_dataset(DataConfig(dataset="idx", data=str(tmp_path), val="same"))
    assert same.val.sha256 == same.train.sha256
    with pytest.raises(UserError, match="brings its own validation images"):
        load_dataset(DataConfig(dataset="idx", data=str(tmp_path), val=str(tmp_path)))


def test_plain_and_gzipped_idx_files_may_be_mixed(tmp_path):
    write_idx(tmp_path)
    raw = (tmp_path / FILES[0]).read_bytes()
    (tmp_path / FILES[0]).unlink()
    (tmp_path / (FILES[0] + ".gz")).write_bytes(gzip.compress(raw))
    np.testing.assert_array_equal(load_idx(tmp_path).train.images[..., 1], images_of(4, 4))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_idx_file_is_named(tmp_path, name):
    write_idx(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        load_idx(tmp_path)


IMAGES, LABELS = idx_bytes(images_of(4)), idx_bytes(np.array([0, 1, 2, 1]))
DAMAGED = {
    "images cut short": (FILES[0], IMAGES[:-1]),
    "labels cut short": (FILES[1], LABELS[:-1]),
    "images too long": (FILES[0], IMAGES + b"\0"),
    "cut inside the header": (FILES[0], IMAGES[:15]),
    "empty": (FILES[1], b""),
    "labels where images belong": (FILES[0], LABELS),
    "images where labels belong": (FILES[1], IMAGES),
    "floats": (FILES[0], bytes([0, 0, 13, 3]) + IMAGES[4:]),
    "first byte not zero": (FILES[0], b"\1" + IMAGES[1:]),
    "text": (FILES[0], b"<html>404 not found</html>"),
    "sizes whose product wraps around to 0": (FILES[0], IMAGES[:4] + struct.pack(">III", 2**31, 2**31, 4)),
}  # fmt: skip


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(("name", "raw"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_idx_file_is_named(tmp_path, name, raw, gz):
    write_idx(tmp_path, gz=gz, **{name.replace("-", "_"): raw})
    with pytest.raises(UserError, match=name) as error:
        load_idx(tmp_path)
    assert one_line(error)


def damage(raw, kind):
    if kind == "cut short":
        return raw[:-12]
    if kind == "not gzip at all":
        return b"plain bytes"
    changed = bytearray(raw)
    if kind == "wrong checksum":
        changed[-5] ^= 1
    else:  # the deflate stream itself
        changed[10] = 0xFF  # a block of a type that does not exist
    return bytes(changed)


@pytest.mark.parametrize("kind", ["cut short", "not gzip at all", "wrong checksum", "damaged stream"])
def test_a_damaged_gzip_file_is_named(tmp_path, kind):
    write_idx(tmp_path, gz=True)
    path = tmp_path / (FILES[0] + ".gz")
    # Repetitive content, for noise would be stored as it is and only the checksum could notice.
    path.write_bytes(damage(gzip.compress(idx_bytes(np.tile(np.arange(250), (4, HEIGHT, 1)))), kind))
    with pytest.raises(UserError, match=path.name):
        load_idx(tmp_path)


@pytest.mark.parametrize("prefix", ["train", "t10k"])
def test_a_different_number_of_images_and_labels_is_refused(tmp_path, prefix):
    write_idx(tmp_path, **{f"{prefix}_labels_idx1_ubyte": idx_bytes(np.array([0, 1, 2, 0, 1]))})
    with pytest.raises(UserError, match=f"{prefix}-images-idx3-ubyte: [34] images but 5 labels"):
        load_idx(tmp_path)


@pytest.mark.parametrize("prefix", ["train", "t10k"])
def test_idx_files_without_a_single_image_are_refused(tmp_path, prefix):
    none = {"images_idx3": idx_bytes(images_of(0)), "labels_idx1": idx_bytes(np.zeros(0))}
    write_idx(tmp_path, **{f"{prefix}_{part}_ubyte": raw for part, raw in none.items()})
    with pytest.raises(UserError):
        load_idx(tmp_path)


def test_train_and_test_images_of_different_sizes_are_refused(tmp_path):
    # The loader crops and pads but does not resize: it would silently cut the larger ones.
    write_idx(tmp_path, t10k_images_idx3_ubyte=idx_bytes(np.zeros((3, HEIGHT + 2, WIDTH), dtype=np.uint8)))
    with pytest.raises(UserError, match="size"):
        load_idx(tmp_path)


@pytest.mark.parametrize(
    ("train", "val", "complaint"),
    [
        ((0, 2, 2), (0, 2), "train has no image of class 1"),
        ((0, 1, 2), (0, 2), "val has no image of class 1"),
        ((0, 1), (0, 1, 2), "val has labels outside its 2 classes"),
        ((0, 0), (0,), "only one class"),
    ],
)
def test_labels_that_do_not_fit_the_classes_are_refused(tmp_path, train, val, complaint):
    write_idx(tmp_path, train, val)
    with pytest.raises(UserError, match=complaint):
        load_idx(tmp_path)


def test_idx_needs_a_path():
    with pytest.raises(UserError, match="--data"):
        load_dataset(DataConfig(dataset="idx"))


@pytest.mark.parametrize("dataset", ["idx", "cifar10", "cifar100", "folder", "fashion-mnist"])
@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_path_that_is_no_folder_is_named(tmp_path, dataset, kind):
    path = tmp_path / "place"
    if kind == "a file":
        path.write_bytes(b"archive")
    with pytest.raises(UserError, match=str(path)):
        load_dataset(DataConfig(dataset=dataset, data=str(path)))


# Fashion-MNIST


def test_fashion_mnist_names_the_package_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "nowhere")
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load_dataset(DataConfig(dataset="fashion-mnist"))


def test_fashion_mnist_is_read_from_data_with_its_ten_class_names(tmp_path):
    write_idx(tmp_path, tuple(range(10)), tuple(range(9, -1, -1)))
    dataset = load_dataset(DataConfig(dataset="fashion-mnist", data=str(tmp_path), verify=False))
    # The order of the authors' table of labels.
    assert [name.split()[-1] for name in dataset.class_names] == [
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
    ]  # fmt: skip
    assert dataset.val.labels.tolist() == list(range(9, -1, -1))


@pytest.mark.skipif(not sources.FASHION_MNIST.exists(), reason="apt-get install dataset-fashion-mnist")
def test_the_installed_fashion_mnist_is_whole():
    dataset = load_dataset(DataConfig(dataset="fashion-mnist"))
    for prefix, split, per_class in (("train", dataset.train, 6000), ("t10k", dataset.val, 1000)):
        assert split.images.shape == (10 * per_class, 28, 28, 3)
        assert np.bincount(split.labels).tolist() == [per_class] * 10
        with gzip.open(sources.FASHION_MNIST / f"{prefix}-labels-idx1-ubyte.gz") as file:
            assert file.read()[8:] == split.labels.astype(np.uint8).tobytes()
        with gzip.open(sources.FASHION_MNIST / f"{prefix}-images-idx3-ubyte.gz") as file:
            pixels = file.read()[16:]
        for row in (0, 1, per_class, 10 * per_class - 1):
            for channel in range(3):
                assert split.images[row, ..., channel].tobytes() == pixels[row * 784 : (row + 1) * 784]


# What holds for every source


def test_a_negative_label_is_refused(monkeypatch):
    images = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    split = Split(images, np.array([0, 1, -1]))
    monkeypatch.setitem(sources.SOURCES, "digits", lambda config: Dataset("set", ["a", "b"], split, split))
    with pytest.raises(UserError, match="labels outside"):
        load_dataset(DataConfig(dataset="digits"))


def test_ids_of_a_class_are_its_rows_in_ascending_order():
    labels = np.random.default_rng(0).integers(0, 4, 50)
    labels[labels == 2] = 3  # a class without images
    split = Split(np.zeros((50, 1, 1, 3), dtype=np.uint8), labels)
    for class_id in range(4):
        expected = [row for row, label in enumerate(labels) if label == class_id]
        assert split.of_class(class_id).tolist() == expected


def test_sha256_tells_pixels_labels_and_shape_apart_but_not_memory_layouts():
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 6, 3), dtype=np.uint8)
    labels = np.array([0, 1, 0, 1])
    reference = Split(images, labels).sha256
    changed = images.copy()
    changed[3, 1, 5, 2] ^= 1
    others = [Split(changed, labels), Split(images, labels[::-1]), Split(images.reshape(4, 6, 2, 3), labels)]
    assert len({reference, *(other.sha256 for other in others)}) == 4
    assert Split(np.asfortranarray(images), np.repeat(labels, 2)[::2]).sha256 == reference


# Published data sets, known by their content


def test_digits_are_the_published_ones():
    dataset = load_dataset(DataConfig(dataset="digits"))
    expected = published.table()["digits"]
    assert (dataset.train.identity.text, dataset.val.identity.text) == (expected.train.identity, expected.val.identity)


def test_other_digits_are_refused_unless_asked_for(monkeypatch):
    digits = sources.SOURCES["digits"]

    def changed(config):
        dataset = digits(config)
        images = dataset.train.images.copy()
        images[5, 3, 3] ^= 1
        return replace(dataset, train=Split(images, dataset.train.labels))

    monkeypatch.setitem(sources.SOURCES, "digits", changed)
    with pytest.raises(UserError, match=r"digits: not scikit-learn's digits .*: pixels of train differ in 5.*verify"):
        load_dataset(DataConfig(dataset="digits"))
    assert len(load_dataset(DataConfig(dataset="digits", verify=False)).train.labels) == 1442


@pytest.mark.skipif(not sources.FASHION_MNIST.exists(), reason="apt-get install dataset-fashion-mnist")
def test_the_installed_fashion_mnist_is_known_and_a_part_of_it_is_not(tmp_path):
    dataset = load_dataset(DataConfig(dataset="fashion-mnist"))  # refuses others
    parts = []
    for split in (dataset.train, dataset.val):
        some = np.concatenate([split.of_class(label)[:2] for label in range(10)])
        parts += [idx_bytes(split.images[some, ..., 0]), idx_bytes(split.labels[some])]
    for name, raw in zip(FILES, parts, strict=True):
        (tmp_path / name).write_bytes(raw)
    complaint = r"5,998 images less of class t-shirt \(2 instead of 6,000\), and other counts of 9 more"
    with pytest.raises(UserError, match=complaint):
        load_dataset(DataConfig(dataset="fashion-mnist", data=str(tmp_path)))


def test_fashion_mnist_in_folders_has_its_classes_in_their_published_order(tmp_path):
    """Which is not that of the names."""
    names = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    for split in ("train", "val"):
        for label, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((3, 5), 20 * label, np.uint8)).save(tmp_path / split / name / "x.png")
    dataset = load_dataset(DataConfig(dataset="fashion-mnist", data=str(tmp_path), verify=False))
    assert dataset.class_names == [name.lower() for name in names]
    assert dataset.train.labels.tolist() == list(range(10))
    np.testing.assert_array_equal(dataset.val.images[:, 1, 1], np.repeat(20 * np.arange(10)[:, None], 3, axis=1))
