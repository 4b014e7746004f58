"""WebDataset shards: grouping, labels, splits, and shards that are wrong."""

import json

import pytest
from making import listed, png, refused, write_tar

from fastil.data import DataConfig, load_dataset
from fastil.data.formats.detect import open_source


def sample(key, number, label, **extra):
    """An image with its label, and members of other suffixes between them."""
    return [(f"{key}.jpg", png(number)), *((f"{key}.{suffix}", content) for suffix, content in extra.items()),
            (f"{key}.cls", str(label).encode())]  # fmt: skip


TRAIN_0 = [
    *sample("n01/0001", 1, 2, txt=b"a dog"), ("n01/0002.cls", b"0\n"), ("n01/0002.seg.png", png(99)),
    ("n01/0002.PNG", png(2)), ("readme", b"no key"), ("._n01", b"apple"), ("n01/._0001.jpg", b"apple"), ("n02/", None),
    ("n02/0001.jpeg", png(3)), ("n03/0001.webp", png(4)), ("n03/0001.json", json.dumps({"label": 1}).encode()),
    ("n02/0001.json", json.dumps({"cls": 0, "caption": "x"}).encode()), ("n03/0001.txt", b"late"),
]  # fmt: skip
TRAIN_1 = [*sample("a.b/0001.x", 5, 1), *sample("0001", 6, 2, json=b'{"caption": "no label, but .cls has one"}')]
VAL = [*sample("0001", 7, 1), *sample("0002", 8, 0), *sample("0003", 9, 2)]
FOUND = [
    ("n01/0001.jpg", 2, png(1)), ("n01/0002.PNG", 0, png(2)), ("n02/0001.jpeg", 0, png(3)),
    ("n03/0001.webp", 1, png(4)), ("0001.jpg", 2, png(6)),
]  # fmt: skip
FOUND_VAL = [("0001.jpg", 1, png(7)), ("0002.jpg", 0, png(8)), ("0003.jpg", 2, png(9))]


def named(samples, names=("0", "1", "2")):
    return [(name, names[label], content) for name, label, content in samples]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train-{}.tar", "val-{}.tar"), ("train/{}.tar", "validation/{}.tar"), ("set-train-{}.tar", "set-test-{}.tar"),
        ("imagenet_train_{}.tar", "imagenet_valid_{}.tar"), ("data/train-{}.tar", "data/validation-{}.tar"),
    ],
)  # fmt: skip
def test_shards_are_grouped_and_told_apart_by_their_names(tmp_path, train, val):
    write_tar(tmp_path / train.format("0001"), [part for part in TRAIN_1 if not part[0].startswith("a.b")])
    write_tar(tmp_path / train.format("0000"), TRAIN_0)
    write_tar(tmp_path / val.format("0000"), VAL)
    source = open_source(tmp_path)
    assert (source.kind, source.name, source.class_names) == ("webdataset", tmp_path.name, ["0", "1", "2"])
    assert (listed(source, "train"), listed(source, "val")) == (named(FOUND), named(FOUND_VAL))
    assert source.train.where(4) == f"{tmp_path / train.format('0001')}: 0001.jpg"
    assert not source.notes


def test_a_key_ends_at_the_first_dot_of_the_file_but_not_of_its_folder(tmp_path):
    path = write_tar(tmp_path / "train.tar", [("a.b/1.jpg", png(1)), ("a.b/1.x.jpg", png(2)), ("a.b/1.cls", b"0"),
                                              ("a.c/1.jpg", png(3)), ("a.c/1.cls", b"1")])  # fmt: skip
    assert listed(open_source(path), "train") == [("a.b/1.jpg", "0", png(1)), ("a.c/1.jpg", "1", png(3))]


