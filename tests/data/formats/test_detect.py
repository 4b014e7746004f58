"""Which kind a path is, and the kinds that are no archives: folders, Tiny ImageNet, CIFAR, idx."""

import gzip
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from making import listed, png, refused, write_tar

from fastil.data.formats.detect import KINDS, open_source
from fastil.data.formats.records import Listing, Texts, Unreadable, is_sequential


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def folder(root):
    return write(root, {f"{split}/{name}/{i}.png": png(i) for split in ("train", "val") for name in "ab" for i in "12"
                        for i in (int(i),)})  # fmt: skip


# Kinds


def test_the_kinds_are_those_that_the_tool_lists():
    assert list(KINDS) == ["folder", "folder-tar", "ilsvrc", "tiny-imagenet", "cifar10", "cifar100", "idx", "parquet",
                           "webdataset", "beton"]  # fmt: skip


def test_an_unknown_kind_lists_the_kinds(tmp_path):
    refused("kind zip", *KINDS, path=folder(tmp_path), kind="zip")


def test_a_kind_that_the_path_is_not_is_an_error(tmp_path):
    folder(tmp_path / "folder")
    write_tar(tmp_path / "file.tar", {"train/a/1.png": png(1)})
    for path in (tmp_path / "folder", tmp_path / "file.tar"):
        for kind in KINDS:
            if not (kind == "folder" and path.is_dir()):
                refused(path, path=path, kind=kind)


def test_a_path_of_nothing_known_lists_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", *KINDS, path=tmp_path / "empty")
    write(tmp_path / "packed", {"tiny-imagenet-200.zip": b"PK\x03\x04"})
    refused("tiny-imagenet-200.zip", "unpacked", path=tmp_path / "packed")
    write(tmp_path, {"a.txt": b"text", "b.zip": b"PK\x03\x04" + bytes(99), "c": b"", "d.tar": b""})
    refused("a.txt", *KINDS, path=tmp_path / "a.txt")
    refused("b.zip", "unzip", path=tmp_path / "b.zip")
    refused("c", *KINDS, path=tmp_path / "c")
    refused("d.tar", "0 bytes", path=tmp_path / "d.tar")
    refused("nowhere", "no such file or folder", path=tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.tar")
    refused("pipe.tar", path=tmp_path / "pipe.tar")


def test_class_folders_win_over_a_shard_that_lies_beside_them(tmp_path):
    folder(tmp_path)
    write_tar(tmp_path / "train.tar", {"a/1.jpg": png(1), "a/1.cls": b"0"})
    assert open_source(tmp_path).kind == "folder"
    assert open_source(tmp_path, kind="webdataset").kind == "webdataset"


def test_listing_needs_no_torch(tmp_path):
    folder(tmp_path)
    script = (
        "import sys; from pathlib import Path; from fastil.data.formats.detect import open_source;"
        f"open_source(Path({str(tmp_path)!r})); print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "False\n"


def test_the_training_images_may_stand_in_for_validation(tmp_path):
    source = open_source(folder(tmp_path), val="same")
    assert source.val is source.train
    assert source.notes == ("validation images are the training images: a smoke test, not a result",)
    flat = open_source(tmp_path / "train", val="same")
    assert (flat.class_names, flat.val is flat.train) == (["a", "b"], True)


# Folders


def test_folders_follow_links_and_leave_hidden_files_out(tmp_path):
    write(tmp_path / "store", {"real.JPEG": png(1), "dogs/x.Jpg": png(2)})
    write(tmp_path / "data", {"train/cat/2.png": png(3), "train/cat/10.png": png(4), "train/cat/.hidden": b"1",
                              "train/cat/._2.png": b"apple", "train/.cache/x.png": b"1", "train/cat/deeper/x.png": b"1",
                              "train/list.txt": b"1"})  # fmt: skip
    (tmp_path / "data/train/cat/link.png").symlink_to(tmp_path / "store/real.JPEG")
    (tmp_path / "data/train/dog").symlink_to(tmp_path / "store/dogs")
    source = open_source(tmp_path / "data")
    assert (source.kind, source.class_names, source.val) == ("folder", ["cat", "dog"], None)
    assert listed(source, "train") == [
        ("train/cat/10.png", "cat", png(4)), ("train/cat/2.png", "cat", png(3)), ("train/cat/link.png", "cat", png(1)),
        ("train/dog/x.Jpg", "dog", png(2)),
    ]  # fmt: skip
    assert source.train.where(0) == str(tmp_path / "data/train/cat/10.png")
    assert not is_sequential(source.train)
    for name, target in (("broken.png", tmp_path / "nowhere"), ("loop.png", "loop.png")):
        (tmp_path / "data/train/cat" / name).symlink_to(target)
        records = open_source(tmp_path / "data").train  # it is named, or skipped, with what does not decode
        row = next(i for i in range(len(records)) if records.name(i).endswith(name))
        with pytest.raises(Unreadable, match=f"train/cat/{name}: cannot be read"):
            records.content(row)
        (tmp_path / "data/train/cat" / name).unlink()


def test_a_folder_that_contains_itself_ends(tmp_path):
    folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "a/again").symlink_to(tmp_path / split)
    assert len(open_source(tmp_path).train) == 4


def test_class_names_that_cannot_be_shown_are_refused(tmp_path):
    folder(tmp_path)
    for name, complaint in ((b"\xff", "UTF-8"), (b"a\nb", "cannot be shown")):
        for split in ("train", "val"):
            os.rename(os.fsencode(tmp_path / split / "a"), os.path.join(os.fsencode(tmp_path / split), name))
        refused(complaint, path=tmp_path)
        for split in ("train", "val"):
            os.rename(os.path.join(os.fsencode(tmp_path / split), name), tmp_path / split / "a")


def test_a_file_that_has_become_shorter_is_named(tmp_path):
    records = open_source(folder(tmp_path)).train
    (tmp_path / "train/a/1.png").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"train/a/1\.png: ends before byte"):
        records.content(0)


