"""What identities tell apart, and a data set that is known in whatever it lies in."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from conftest import SHARED, SOAK, encoded
from making import write_tar

from fastil.data import DataConfig, Split, load_dataset, published
from fastil.data.formats import in_memory
from fastil.data.formats.beton import Beton
from fastil.data.formats.detect import open_source
from fastil.data.formats.identity import Identity, of_pixels
from fastil.data.formats.records import canonical
from fastil.errors import UserError
from fastil.reporting import fidelity
from fastil.reporting.run_files import ProtocolFile
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

CIFAR100 = SHARED / "cifar100-png.tar"
NAMES = ["apple", "bear", "crab_pot", "dog"]
TRAIN, VAL = (5, 4, 5, 6), (2, 2, 2, 2)  # images of each class
RANDOM = np.random.default_rng(0)


def noise(counts, size=8):
    labels = np.repeat(np.arange(len(counts)), counts)
    return RANDOM.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8), labels


SPLITS = {"train": noise(TRAIN), "val": noise(VAL)}


def entry(splits=SPLITS, names=NAMES):
    return published.parsed(published.entry("Fruit-4", names, *(of_pixels(*splits[s]) for s in ("train", "val"))))


SHIPPED = published.table()


@pytest.fixture(autouse=True)
def small_table(monkeypatch):
    """A published data set of 28 images under the name cifar100."""
    for module in (published, fidelity):
        monkeypatch.setattr(module, "table", lambda: {"cifar100": entry()})


def load(path, **settings):
    return load_dataset(DataConfig(dataset="cifar100", data=str(path), **settings))


# Identities


def contents(images, labels):
    """What an identity stands for, spelled out."""
    return images.shape[1:], sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


def test_pixels_are_the_same_if_and_only_if_their_classes_hold_the_same_images():
    images, labels = noise((3, 1, 4), size=6)
    swapped, twice, changed = labels.copy(), images.copy(), images.copy()
    swapped[[0, 3]] = swapped[[3, 0]]
    twice[1] = twice[0]
    changed[7, 5, 5, 2] ^= 1
    order = RANDOM.permutation(len(labels))
    variants = [
        (images, labels), (images[order], labels[order]), (images, swapped), (twice, labels), (changed, labels),
        (images[1:], labels[1:]), (images[[0, *range(8)]], labels[[0, *range(8)]]), (images, (labels + 1) % 3),
        (images.reshape(-1, 4, 9, 3), labels), (images.transpose(0, 2, 1, 3), labels),
    ]  # fmt: skip
    for a in variants:
        for b in variants:
            same = of_pixels(*a).text == of_pixels(*b).text
            assert same == (contents(*a) == contents(*b))
    assert of_pixels(images, labels).counts == (3, 1, 4)
    assert Split(images, labels).identity == of_pixels(images, labels)


def photos(root, prefix="", quality=90, leave_out=()):
    """A folder of JPEGs that are no photos but kept byte for byte, two of them for Pillow to encode again."""
    random = np.random.default_rng(1)
    for split, count in (("train", 3), ("val", 1)):
        for name in ("a", "b"):
            for i in range(count):
                path = root / split / name / f"{prefix}{i}.jpg"
                pixels = random.integers(0, 256, (20, 30, 3) if i else (20, 30), dtype=np.uint8)
                path.parent.mkdir(parents=True, exist_ok=True)
                if (split, name, i) not in leave_out:
                    path.write_bytes(encoded(pixels, quality=quality))
    return root


def converted(source, out, **options):
    convert(source, out, options_of(workers=1, **options), Reporter())
    return out


def test_streamed_files_are_known_by_the_bytes_of_their_images(tmp_path):
    photos(tmp_path / "in")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(tmp_path / "in/train", "train")
    files = {
        "folder": converted(tmp_path / "in", tmp_path / "a.beton"),
        "tar": converted(tmp_path / "in.tar", tmp_path / "b.beton"),
        "renamed": converted(photos(tmp_path / "r", prefix="x"), tmp_path / "c.beton"),
        "less": converted(photos(tmp_path / "l", leave_out=[("train", "b", 2)]), tmp_path / "d.beton"),
        "worse": converted(photos(tmp_path / "q", quality=80), tmp_path / "e.beton"),
        "resized": converted(tmp_path / "in", tmp_path / "f.beton", max_side=25),
    }
    found = {}
    for name, file in files.items():
        with Beton(file) as beton:
            found[name] = beton.identity
    assert found["folder"] == found["tar"] == found["renamed"]
    assert len({identity.text for identity in found.values()}) == 4
    assert found["resized"].kind == "changed"
    assert found["less"].counts == (3, 2)
    assert found["less"].classes[0] == found["folder"].classes[0] != found["less"].classes[1]
    (tmp_path / "a.manifest.json").unlink()
    with Beton(files["folder"]) as beton:
        assert beton.identity is None  # FFCV's own files have no checksums


def png_set(root, seed, side=40):
    random = np.random.default_rng(seed)
    for split in ("train", "val"):
        for name, count in (("a", 2), ("b", 1)):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(random.integers(0, 256, (side, side, 3), dtype=np.uint8), "PNG"))
    return root


def test_images_that_had_to_be_encoded_are_known_by_what_they_were_encoded_from(tmp_path):
    one, other = png_set(tmp_path / "one", 1), png_set(tmp_path / "other", 2)
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        tar.add(one / "train", "train")
    made = {
        "one": (one, {}), "tar": (tmp_path / "one.tar", {}), "quality": (one, {"quality": 40}),
        "roomy": (one, {"max_side": 4000}), "other": (other, {}), "resized": (one, {"max_side": 20}),
        "squashed": (one, {"squash": 40}), "again": (one, {"mode": "reencode"}),
    }  # fmt: skip
    found = {}
    for name, (source, options) in made.items():
        path = converted(source, tmp_path / f"{name}.beton", **{"mode": "jpeg"} | options)
        with Beton(path) as beton:
            found[name] = beton.identity
            assert beton.manifest.reencoded[0].size == (one / "train/a/0.png").stat().st_size
            if name not in ("tar", "again"):
                assert beton.source_bytes == sum(file.stat().st_size for file in source.glob("train/*/*"))
    same = {"one", "tar", "quality", "roomy", "squashed"}  # not resized: they have that size already
    assert {name for name, identity in found.items() if identity == found["one"]} == same
    assert found["one"].text != found["other"].text
    assert {name for name, identity in found.items() if identity.kind == "changed"} == {"resized", "again"}


def test_a_manifest_that_does_not_tell_what_was_encoded_gives_no_identity(tmp_path):
    """Manifests that older versions wrote."""
    path = converted(png_set(tmp_path / "in", 1), tmp_path / "x.beton", mode="jpeg")
    manifest = json.loads((tmp_path / "x.manifest.json").read_text())
    for one in manifest["reencoded"]:
        del one["crc32"], one["size"]
    (tmp_path / "x.manifest.json").write_text(json.dumps(manifest))
    with Beton(path) as beton:
        assert beton.identity is None
        assert beton.source_bytes == beton.lengths.sum()
    manifest["reencoded"][0]["id"] = 3
    (tmp_path / "x.manifest.json").write_text(json.dumps(manifest))
    with Beton(path) as beton, pytest.raises(UserError, match="damaged"):
        _ = beton.manifest


# One data set in many containers


def names_of(split):
    """Names that sort as the images lie in SPLITS."""
    return [f"{NAMES[label]}_{i:03d}.png" for i, label in enumerate(SPLITS[split][1])]


def members(train="train", val="val", splits=SPLITS, names=NAMES, kind="PNG"):
    return {
        f"{to}/{names[label]}/{name}": encoded(image, kind)
        for split, to in (("train", train), ("val", val))
        for image, label, name in zip(*splits[split], names_of(split), strict=False)
    }


def unpacked(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def parquet(root, names=NAMES, paths=True):
    """As on the hub, rows in no order."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root.mkdir()
    for split, to in (("train", "train"), ("val", "test")):
        images, labels = SPLITS[split]
        rows = np.random.default_rng(2).permutation(len(labels))
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        paths_of = names_of(split) if paths else [None] * len(labels)
        content = [{"bytes": encoded(images[i], "PNG"), "path": paths_of[i]} for i in rows]
        table = pa.table(
            {"img": pa.array(content, kind), "fine_label": labels[rows], "coarse_label": labels[rows] % 2}
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"fine_label": {"names": names}}}})})
        pq.write_table(table, root / f"{to}-00000-of-00001.parquet", row_group_size=4)
    return root