def test_class_names_stand_beside_the_shards(tmp_path):
    write_tar(tmp_path / "train/0.tar", TRAIN_0)
    write_tar(tmp_path / "val/0.tar", VAL)
    for place in (tmp_path / "classnames.txt", tmp_path / "train/classnames.txt"):
        place.write_text("cat\ngreat dane\nk\u00e4fer\n\n", encoding="utf-8")
        source = open_source(tmp_path)
        assert source.class_names == ["cat", "great dane", "k\u00e4fer"]
        assert listed(source, "val") == named(FOUND_VAL, source.class_names)
        place.unlink()
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    refused("n01/0001.jpg", "label 2", "2 classes", path=tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\ndog\ncat\n")
    refused("classnames.txt", "twice", path=tmp_path)
    (tmp_path / "classnames.txt").write_bytes(b"cat\n\xff\xfe\n")
    refused("classnames.txt", "UTF-8", path=tmp_path)


def test_a_brace_pattern_names_shards(tmp_path):
    for number in range(8, 12):
        write_tar(tmp_path / f"s-{number:04d}.tar", sample("k", number, number % 2))
    source = open_source(tmp_path / "s-{0008..0010}.tar", val=str(tmp_path / "s-00{08,11}.tar"))
    assert [content for _, _, content in listed(source, "train")] == [png(8), png(9), png(10)]
    assert source.val.labels.tolist() == [0, 1]
    refused("s-0012.tar", "no such file", path=tmp_path / "s-{0008..0012}.tar")
    refused("braces", path=tmp_path / "s-{0008.tar")
    refused("range", path=tmp_path / "s-{0..999999999}.tar")
    refused("more than", path=tmp_path / "s-{0..9999}{0..9999}.tar")
    refused("given twice", path=tmp_path / "s-{0008,0008}.tar")


def test_a_single_shard_is_known_by_its_members_and_val_may_lie_elsewhere(tmp_path):
    path = write_tar(tmp_path / "some.tar", TRAIN_0)
    write_tar(tmp_path / "other/x-0.tar", VAL)
    source = open_source(path, val=str(tmp_path / "other"))
    assert (source.kind, listed(source, "train")) == ("webdataset", named(FOUND[:4]))
    assert listed(source, "val") == named(FOUND_VAL)
    assert open_source(path).val is None


def test_a_number_left_out_is_noted(tmp_path):
    for number in (0, 1, 3):
        write_tar(tmp_path / f"train-{number:04d}.tar", VAL)
    assert "1 numbers between 0 and 3 have no shard train-*.tar" in open_source(tmp_path).notes[0]


WRONG = {
    "no label": ([("a.jpg", png(1))], ["a has an image but no label"]),
    "no image": ([("a.cls", b"1")], ["a has a label (cls) but no image"]),
    "json alone": ([("a.json", b"{}")], ["a has a label (json) but no image"]),
    "two images": ([("a.jpg", png(1)), ("a.png", png(1)), ("a.cls", b"1")], ["a has several images"]),
    "a member twice": ([("a.jpg", png(1)), ("a.cls", b"1"), ("a.jpg", png(1))], ["a has two members .jpg"]),
    "a word": ([("a.jpg", png(1)), ("a.cls", b"dog")], ["a.cls: no label"]),
    "empty": ([("a.jpg", png(1)), ("a.cls", b"")], ["a.cls: no label"]),
    "negative": ([("a.jpg", png(1)), ("a.cls", b"-1")], ["a.cls: no label"]),
    "huge": ([("a.jpg", png(1)), ("a.cls", b"9" * 5000)], ["a.cls: no label"]),
    "beyond any class": ([("a.jpg", png(1)), ("a.cls", b"999999999")], ["a.cls: no label"]),
    "no JSON": ([("a.jpg", png(1)), ("a.json", b"{label: 1}")], ["a.json: not JSON"]),
    "JSON in UTF-16": ([("a.jpg", png(1)), ("a.json", b"\xff\xfe\x00")], ["a.json: not JSON"]),
    "deep JSON": ([("a.jpg", png(1)), ("a.json", b"[" * 100_000)], ["a.json: not JSON"]),
    "JSON of a list": ([("a.jpg", png(1)), ("a.json", b"[1]")], ["a.json: no label"]),
    "JSON without label": ([("a.jpg", png(1)), ("a.json", b'{"caption": 1}')], ["a.json: no label"]),
    "a fraction": ([("a.jpg", png(1)), ("a.json", b'{"label": 1.5}')], ["a.json: no label"]),
    "true": ([("a.jpg", png(1)), ("a.json", b'{"label": true}')], ["a.json: no label"]),
    "nothing": ([("readme", b"1")], ["no image in it"]),
    "a link": ([("a.jpg", "2")], ["--dereference"]),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "complaints"), WRONG.values(), ids=WRONG)
def test_a_shard_that_is_wrong_is_named_with_the_key(tmp_path, parts, complaints):
    write_tar(tmp_path / "train-0000.tar", TRAIN_0)
    write_tar(tmp_path / "train-0001.tar", parts)
    refused("train-0001.tar", *complaints, path=tmp_path)


def test_folders_of_shards_that_are_wrong(tmp_path):
    write_tar(tmp_path / "val-0.tar", VAL)
    refused(tmp_path, "none only of val", "train-*.tar", path=tmp_path)
    write_tar(tmp_path / "train-0.tar", TRAIN_0)
    write_tar(tmp_path / "extra.tar", VAL)
    refused("extra.tar", "rename", path=tmp_path)
    (tmp_path / "extra.tar").unlink()
    raw = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(raw[:3000])
    refused("train-0.tar", "cut short", path=tmp_path)
    (tmp_path / "empty").mkdir()
    refused("no *.tar", path=write_tar(tmp_path / "train-0.tar", TRAIN_0).parent, val=str(tmp_path / "empty"))


def test_shards_train_as_dataset_folder(tmp_path):
    write_tar(tmp_path / "train-0.tar", TRAIN_0)
    write_tar(tmp_path / "val-0.tar", VAL)
    dataset = load_dataset(DataConfig(dataset="folder", data=str(tmp_path), size=8))
    assert dataset.class_names == ["0", "1", "2"]
    assert dataset.train.images[:, 3, 3, 0].tolist() == [2, 3, 4, 1]  # by class and name, whatever the archive has
    assert dataset.val.labels.tolist() == [0, 1, 2]
