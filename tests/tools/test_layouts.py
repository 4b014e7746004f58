"""What users met: layouts and labels of data sets that were refused, or read otherwise by each container."""

from pathlib import Path

import pytest
from converting import in_both, load, tree, write
from converting import run as convert
from making import listed, png, refused, write_tar

from fastil.data import DataConfig, load_dataset
from fastil.data.formats.beton import Beton
from fastil.data.formats.detect import open_source
from fastil.data.published import table
from fastil.errors import UserError
from fastil.protocol import build_protocol, imagenet_subset
from fastil.recipe_file import load as load_recipe

# Classes


def test_all_classes_that_differ_are_told_at_once(tmp_path):
    """One was told, and the next after that had been mended."""
    files = tree(cat=(".png", 2), dog=(".png", 2), emu=(".png", 2), **{f"x{i}": (".png", 2) for i in range(7)})
    files = {n: c for n, c in files.items() if not n.startswith(("val/x", "val/cat"))} | {"val/ant/1.png": png(1)}
    for path in in_both(tmp_path, files):
        message = refused("class cat, x0, x1, x2, x3 and 3 more are in", "; ant is in", path=path)
        assert message.count("but not in") == 2


def numbered(root, classes=12):
    return write(root, {f"{split}/{c}/0.png": png(c) for split in ("train", "val") for c in range(classes)})