# Tiny ImageNet

WNIDS = ["n02124075", "n04067472", "n01443537"]  # wnids.txt is in no order
VAL = {"val_0.JPEG": "n01443537", "val_1.JPEG": "n04067472", "val_10.JPEG": "n02124075", "val_2.JPEG": "n01443537"}
ANNOTATIONS = ["val_2.JPEG", "val_10.JPEG", "val_0.JPEG", "val_1.JPEG"]  # nor are the annotations


def tiny(root):
    files = {"wnids.txt": "\n".join(WNIDS).encode() + b"\n", "test/images/test_0.JPEG": png(7)}
    files["words.txt"] = b"n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\n"
    for k, wnid in enumerate(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"x_0.JPEG\t0\t10\t63\t58\n"
        files |= {f"train/{wnid}/images/{wnid}_{n}.JPEG": png(10 * k + n) for n in (10, 2)}
    files |= {f"val/images/{name}": png(100 + i) for i, name in enumerate(VAL)}
    lines = [f"{name}\t{VAL[name]}\t0\t32\t44\t62" for name in ANNOTATIONS]
    files["val/val_annotations.txt"] = ("\n".join(lines) + "\n").encode()
    return write(root, files)


def test_tiny_imagenet_is_read_in_its_own_layout(tmp_path):
    source = open_source(tiny(tmp_path))
    assert (source.kind, source.class_names) == ("tiny-imagenet", ["n01443537", "n02124075", "n04067472"])
    assert source.titles == ["goldfish, Carassius auratus", "Egyptian cat", "n04067472"]
    assert listed(source, "train") == [
        ("train/n01443537/images/n01443537_10.JPEG", "n01443537", png(30)),
        ("train/n01443537/images/n01443537_2.JPEG", "n01443537", png(22)),
        ("train/n02124075/images/n02124075_10.JPEG", "n02124075", png(10)),
        ("train/n02124075/images/n02124075_2.JPEG", "n02124075", png(2)),
        ("train/n04067472/images/n04067472_10.JPEG", "n04067472", png(20)),
        ("train/n04067472/images/n04067472_2.JPEG", "n04067472", png(12)),
    ]
    assert listed(source, "val") == [
        ("val/images/val_0.JPEG", "n01443537", png(100)),
        ("val/images/val_2.JPEG", "n01443537", png(103)),
        ("val/images/val_10.JPEG", "n02124075", png(102)),
        ("val/images/val_1.JPEG", "n04067472", png(101)),
    ]


@pytest.mark.parametrize(
    ("name", "change", "complaints"),
    [
        ("wnids.txt", lambda raw: raw + b"n02124075\n", ["wnids.txt", "n02124075", "twice"]),
        ("wnids.txt", lambda raw: raw + b"n09999999\n", ["n09999999", "wnids.txt", "train"]),
        ("wnids.txt", lambda raw: raw[10:], ["n02124075", "wnids.txt", "train"]),
        ("wnids.txt", lambda raw: b"\xff" + raw, ["wnids.txt", "UTF-8"]),
        (
            "val/val_annotations.txt",
            lambda raw: raw + b"val_9.JPEG\tn02124075\t0\t0\t1\t1\n",
            ["val_9.JPEG", "no such"],
        ),
        ("val/val_annotations.txt", lambda raw: raw + raw, ["val_2.JPEG", "twice"]),
        ("val/val_annotations.txt", lambda raw: raw[: raw.rindex(b"val_1.")], ["val_1.JPEG", "val_annotations.txt"]),
        ("val/val_annotations.txt", lambda raw: raw.replace(b"n04067472", b"n00000000"), ["val_1.JPEG", "n00000000"]),
        ("val/val_annotations.txt", lambda raw: raw.replace(b"\t", b" "), ["val_2.JPEG", "(none)"]),
        ("val/val_annotations.txt", lambda raw: None, ["val_annotations.txt", "no such file"]),
        ("train/n02124075/images/n02124075_2.JPEG", lambda raw: None, []),
        ("words.txt", lambda raw: b"\xff\tx\n", ["words.txt", "UTF-8"]),
    ],
)
def test_tiny_imagenet_that_is_wrong(tmp_path, name, change, complaints):
    tiny(tmp_path)
    content = change((tmp_path / name).read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if complaints:
        refused(*complaints, path=tmp_path)
    else:
        assert len(open_source(tmp_path).train) == 5


def test_a_folder_in_place_of_a_list_is_named(tmp_path):
    tiny(tmp_path)
    (tmp_path / "val/val_annotations.txt").unlink()
    (tmp_path / "val/val_annotations.txt").mkdir()
    refused("val_annotations.txt", "not a file", path=tmp_path)
    (tmp_path / "train/n02124075/images").rename(tmp_path / "moved")
    refused("n02124075/images", "no such folder", path=tmp_path)


# CIFAR and idx


def cifar_binary(root, fine):
    generator = np.random.default_rng(0)
    names = [f"name{i}" for i in range(100 if fine else 10)]
    files = {"fine_label_names.txt" if fine else "batches.meta.txt": "\n".join(names).encode()}
    for file in (
        ("train.bin", "test.bin") if fine else [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    ):
        pixels = generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
        files[file] = b"".join((b"\x01" if fine else b"") + bytes([label]) + image.tobytes()
                               for label, image in zip((3, 7), pixels, strict=True))  # fmt: skip
    return write(root, files)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_cifar_is_known_by_its_files_and_read_as_pixels(tmp_path, fine, below):
    root = tmp_path / ("cifar-100-binary" if fine else "cifar-10-batches-bin") if below else tmp_path
    raw = (cifar_binary(root, fine) / ("train.bin" if fine else "data_batch_1.bin")).read_bytes()
    source = open_source(tmp_path)
    assert source.kind == ("cifar100" if fine else "cifar10")
    assert (len(source.train), len(source.val)) == ((2, 2) if fine else (10, 2))
    assert source.class_names[7] == "name7"
    image = source.train.content(0)
    start = 2 if fine else 1
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    for y, x, channel in ((0, 0, 0), (3, 5, 1), (31, 30, 2)):
        assert image[y, x, channel] == raw[start + channel * 1024 + y * 32 + x]
    assert source.train.labels.tolist()[:2] == [3, 7]
    assert (source.train.name(1), source.train.where(1)) == ("000001", f"{tmp_path} (train): image 000001")
    refused("val", path=tmp_path, val=str(tmp_path))
    assert open_source(tmp_path, val="same").val.labels.tolist() == source.train.labels.tolist()


def test_cifar_of_python_is_known_and_verified(tmp_path):
    for name, kind in (("cifar-10-batches-py/data_batch_1", "cifar10"), ("cifar-100-python/train", "cifar100")):
        write(tmp_path / kind, {name: pickle.dumps({}), name.replace("train", "meta"): b"x"})
        message = refused(tmp_path / kind, "again", path=tmp_path / kind)
        assert kind == "cifar10" or "md5" in message
    write(tmp_path / "flat", {"train": b"x", "test": b"x", "meta": b"x"})
    refused("flat", "md5", path=tmp_path / "flat")
    refused("flat", "refused", path=tmp_path / "flat", verify=False)
    files = cifar_binary(tmp_path / "bin", False)
    (files / "batches.meta.txt").write_bytes(b"\xff\xfe")
    refused("bin", "UTF-8", path=files)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_as_pixels(tmp_path, suffix):
    for prefix, labels in (("train", [1, 0, 2]), ("t10k", [2, 1])):
        images = bytes(range(len(labels) * 4))
        for name, raw in (
            ("images-idx3", b"\0\0\x08\x03" + struct.pack(">III", len(labels), 2, 2) + images),
            ("labels-idx1", b"\0\0\x08\x01" + struct.pack(">I", len(labels)) + bytes(labels)),
        ):
            path = tmp_path / f"{prefix}-{name}-ubyte{suffix}"
            path.write_bytes(gzip.compress(raw) if suffix else raw)
    source = open_source(tmp_path)
    assert (source.kind, source.class_names) == ("idx", ["0", "1", "2"])
    assert source.train.labels.tolist() == [1, 0, 2]
    assert source.train.content(1).tolist() == [[[4] * 3, [5] * 3], [[6] * 3, [7] * 3]]
    assert source.val.content(0).tolist() == [[[0] * 3, [1] * 3], [[2] * 3, [3] * 3]]
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    refused("t10k-labels-idx1-ubyte", path=tmp_path)


# Lists


def test_texts_give_back_what_they_were_given():
    texts = ["", "a", "k\u00e4se", "\udcff", "", "b" * 300]
    assert list(Texts(texts)) == texts
    assert [Texts(texts)[i] for i in (3, 0, 5)] == ["\udcff", "", "b" * 300]
    assert len(Texts()) == 0


def test_a_listing_may_be_taken_apart_and_relabelled():
    listing = Listing("/root")
    for i in range(5):
        listing.add(f"{i}", i % 2, 10 * i, f"{i % 2}.tar", 100 * i)
    files = listing.files()
    taken = files.take(np.array([4, 1, 3])).take(np.array([2, 0])).relabelled(np.array([8, 9]))
    assert [taken.name(i) for i in range(2)] == ["3", "4"]
    assert [taken.extent(i) for i in range(2)] == [("1.tar", 300, 30, None), ("0.tar", 400, 40, None)]
    assert taken.labels.tolist() == [8, 9]
    assert taken.where(0) == "1.tar: 3"


def test_two_classes_of_one_name_are_refused(tmp_path):
    root = cifar_binary(tmp_path, False)
    names = (root / "batches.meta.txt").read_text().split()
    (root / "batches.meta.txt").write_text("\n".join([*names[:9], names[0]]))
    refused(f"two classes are called {names[0]!r}", path=root)
