"""Parquet as Hugging Face writes it: several files and row groups, and files that are wrong."""

import json
import sys

import numpy as np
import pytest
from making import listed, png, refused

from fastil.data import DataConfig, load_dataset
from fastil.data.formats.detect import open_source
from fastil.data.formats.records import is_sequential
from fastil.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
NAMES = ["tench, Tinca tinca", "goldfish", "white shark"]


def write(path, labels, first=0, names=NAMES, group=3, image="image", label="label", paths=True, notes=None):
    """Image n of the data set is png(n), and its path n.JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(first + i), "path": f"{first + i}.JPEG" if paths else None} for i in range(len(labels))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"id": pa.array(range(len(labels))), image: pa.array(images, kind), label: pa.array(labels, pa.int64())}
    )
    if names is not None or notes is not None:
        feature = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
        found = json.dumps({"info": {"features": {label: feature, image: {"_type": "Image"}}}})
        table = table.replace_schema_metadata({"huggingface": notes or found})
    pq.write_table(table, path, row_group_size=group)
    return path


def hub(root, **options):
    """Labels in no order, over two files and five row groups."""
    write(root / "train-00000-of-00002.parquet", [2, 0, 1, 1, 0, 2, 0], 0, **options)
    write(root / "train-00001-of-00002.parquet", [1, 2, 2, 0], 7, **options)
    write(root / "validation-00000-of-00001.parquet", [1, 0, 2], 100, **options)
    write(root / "test-00000-of-00001.parquet", [-1, -1], 200, **options)  # the hub's test sets have no labels
    return root


TRAIN = list(enumerate([2, 0, 1, 1, 0, 2, 0, 1, 2, 2, 0]))
VAL = [(100, 1), (101, 0), (102, 2)]


def expected(samples, names=NAMES):
    return [(f"{number}.JPEG", names[label], png(number)) for number, label in samples]


@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label"), ("image", "labels")])
def test_files_of_the_hub_are_read_row_by_row(tmp_path, below, columns):
    hub(tmp_path / below, image=columns[0], label=columns[1])
    source = open_source(tmp_path)
    assert (source.kind, source.name, source.class_names) == ("parquet", tmp_path.name, NAMES)
    assert (listed(source, "train"), listed(source, "val")) == (expected(TRAIN), expected(VAL))
    assert source.train.where(9) == f"{tmp_path / below / 'train-00001-of-00002.parquet'}: row 2 (9.JPEG)"
    assert is_sequential(source.train)


def test_folders_named_like_splits_and_old_hashed_names(tmp_path):
    write(tmp_path / "train/0000.parquet", [1, 0])
    write(tmp_path / "train/0001.parquet", [2], 2)
    write(tmp_path / "test/0000.parquet", [0, 1], 9)
    source = open_source(tmp_path)
    assert listed(source, "train") == expected([(0, 1), (1, 0), (2, 2)])
    assert listed(source, "val") == expected([(9, 0), (10, 1)])
    write(tmp_path / "h/data/train-00000-of-00001-b9f1c0a2d3e4f567.parquet", [1, 0])
    assert len(open_source(tmp_path / "h").train) == 2


def test_taken_rows_keep_their_names_and_bytes(tmp_path):
    records = open_source(hub(tmp_path)).train
    ids = np.argsort(records.labels, kind="stable")
    taken = records.take(ids).take(np.array([0, 5, 10])).relabelled(np.array([7, 8, 9]))
    picked = [1, 3, 9]  # of rows by label: 1 4 6 10, 2 3 7, 0 5 8 9
    assert [taken.name(i) for i in range(3)] == [f"{n}.JPEG" for n in picked]
    assert [taken.content(i) for i in range(3)] == [png(n) for n in picked]
    assert taken.labels.tolist() == [7, 8, 9]
    assert taken.where(2).endswith("train-00001-of-00002.parquet: row 2 (9.JPEG)")


def test_ascending_rows_read_every_row_group_once(tmp_path, monkeypatch):
    records = open_source(hub(tmp_path)).train
    reads = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **options: reads.append(i) or whole(self, i, **options)
    )
    for i in range(len(records)):
        records.content(i)
    assert reads == [0, 1, 2, 0, 1]


def test_without_names_classes_are_numbers_and_without_paths_images_are_rows(tmp_path):
    source = open_source(write(tmp_path / "mine.parquet", [1, 3, 0], names=None, paths=False))
    assert source.class_names == ["0", "1", "2", "3"]
    assert listed(source, "train") == [("mine:0", "1", png(0)), ("mine:1", "3", png(1)), ("mine:2", "0", png(2))]
    assert source.val is None


def test_plain_bytes_are_images_too(tmp_path):
    table = pa.table({"image": pa.array([png(1), png(2)], pa.binary()), "label": pa.array([0, 1], pa.uint8())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert listed(open_source(tmp_path / "a.parquet"), "train") == [("a:0", "0", png(1)), ("a:1", "1", png(2))]


def test_paths_of_another_machine_are_cut_to_the_file(tmp_path):
    images = [{"bytes": png(1), "path": "/home/a/b/1.JPEG"}, {"bytes": png(2), "path": "../../2.JPEG"},
              {"bytes": png(3), "path": "n01/3.JPEG"}]  # fmt: skip
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0]}), tmp_path / "a.parquet")
    assert [name for name, _, _ in listed(open_source(tmp_path / "a.parquet"), "train")] == [
        "1.JPEG", "2.JPEG", "n01/3.JPEG",
    ]  # fmt: skip


def test_val_may_lie_elsewhere(tmp_path):
    train = write(tmp_path / "a.parquet", [0, 1, 2])
    val = write(tmp_path / "other/b.parquet", [2, 1], 50)
    for given in (val, val.parent):
        assert listed(open_source(train, val=str(given)), "val") == expected([(50, 2), (51, 1)])
    other = write(tmp_path / "c.parquet", [0, 1], names=["a", "b", "c"])
    refused("c.parquet", "classes", path=train, val=str(other))


def test_files_train_as_dataset_folder_and_damaged_images_are_named(tmp_path):
    hub(tmp_path)
    dataset = load_dataset(DataConfig(dataset="folder", data=str(tmp_path), size=8))
    # By class and name, as a folder of the same images would have them.
    by_class = sorted((label, f"{number}.JPEG", number) for number, label in TRAIN)
    assert dataset.train.images[:, 3, 3, 0].tolist() == [number for _, _, number in by_class]
    assert dataset.train.labels.tolist() == [label for label, _, _ in by_class]
    images = [{"bytes": content, "path": "x"} for content in (png(1), b"no image", None, png(2), png(3), png(4))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": [0, 0, 1, 1, 0, 1]})
    pq.write_table(table, tmp_path / "bad.parquet", row_group_size=2)
    dataset = load_dataset(
        DataConfig(dataset="folder", data=str(tmp_path / "bad.parquet"), val="same", size=8, on_corrupt="skip")
    )
    assert dataset.train.images[:, 3, 3, 0].tolist() == [1, 3, 2, 4]
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert "bad.parquet: row 1 (x)" in dataset.notes[1]
    assert "no image bytes" in dataset.notes[1]


def test_missing_shards_are_named(tmp_path):
    hub(tmp_path)
    for number in (0, 2, 5):
        write(tmp_path / f"x/train-{number:05d}-of-00009.parquet", [0])
    refused("x", "9 shards", "00001, 00003, 00004, 00006, 00007 and 1 more", path=tmp_path / "x")
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    refused("2 shards train-* 00000 are missing", path=tmp_path)
    refused("00000 are missing", path=tmp_path / "train-00001-of-00002.parquet")
    write(tmp_path / "train-00000-of-00002.parquet", [0])
    write(tmp_path / "train-00001-of-00002-abc.parquet", [0])
    refused("the same shard", path=tmp_path)
    write(tmp_path / "y/train-00000-of-00001.parquet", [0])
    write(tmp_path / "y/train-00000-of-00002.parquet", [0])
    write(tmp_path / "y/train-00001-of-00002.parquet", [0])
    refused("different counts", path=tmp_path / "y")
    write(tmp_path / "z/train-00003-of-00002.parquet", [0])
    refused("no shard of 2", path=tmp_path / "z")
    write(tmp_path / "p/partial-train/0000.parquet", [0])
    refused("partial-train", "first part", path=tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        ({"labels": [0, 1, 2, 0, -1]}, ["row 4 has label -1", "3 classes", "test set"]),
        ({"labels": [0, 1, 2, 0, 3]}, ["row 4 has label 3", "3 classes"]),
        ({"labels": [0, 1, 2, None, 0]}, ["1 rows from row 3 on have no label"]),
        ({"labels": [0, 10**9], "names": None}, ["row 1 has label 1000000000"]),
        ({"labels": []}, ["no row"]),
        ({"labels": [0, 1], "label": "target"}, ["no column label", "id, image, target"]),
        ({"labels": [0, 1], "image": "picture"}, ["no column image", "id, picture, label"]),
        ({"labels": [0, 1], "names": ["a", "a"]}, ["a class twice"]),
        ({"labels": [0, 1], "names": [1, 2]}, ["names of its classes"]),
        ({"labels": [0, 1], "notes": "{"}, ["huggingface"]),
        ({"labels": [0, 1], "notes": "[]"}, ["huggingface"]),
        ({"labels": [0, 1], "notes": '{"info": {"features": {}}}'}, ["huggingface"]),
    ],
)
def test_files_that_are_wrong_are_named(tmp_path, change, complaints):
    refused("a.parquet", *complaints, path=write(tmp_path / "a.parquet", **change))


def test_columns_of_other_types_are_named(tmp_path):
    for column, content, complaint in (
        ("label", [True, False], "bool"), ("label", [0.0, 1.0], "double"), ("image", ["a.jpg", "b.jpg"], "string"),
        ("image", [{"path": "a.jpg"}, {"path": "b.jpg"}], "struct"),
    ):  # fmt: skip
        columns = {"image": [{"bytes": png(1)}, {"bytes": png(2)}], "label": [0, 1]} | {column: content}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        refused("a.parquet", f"column {column} holds", complaint, path=tmp_path / "a.parquet")


def test_other_classes_in_another_file_are_an_error(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1])
    write(tmp_path / "train-00001-of-00002.parquet", [0, 1], names=["b", "a", "c"])
    refused("train-00001-of-00002.parquet", "other columns or classes", path=tmp_path)


def test_a_file_cut_anywhere_or_of_noise_is_an_error(tmp_path):
    whole = write(tmp_path / "whole.parquet", [2, 0, 1, 1, 0, 2, 0]).read_bytes()
    path = tmp_path / "a.parquet"
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:cut])
        refused("a.parquet", path=path)
    path.write_bytes(b"<html>404</html>" * 20)
    refused("a.parquet", "cannot be read as parquet", path=path)
    path.unlink()
    path.mkdir()
    refused("a.parquet", path=path)


def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [0, 1])
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("a.parquet", "pip install pyarrow", path=path)


def test_a_row_group_that_lost_images_is_an_error(tmp_path):
    records = open_source(write(tmp_path / "a.parquet", [0, 1, 2])).train
    write(tmp_path / "a.parquet", [0, 1])
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 has 2 images"):
        records.content(0)