def test_classes_that_are_numbers_have_one_order(tmp_path):
    """Folders 0, 1, 10, 11, 2, ..., and labels 0, 1, 2, ... in WebDataset and parquet."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = numbered(tmp_path / "folder")
    for split in ("train", "val"):
        samples = [(f"{c}.{end}", content) for c in range(12) for end, content in (("png", png(c)), ("cls", b"%d" % c))]
        write_tar(tmp_path / f"shards/{split}-0.tar", samples)
        (tmp_path / "rows").mkdir(exist_ok=True)
        rows = {"image": [png(c) for c in range(12)], "label": [str(c) for c in range(12)]}
        pq.write_table(pa.table(rows), tmp_path / f"rows/{split}-0.parquet")
    packed = write_tar(tmp_path / "a.tar", {f"{s}/{c}/0.png": png(c) for s in ("train", "val") for c in range(12)})
    convert(folder, tmp_path / "x.beton")
    for path in (folder, packed, tmp_path / "shards", tmp_path / "rows", tmp_path / "x.beton"):
        source = open_source(path)
        assert source.class_names == [str(c) for c in range(12)]
        (note,) = (note for note in source.notes if note.startswith("class names are numbers"))
        assert note.endswith("id 2 is class 2, where text is sorted (torchvision) it is class 10")
    assert not open_source(numbered(tmp_path / "few", 10)).notes


def test_a_file_of_a_subset_of_imagenet_is_taken_by_the_recipes_of_that_subset_alone(tmp_path):
    """A set of 100 classes was refused, and what would have helped not named."""
    wnids = table()["imagenet"].class_names
    write(tmp_path / "in", {f"train/{wnid}/0.png": png(c) for c, wnid in enumerate(wnids)})
    (tmp_path / "names").write_text("\n".join(wnids[100:200]))

    def protocol_on(classes, *settings):
        path = tmp_path / f"{Path(classes).name}.beton"
        if not path.exists():
            convert(tmp_path / "in", path, classes=classes)
        with Beton(path) as beton:
            names = beton.class_names
        return names, build_protocol(load_recipe("subimagenet_balanced_5", settings).protocol, len(names), names)

    names, protocol = protocol_on("lucir")
    assert [len(step) for step in protocol.steps] == [50, 10, 10, 10, 10, 10]
    assert [names[c] for c in protocol.order] == [wnids[c] for c in imagenet_subset("lucir")]
    with pytest.raises(UserError, match="set subset=first100, or convert ImageNet with --classes lucir"):
        protocol_on("first100")
    with pytest.raises(UserError, match="has 100 others, so set subset=null"):
        protocol_on(str(tmp_path / "names"))
    assert len(protocol_on(str(tmp_path / "names"), "subset=null")[1].order) == 100


@pytest.mark.parametrize(("option", "note"), [("squash", "squashed to 6x6"), ("max_side", "at most 6 pixels a side")])
def test_a_file_of_images_in_other_sizes_says_so(tmp_path, option, note):
    write(tmp_path / "in", tree(cat=(".png", 2), dog=(".png", 2)))
    convert(tmp_path / "in", tmp_path / "x.beton", **{option: 6})
    for config in (
        DataConfig("folder", str(tmp_path / "x.beton"), size=8),
        DataConfig("imagenet", str(tmp_path / "x.beton")),
    ):
        assert note in str(load_dataset(config).notes)


# Flat validation folders


WNIDS = ("n01440764", "n01443537")


def kaggle(root, rows, images=4):
    files = {f"ILSVRC/Data/CLS-LOC/train/{w}/{i}.JPEG": png(i) for w in WNIDS for i in range(2)}
    files |= {f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i:08d}.JPEG": png(100 + i) for i in range(1, images + 1)}
    files["ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG"] = png(9)
    if rows is not None:
        lines = ["ImageId,PredictionString", *(f"ILSVRC2012_val_{i:08d},{rest}" for i, rest in rows)]
        files["LOC_val_solution.csv"] = "\n".join(lines).encode()
    return files


ROWS = [(4, f"{WNIDS[0]} 1 2 3 4"), (1, f"{WNIDS[1]} 1 2 3 4 {WNIDS[1]} 5 6 7 8"), (3, f"{WNIDS[0]} 1 2 3 4"),
        (2, f"{WNIDS[1]} 9 9 9 9")]  # fmt: skip


def test_kaggles_imagenet_is_read_with_its_list(tmp_path):
    folder, packed = in_both(tmp_path, kaggle(tmp_path, ROWS))
    for path in (folder, folder / "ILSVRC", folder / "ILSVRC/Data/CLS-LOC", packed):
        source = open_source(path)
        assert source.class_names == list(WNIDS)
        found = [(name.rpartition("/")[2], c, content) for name, c, content in listed(source, "val")]
        assert found == [
            (f"ILSVRC2012_val_{i:08d}.JPEG", wnid, png(100 + i))
            for i, wnid in ((3, WNIDS[0]), (4, WNIDS[0]), (1, WNIDS[1]), (2, WNIDS[1]))
        ]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (None, r"4 files and no class folders.*LOC_val_solution\.csv .*ImageId,PredictionString.*/val/<class>/"),
        (ROWS[:3], "no class of ILSVRC2012_val_00000002.JPEG"),
        ([*ROWS[:3], (2, "n09999999 1 2 3 4")], "is of class n09999999"),
        ([*ROWS, (1, f"{WNIDS[0]} 1 2 3 4")], "gives ILSVRC2012_val_00000001 a second class"),
        ([*ROWS[:3], (2, "")], "line 5 is no image with its class"),
    ],
)
def test_a_flat_validation_folder_without_its_list_says_which_is_needed(tmp_path, rows, complaint):
    """No class folder, it said."""
    for path in in_both(tmp_path, kaggle(tmp_path, rows)):
        with pytest.raises(UserError, match=complaint):
            open_source(path)


def test_a_flat_validation_folder_of_any_images_takes_a_list_beside_it(tmp_path):
    files = {f"train/{c}/{i}.png": png(i) for c in ("cat", "dog") for i in range(2)}
    files |= {"val/a.png": png(1), "val/b.png": png(2), "val/notes.txt": b"1"}
    folder = write(tmp_path, files | {"LOC_val_solution.csv": b"ImageId,PredictionString\na,dog\nb.png,cat\n"})
    source = open_source(folder)
    assert listed(source, "val") == [("val/b.png", "cat", png(2)), ("val/a.png", "dog", png(1))]
    assert source.notes == ("1 files in no class folder are left out, such as val/notes.txt",)
    assert load(folder).val.labels.tolist() == [0, 1]


# WebDataset and parquet


def test_metadata_of_a_shard_is_no_sample(tmp_path):
    samples = [
        (f"{i:05d}.{end}", content) for i in range(6) for end, content in (("jpg", png(i)), ("cls", b"%d" % (i % 2)))
    ]
    meta = [("__meta__.json", b"{}"), ("__shard__/about.json", b"{}"), ("a/__index__.json", b"{}")]
    assert len(open_source(write_tar(tmp_path / "a.tar", [*meta, *samples])).train) == 6


def test_a_dot_in_a_name_of_webdataset_is_explained(tmp_path):
    """Such samples vanished."""
    good = [("a.jpg", png(1)), ("a.cls", b"0"), ("b.jpg", png(2)), ("b.cls", b"1"), ("b.seg.png", png(3))]
    path = write_tar(tmp_path / "a.tar", [*good, ("cat.v1.jpg", png(4)), ("cat.v1.cls", b"0")])
    refused("cat.v1.jpg: WebDataset ends a key at the first dot", "v1.jpg of the sample cat", path=path, val="same")


def test_samples_of_webdataset_whose_image_is_not_read_are_counted(tmp_path):
    samples = [(f"{i}.{end}", c) for i in range(8) for end, c in (("jpg", png(i)), ("cls", b"%d" % (i % 2)))]
    lost = [
        ("x.jxl", b"1"),
        ("x.cls", b"1"),
        ("y.psd", b"1"),
        ("y.json", b'{"label": 0}'),
        ("z.gif", png(9)),
        ("z.cls", b"1"),
    ]
    source = open_source(write_tar(tmp_path / "a.tar", samples + lost))
    assert source.notes == (
        ".jxl: 1 in class 1 left out; convert them to JPEG or PNG",
        ".psd: 1 in class 0 left out; convert them to JPEG or PNG",
    )
    assert len(source.train) == 9
    more = [(f"w{i}.{end}", c) for i in range(5) for end, c in (("jxl", b"1"), ("cls", b"1"))]
    refused("class 1: 6 of its 11 files", path=write_tar(tmp_path / "b.tar", samples + lost + more))
    alone = [("v.jxl", b"1"), ("v.cls", b"2")]  # a class of its own, which would vanish
    refused("class 2: no image in it (1 .jxl)", path=write_tar(tmp_path / "c.tar", samples + alone))


def test_columns_of_parquet_are_named_by_the_user(fastil, tmp_path):
    """They had to be renamed in the data, and text was no label."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)]
    table = pa.table({"jpg": images, "cls": [1, 0, 1, 0], "breed": ["pug", "Ape", "pug", "Ape"]})
    for split in ("train", "val"):
        pq.write_table(table, tmp_path / f"{split}-0.parquet")
    refused("no column image or img, only jpg, cls, breed", "--image-column", "image_column=", path=tmp_path)
    refused("no column label", "--label-column", path=tmp_path, image_column="jpg")
    refused("no column art, only", path=tmp_path, image_column="jpg", label_column="art")
    source = open_source(tmp_path, image_column="jpg", label_column="cls")
    assert (source.class_names, source.train.labels.tolist()) == (["0", "1"], [1, 0, 1, 0])
    source = open_source(tmp_path, image_column="jpg", label_column="breed")
    assert (source.class_names, source.train.labels.tolist()) == (["Ape", "pug"], [1, 0, 1, 0])
    options = ["--image-column", "jpg", "--label-column", "breed"]
    assert fastil("convert", tmp_path, "x.beton", *options).returncode == 0
    assert Beton(tmp_path / "x.beton").class_names == ["Ape", "pug"]
    keys = {"image_column": "jpg", "label_column": "breed"}
    assert load(tmp_path, **keys).class_names == ["Ape", "pug"]
    folder = write(tmp_path / "in", tree(cat=(".png", 2), dog=(".png", 2)))
    refused("is of the kind folder, and only parquet files take label_column", path=folder, label_column="breed")


def test_text_labels_that_are_missing_or_empty_are_named(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for labels, complaint in (
        (["a", None], "1 rows from row 0 on have no label"),
        (["a", ""], "row 1 has an empty label"),
    ):
        pq.write_table(pa.table({"image": [png(1), png(2)], "label": labels}), tmp_path / "a.parquet")
        refused(complaint, path=tmp_path / "a.parquet")