def containers(root):
    yield "tar", write_tar(root / "x.tar", members())
    yield "test/ for val/", unpacked(root / "folder", members(val="test"))
    yield "beton", converted(root / "folder", root / "x.beton")
    yield "beton of the tar", converted(root / "x.tar", root / "y.beton")
    yield "parquet", parquet(root / "parquet")
    yield "beton of parquet", converted(root / "parquet", root / "z.beton")
    files = dict(reversed(members().items()))
    yield "tar in another order", write_tar(root / "z.tar", files)


def test_the_same_images_are_the_same_data_set_in_every_container(tmp_path):
    for name, path in containers(tmp_path):
        dataset = load(path)
        assert dataset.class_names == NAMES, name
        for split in ("train", "val"):
            images, labels = SPLITS[split]
            got = getattr(dataset, split)
            np.testing.assert_array_equal(got.images, images, name)  # in one order as well, by class and name
            np.testing.assert_array_equal(got.labels, labels)
            assert got.sha256 == Split(images, labels).sha256
            assert got.identity == of_pixels(images, labels)
        assert not [note for note in dataset.notes if "Fruit" in note]


def test_the_binary_archive_is_known_by_its_pixels_and_keeps_its_order(tmp_path, monkeypatch):
    """No md5 sums of its files are published."""
    splits = {"train": noise(TRAIN, size=32), "val": noise(VAL, size=32)}
    monkeypatch.setattr(published, "table", lambda: {"cifar100": entry(splits)})
    orders = {}
    for split, file in (("train", "train.bin"), ("val", "test.bin")):
        images, labels = splits[split]
        order = orders[split] = RANDOM.permutation(len(labels))
        planes = images[order].transpose(0, 3, 1, 2).reshape(len(labels), -1)
        fine = labels[order, None].astype(np.uint8)
        (tmp_path / file).write_bytes(np.concatenate([fine % 2, fine, planes], axis=1).tobytes())
    (tmp_path / "fine_label_names.txt").write_text("\n".join(NAMES))
    dataset = load(tmp_path)
    np.testing.assert_array_equal(dataset.train.images, splits["train"][0][orders["train"]])
    assert dataset.train.identity == of_pixels(*splits["train"])
    raw = bytearray((tmp_path / "test.bin").read_bytes())
    raw[2] ^= 1  # the first pixel of the first image
    (tmp_path / "test.bin").write_bytes(raw)
    name = NAMES[splits["val"][1][orders["val"][0]]]
    with pytest.raises(UserError, match=f"pixels of val differ in {name}"):
        load(tmp_path)


def test_rows_without_names_keep_their_order_within_a_class(tmp_path):
    dataset = load(parquet(tmp_path / "parquet", paths=False))
    rows = np.random.default_rng(2).permutation(sum(TRAIN))
    images, labels = SPLITS["train"]
    by_class = rows[np.argsort(labels[rows], kind="stable")]
    np.testing.assert_array_equal(dataset.train.images, images[by_class])
    assert dataset.train.identity == of_pixels(images, labels)


def test_images_are_ordered_by_class_then_name_and_numbered_rows_by_number(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = [1, 0] * 12  # row 10 comes after row 9, not after row 1
    pq.write_table(pa.table({"image": pa.array([b""] * 24, pa.binary()), "label": labels}), tmp_path / "a.parquet")
    records = open_source(tmp_path / "a.parquet").train
    assert canonical(records).tolist() == [*range(1, 24, 2), *range(0, 24, 2)]


@pytest.mark.parametrize(
    "names", [["0", "1", "2", "3"], ["00", "01", "02", "03"], ["apple", "Bear", "crab-pot", "DOG"]]
)
def test_numbers_and_other_spellings_are_led_back_to_the_published_classes(tmp_path, names):
    """A class is found by its name wherever that sorts, and by its number where it is one."""
    dataset = load(unpacked(tmp_path, members(names=names)))
    assert dataset.class_names == NAMES
    assert dataset.train.identity == of_pixels(*SPLITS["train"])


def test_eleven_numbers_are_classes_in_the_order_of_the_numbers():
    names = [str(number) for number in range(11)]
    splits = {split: noise((1,) * 11, size=4) for split in ("train", "val")}
    in_folders = sorted(names)  # 0, 1, 10, 2, ...
    assert published.official_labels(entry(splits, names), in_folders) == [int(name) for name in in_folders]
    letters = [f"class {name}" for name in names]
    assert published.official_labels(entry(splits, letters), in_folders) == [int(name) for name in in_folders]
    assert published.official_labels(entry(splits, letters), names[:10]) is None


def test_a_folder_is_recognised_and_never_refused(tmp_path):
    unpacked(tmp_path / "same", members())
    same = load_dataset(DataConfig(dataset="folder", data=str(tmp_path / "same"), size=8))
    assert "the images are Fruit-4's" in same.notes
    smaller = load_dataset(DataConfig(dataset="folder", data=str(tmp_path / "same"), size=9))
    assert not smaller.notes
    other = {split: noise(counts) for split, counts in (("train", TRAIN), ("val", VAL))}
    unpacked(tmp_path / "other", members(splits=other))
    assert not load_dataset(DataConfig(dataset="folder", data=str(tmp_path / "other"), size=8)).notes


# What is not the published data set


def without_one(splits):
    images, labels = splits["train"]
    return splits | {"train": (images[1:], labels[1:])}


def with_one_pixel_changed(splits):
    images = splits["val"][0].copy()
    images[3, 2, 1, 0] ^= 1
    return splits | {"val": (images, splits["val"][1])}


def as_jpeg(splits):
    def through(image):
        return in_memory.decode(encoded(image, "JPEG", quality=95), None)

    return {split: (np.stack([*map(through, images)]), labels) for split, (images, labels) in splits.items()}


def doubled(splits):
    return {split: (images.repeat(2, 1).repeat(2, 2), labels) for split, (images, labels) in splits.items()}


OTHERS = {
    "an image missing": (without_one, NAMES, "train has 1 image less of class apple (4 instead of 5)"),
    "a pixel changed": (with_one_pixel_changed, NAMES, "pixels of val differ in bear"),
    "JPEG": (as_jpeg, NAMES, "pixels of train differ in apple, bear and 2 more classes, as after JPEG"),
    "a class renamed": (dict, ["apple", "bear", "crab_pot", "dogs"], "classes are renamed (dogs instead of dog)"),
    "another size": (doubled, NAMES, "images of train have 16x16 pixels instead of 8x8"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "names", "complaint"), OTHERS.values(), ids=OTHERS)
def test_another_data_set_is_refused_with_what_differs_and_trained_on_when_asked_for(
    tmp_path, change, names, complaint
):
    splits = change(SPLITS)
    path = write_tar(tmp_path / "x.tar", members(splits=splits, names=names))
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (f"{path}: not Fruit-4 as published", complaint, "verify=false")), message
    dataset = load(path, verify=False)
    assert dataset.class_names == names
    np.testing.assert_array_equal(dataset.train.images, splits["train"][0])
    described = {
        s: {"identity": getattr(dataset, s).identity.text, "images": 1, "sha256": ""} for s in ("train", "val")
    }
    protocol = ProtocolFile(class_order=[], class_names=names, steps=[[]], dataset={"name": ""} | described)
    assert not fidelity.on_published_data("cifar100", protocol)


def test_a_renamed_class_that_sorts_elsewhere_is_compared_with_itself(tmp_path):
    """Its labels are others, and those of the classes that it has moved past."""
    names = ["apple", "bear", "crab_pot", "aardvark"]  # of the images of dog
    splits = without_one(SPLITS)
    with pytest.raises(UserError) as error:
        load(write_tar(tmp_path / "x.tar", members(splits=splits, names=names)))
    found = (
        "classes are renamed (aardvark instead of dog); train has 1 image less of class apple (4 instead of 5). Take"
    )
    assert found in str(error.value)
    of = {split: of_pixels(*part) for split, part in with_one_pixel_changed(SPLITS).items()}
    expected = replace(entry(), class_names=("bear", "dog", "apple", "crab_pot"))
    shifted = published.differences(replace(expected, train=entry().train), NAMES, of["train"], of["val"])
    assert shifted[0] == "its classes have other labels"
    moved = {  # two classes renamed, told apart by their images
        split: of_pixels(images, np.array([2, 0, 3, 1])[labels]) for split, (images, labels) in SPLITS.items()
    }
    assert published.differences(entry(), ["bean", "dove", "apple", "crab_pot"], *moved.values()) == [
        "classes are renamed (bean, dove instead of bear, dog)"
    ]


def moved(splits, *changes):
    """The splits with the first so many images of a class given to another one."""
    images, labels = splits["train"]
    new = labels.copy()
    for count, source, target in changes:
        new[np.flatnonzero(labels == source)[:count]] = target
    return {split: of_pixels(*part) for split, part in (splits | {"train": (images, new)}).items()}


def test_both_sides_of_what_was_moved_are_named():
    """The class that had lost images was named, and the one that had gained them was not."""

    def told(*changes):
        return published.differences(entry(), NAMES, *moved(SPLITS, *changes).values())

    assert told((1, 0, 1)) == [
        "train has 1 image less of class apple (4 instead of 5), and 1 image more of class bear (5 instead of 4)"
    ]
    assert told((2, 0, 3), (1, 2, 3)) == [
        "train has 2 images less of class apple (3 instead of 5) and less of 1 more class, and 3 images more of class "
        "dog (9 instead of 6)"
    ]
    assert told((1, 0, 1), (1, 1, 0)) == ["pixels of train differ in apple, bear"]
    across = {split: of_pixels(*part) for split, part in SPLITS.items()}
    images, labels = (
        np.concatenate([whole, part[:1]]) for whole, part in zip(SPLITS["val"], SPLITS["train"], strict=True)
    )
    across |= {"train": of_pixels(*without_one(SPLITS)["train"]), "val": of_pixels(images, labels)}
    assert published.differences(entry(), NAMES, *across.values()) == [
        "train has 1 image less of class apple (4 instead of 5)", "val has 1 image more of class apple (3 instead of 2)"
    ]  # fmt: skip


def test_missing_classes_are_named(tmp_path):
    keep = {split: tuple(part[labels < 3] for part in (images, labels)) for split, (images, labels) in SPLITS.items()}
    with pytest.raises(UserError, match=r"3 classes instead of 4 \(dog missing\).*verify=false"):
        load(unpacked(tmp_path, members(splits=keep)))


def test_images_of_several_sizes_are_told_to_be_resized(tmp_path):
    files = members() | {"train/dog/zzz.png": encoded(np.zeros((9, 8, 3), np.uint8), "PNG")}
    with pytest.raises(UserError, match=r"zzz\.png: not 8x8 pixels .* recipe folder"):
        load(unpacked(tmp_path, files), verify=False)


def test_a_damaged_image_is_named_as_in_a_folder(tmp_path):
    path = unpacked(tmp_path, members() | {"train/apple/apple_000.png": b"no image"})
    with pytest.raises(
        UserError, match=r"apple_000\.png.*set on_corrupt=skip verify=false \(fewer images are no longer"
    ):
        load(path)
    with pytest.raises(
        UserError, match=r"1 image less of class apple .*; skipped 1 of .*apple_000\.png .*verify=false"
    ):
        load(path, on_corrupt="skip")
    dataset = load(path, on_corrupt="skip", verify=False)
    assert len(dataset.train.labels) == sum(TRAIN) - 1
    assert [note for note in dataset.notes if "apple_000.png" in note] == list(dataset.skipped)
    with pytest.raises(UserError, match=r"apple_000\.png.*set on_corrupt=skip$"):
        load(path, verify=False)


def test_an_archive_that_is_not_unpacked_says_so(tmp_path):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz"):
        pass
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(raw.getvalue())
    with pytest.raises(UserError, match=r"cifar-100-python\.tar\.gz: .*unpack the archive"):
        load(tmp_path / "cifar-100-python.tar.gz")


def test_counts_alone_decide_where_no_identity_is_known():
    """CIFAR-10 and ImageNet: nobody here has computed their identities."""
    unknown = replace(entry(), train=replace(entry().train, identity=None, classes=None))
    of = {split: of_pixels(*SPLITS[split]) for split in SPLITS}
    assert not published.differences(unknown, NAMES, of["train"], of["val"])
    changed = {split: of_pixels(*part) for split, part in with_one_pixel_changed(SPLITS).items()}
    assert published.differences(unknown, NAMES, of["train"], changed["val"]) == ["pixels of val differ in bear"]


# The table that is shipped


def test_the_shipped_table_is_consistent():
    shapes = {"digits": (8, 8, 3), "fashion-mnist": (28, 28, 3), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}
    for name, shape in shapes.items():
        found = SHIPPED[name]
        assert found.shape == shape
        assert len(found.class_names) == found.classes
        for split in (found.train, found.val):
            assert sum(split.counts) == split.images
            assert split.identity is None or len(split.classes) == found.classes
    assert SHIPPED["cifar100"].train.counts == (500,) * 100
    assert SHIPPED["imagenet"].train.images == 1_281_167


@pytest.mark.skipif(not CIFAR100.exists(), reason="no ../shared/data/cifar100-png.tar next to the repository")
def test_the_real_test_images_are_known_and_one_changed_pixel_is_not():
    source = open_source(CIFAR100)
    expected = SHIPPED["cifar100"]
    assert source.class_names == list(expected.class_names)
    assert tuple(np.bincount(source.train.labels)) == expected.train.counts
    chosen = np.array([0, 23, 42, 61, 99])  # classes of training images: all 50,000 would take long
    some = source.train.take(np.flatnonzero(np.isin(source.train.labels, chosen)))
    some = some.relabelled(np.searchsorted(chosen, some.labels))
    ((images, labels), five), _ = in_memory.read(replace(source, train=source.val, val=some), None, skip_corrupt=False)
    val, decoded = of_pixels(images, labels), of_pixels(*five)
    assert val.text == expected.val.identity
    digests = list(expected.train.classes)
    for label, digest in zip(chosen, decoded.classes, strict=True):
        assert digest.startswith(digests[label])
        digests[label] = digest
    train = Identity("pixels", expected.shape, expected.train.counts, tuple(digests))
    assert not published.differences(expected, source.class_names, train, val)
    images[4321, 7, 8, 1] ^= 1
    name = source.class_names[labels[4321]]
    found = published.differences(expected, source.class_names, train, of_pixels(images, labels))
    assert found == [f"pixels of val differ in {name}"]
    kept = np.arange(len(labels)) != 17
    found = published.differences(expected, source.class_names, train, of_pixels(images[kept], labels[kept]))
    assert "val has 1 image less of class apple (99 instead of 100)" in found


@pytest.mark.skipif(not SOAK, reason="decodes 50,000 images: make soak")
@pytest.mark.skipif(not CIFAR100.exists(), reason="no ../shared/data/cifar100-png.tar next to the repository")
def test_the_real_training_images_are_known():
    source = open_source(CIFAR100)
    ((images, labels), _), _ = in_memory.read(
        replace(source, val=source.val.take(np.arange(2))), None, skip_corrupt=False
    )
    assert of_pixels(images, labels).text == SHIPPED["cifar100"].train.identity
