"""Tar archives, the folder inside one, and the ILSVRC2012 archives: whole ones, and every way one can be damaged."""

import contextlib
import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import SHARED
from making import listed, png, refused, tar_bytes, write_tar
from PIL import Image
from scipy.io import loadmat, savemat

from fastil.data.formats.detect import open_source
from fastil.data.formats.matfile import read_variables
from fastil.data.formats.tar import Member, Tar
from fastil.errors import UserError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = "a" * 90 + "/" + "b" * 120 + ".jpg"


def members(path):
    with Tar(path) as tar:
        return list(tar.members())


def broken(path, *parts):
    with pytest.raises(UserError) as error:
        members(path)
    assert "\n" not in str(error.value)
    for part in (path.name, *parts):
        assert str(part) in str(error.value), error.value


# The walk


@pytest.mark.parametrize("format", FORMATS)
def test_members_have_the_name_and_the_bytes_they_were_given(tmp_path, format):
    content = {"a.jpg": b"x", "sub/": None, "sub/empty": b"", "./dotted//b.jpg": b"y" * 513, "sub/block": b"z" * 512}
    if format != tarfile.USTAR_FORMAT:
        content |= {LONG: b"long", "k\u00e4se.jpg": b"utf-8"}
    else:
        content["p" * 80 + "/" + "q" * 60] = b"prefix"
    path = write_tar(tmp_path / "a.tar", content, format=format)
    raw = path.read_bytes()
    found = members(path)
    assert [(member.name, member.is_folder) for member in found] == [
        ("sub" if name == "sub/" else name.replace("./dotted//", "dotted/"), name == "sub/") for name in content
    ]
    assert [raw[member.offset : member.offset + member.size] for member in found] == [
        part or b"" for part in content.values()
    ]


def test_names_that_are_no_utf8_come_back_as_they_were(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"xx.jpg": b"1"})
    raw = bytearray(path.read_bytes())
    raw[0:2] = b"\xff\xfe"
    path.write_bytes(resum(raw))
    assert members(path)[0].name.encode("utf-8", "surrogateescape") == b"\xff\xfe.jpg"


def test_old_headers_without_a_magic_are_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"dir/": None, "dir/a": b"1"})
    raw = bytearray(path.read_bytes())
    for start in (0, 512):
        raw[start + 156 : start + 512] = bytes(356)  # type and all that came after version 7
        raw = resum(raw, start)
    path.write_bytes(raw)
    assert members(path) == [Member("dir", 512, 0, True), Member("dir/a", 1024, 1)]


def resum(raw, start=0):
    raw = bytearray(raw)
    raw[start + 148 : start + 156] = b" " * 8
    raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
    return raw


def test_an_archive_cut_at_any_byte_is_an_error(tmp_path):
    """But for the padding behind the end mark, which nothing needs."""
    whole = tar_bytes({"a.jpg": b"1" * 700, LONG: b"2" * 512, "sub/": None, "c.jpg": b""}, format=tarfile.PAX_FORMAT)
    end = len(whole.rstrip(b"\0"))
    end_of_members = -(-end // 512) * 512
    path = tmp_path / "a.tar"
    for cut in [*range(0, end_of_members, 61), *range(0, end_of_members + 1, 512), end_of_members + 511]:
        path.write_bytes(whole[:cut])
        broken(path)
    for cut in (end_of_members + 512, end_of_members + 1024):
        path.write_bytes(whole[:cut])
        assert len(members(path)) == 4


def test_an_archive_with_any_byte_of_a_header_changed_is_an_error(tmp_path):
    whole = tar_bytes({"a.jpg": b"1" * 700, "b.jpg": b"2"})
    path = tmp_path / "a.tar"
    for header in (0, 512 + 1024):
        for at in range(0, 512, 7):
            raw = bytearray(whole)
            raw[header + at] ^= 0x15
            path.write_bytes(raw)
            broken(path)


def size_of(number):
    return lambda raw: raw.__setitem__(slice(124, 136), number)


HEADERS = {
    "a size beyond the end": (size_of(b"77777777777\0"), "cut short"),
    "a size of 2 to the 88th": (size_of(b"\x80" + b"\xff" * 11), "cut short"),
    "a negative size": (size_of(b"\xff" * 12), "not a tar"),
    "a size with a sign": (size_of(b"-0000000001\0"), "not a tar"),
    "a size with an underscore": (size_of(b"000000_0001\0"), "not a tar"),
    "no octal": (size_of(b"00000000009\0"), "not a tar"),
    "an unknown type": (lambda raw: raw.__setitem__(156, ord("Q")), "unknown type"),
    "a link": (lambda raw: raw.__setitem__(156, ord("2")), "--dereference"),
    "a hard link": (lambda raw: raw.__setitem__(156, ord("1")), "--hard-dereference"),
    "a device": (lambda raw: raw.__setitem__(156, ord("3")), "a device"),
    "a sparse file": (lambda raw: raw.__setitem__(156, ord("S")), "sparse"),
    "another volume": (lambda raw: raw.__setitem__(156, ord("M")), "volume"),
    "an absolute name": (lambda raw: raw.__setitem__(slice(0, 5), b"/etc\0"), "leaves the archive"),
    "a name that climbs": (lambda raw: raw.__setitem__(slice(0, 8), b"a/../..\0"), "leaves the archive"),
    "no name": (lambda raw: raw.__setitem__(slice(0, 2), b"\0\0"), "without a name"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "complaint"), HEADERS.values(), ids=HEADERS)
def test_a_header_with_a_right_checksum_and_a_wrong_content_is_an_error(tmp_path, change, complaint):
    raw = bytearray(tar_bytes({"a.jpg": b"1"}))
    change(raw)
    path = tmp_path / "a.tar"
    path.write_bytes(resum(raw))
    broken(path, complaint)


PAX = {
    "no length": b"path=a\n", "too long": b"99 path=a\n", "too short": b"5 path=a\n", "zero": b"0 path=a\n",
    "no end": b"9 path=ab", "huge length": b"9" * 5000 + b" path=a\n", "negative": b"-9 path=a\n",
    "sparse": b"22 GNU.sparse.major=1\n", "climbing": b"14 path=../ab\n", "bad size": b"11 size=xx\n",
    "NUL": b"11 path=\0b\n",
}  # fmt: skip


@pytest.mark.parametrize("records", PAX.values(), ids=PAX)
def test_damaged_pax_records_are_an_error(tmp_path, records):
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", len(records)
    block = info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)
    path = tmp_path / "a.tar"
    path.write_bytes(block + tar_bytes({"a.jpg": b"1"}))
    broken(path)


def test_a_pax_size_stands_for_one_that_does_not_fit_the_header(tmp_path):
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", 12
    block = info.tobuf(tarfile.USTAR_FORMAT) + b"12 size=700\n" + bytes(500)
    whole = bytearray(tar_bytes({"a.jpg": b"1" * 700, "b.jpg": b"2"}))
    whole[124:136] = b"00000000000\0"
    path = tmp_path / "a.tar"
    path.write_bytes(block + resum(whole))
    assert members(path) == [Member("a.jpg", 1536, 700), Member("b.jpg", 1536 + 1024 + 512, 1)]


def test_many_small_pax_records_take_no_time(tmp_path):
    records = b"6 a=b\n" * 170_000
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"g", len(records)
    path = tmp_path / "a.tar"
    path.write_bytes(
        info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + tar_bytes({"a.jpg": b"1"})
    )
    assert [member.name for member in members(path)] == ["a.jpg"]


def test_a_description_of_gigabytes_is_not_read(tmp_path):
    for kind in b"LKxg":
        info = tarfile.TarInfo("big")
        info.type, info.size = bytes([kind]), 1 << 32
        path = tmp_path / "a.tar"
        path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(2048))
        broken(path, "4294967296")


def test_data_behind_the_end_mark_is_an_error(tmp_path):
    one, two = tar_bytes({"a.jpg": b"1"}), tar_bytes({"b.jpg": b"2"})
    path = tmp_path / "joined.tar"
    path.write_bytes(one + two)
    broken(path, "cat")
    path.write_bytes(one + bytes(2 << 20))  # a download that got its size before its bytes
    broken(path, "download is not complete")


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "0 bytes"), (b"<html>404</html>" * 100, "not a tar"), (bytes(511), "511 bytes"),
        (gzip.compress(b"x" * 2000) + bytes(600), "gunzip"), (b"BZh9" + bytes(600), "bunzip2"),
        (b"PK\x03\x04" + bytes(600), "unzip"), (b"\xfd7zXZ\0" + bytes(600), "unxz"),
    ],
)  # fmt: skip
def test_what_is_no_archive_is_called_so(tmp_path, raw, complaint):
    path = tmp_path / "a.tar"
    path.write_bytes(raw)
    broken(path, complaint)


def test_a_folder_or_nothing_in_place_of_an_archive_is_called_so(tmp_path):
    (tmp_path / "a.tar").mkdir()
    broken(tmp_path / "a.tar", "a folder")
    broken(tmp_path / "b.tar", "no such file")


@pytest.mark.parametrize("file", ["tiny-imagenet-40.tar", "imagenet-sample-200.tar"])
def test_real_archives_are_read_as_tarfile_reads_them(file):
    if not (SHARED / file).exists():
        pytest.skip(f"no ../shared/data/{file} next to the repository")
    with tarfile.open(SHARED / file) as tar:
        expected = [Member(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
    assert [member for member in members(SHARED / file) if not member.is_folder] == expected


# A folder in a tar

TREE = [
    ("val/", None), ("train/", None), ("train/dog/", None), ("train/dog/2.JPEG", png(0)), ("train/dog/10.jpg", png(1)),
    ("._train", b"apple"), ("train/dog/._2.JPEG", b"apple"), ("train/.DS_Store", b"finder"), ("README.txt", b"read me"),
    ("train/cat/b.png", png(2)), ("val/dog/x.jpg", png(3)), ("train/cat/a.PNG", png(4)), ("val/cat/x.jpg", png(5)),
    ("train/cat/deeper/a.jpg", png(6)), ("train/list.txt", b"no class"), ("test/images/1.jpg", png(7)),
]  # fmt: skip
TRAIN = [("train/cat/a.PNG", "cat", png(4)), ("train/cat/b.png", "cat", png(2)),
         ("train/dog/10.jpg", "dog", png(1)), ("train/dog/2.JPEG", "dog", png(0))]  # fmt: skip
VAL = [("val/cat/x.jpg", "cat", png(5)), ("val/dog/x.jpg", "dog", png(3))]


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_in_a_tar_lists_as_the_folder_does(tmp_path, format):
    path = write_tar(tmp_path / "pets.tar", TREE, format=format)
    source = open_source(path)
    assert (source.kind, source.name, source.class_names) == ("folder-tar", "pets", ["cat", "dog"])
    assert (listed(source, "train"), listed(source, "val")) == (TRAIN, VAL)
    assert source.train.where(0) == f"{path}: train/cat/a.PNG"
    with tarfile.open(path) as tar:
        for name, content in TREE:  # by hand: extractall would refuse nothing here, but its default changes
            if content is not None:
                (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "out" / name).write_bytes(tar.extractfile(name).read())
    unpacked = open_source(tmp_path / "out")
    assert (unpacked.kind, unpacked.class_names) == ("folder", ["cat", "dog"])
    assert (listed(unpacked, "train"), listed(unpacked, "val")) == (TRAIN, VAL)


@pytest.mark.parametrize("lead", ["pets", "one/two", "./pets", "train-data"])
def test_leading_folders_are_passed(tmp_path, lead):
    path = write_tar(tmp_path / "a.tar", [(f"{lead}/{name}", content) for name, content in TREE])
    lead = lead.removeprefix("./")
    assert listed(open_source(path), "train") == [(f"{lead}/{name}", *rest) for name, *rest in TRAIN]


def test_class_folders_at_the_top_with_val_elsewhere(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(name.removeprefix("train/"), png(1)) for name, _, _ in TRAIN])
    other = write_tar(tmp_path / "b.tar", [(f"lead/{name.removeprefix('val/')}", content) for name, _, content in VAL])
    expected = [(f"lead/{name.removeprefix('val/')}", *rest) for name, *rest in VAL]
    source = open_source(path, val=str(other))
    assert [name for name, _, _ in listed(source, "train")] == ["cat/a.PNG", "cat/b.png", "dog/10.jpg", "dog/2.JPEG"]
    assert listed(source, "val") == expected
    whole = write_tar(tmp_path / "whole.tar", TREE)
    assert listed(open_source(path, val=str(whole)), "val") == VAL  # the val/ of an archive that has both
    for name, _, content in VAL:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    found = listed(open_source(path, val=str(tmp_path / "folder/val")), "val")
    assert found == [(name.removeprefix("val/"), *rest) for name, *rest in VAL]
    assert "smoke test" in open_source(path, val="same").notes[0]
    alone = open_source(path)
    assert ([name for name, _, _ in listed(alone, "train")], alone.val) == (
        ["cat/a.PNG", "cat/b.png", "dog/10.jpg", "dog/2.JPEG"],
        None,
    )


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_validation_images_are_known_by_other_names_if_they_have_the_classes(tmp_path, name):
    named = [(path.replace("val/", f"{name}/"), content) for path, content in TREE if not path.startswith("test")]
    source = open_source(write_tar(tmp_path / "a.tar", named))
    assert [label for _, label, _ in listed(source, "val")] == [label for _, label, _ in VAL]
    others = [(path.replace(f"{name}/cat", f"{name}/images"), content) for path, content in named]
    assert open_source(write_tar(tmp_path / "b.tar", others)).val is None


def test_without_val_there_is_no_val(tmp_path):
    source = open_source(write_tar(tmp_path / "a.tar", [part for part in TREE if not part[0].startswith("val")]))
    assert (len(source.train), source.val) == (4, None)


def test_folder_archives_that_are_wrong(tmp_path):
    path = tmp_path / "a.tar"
    refused("train/dog/2.JPEG", "twice", path=write_tar(path, [*TREE, ("train/dog/2.JPEG", png(9))]))
    refused("train/emu", "no image", path=write_tar(path, [*TREE, ("train/emu/", None)]))
    refused(
        "val",
        "no class folder",
        path=write_tar(path, [*(part for part in TREE if not part[0].startswith("val")), ("val/", None)]),
    )
    refused("emu", "train but not in", path=write_tar(path, [*TREE, ("train/emu/1.jpg", png(1))]))
    refused("only one class folder (cat)", path=write_tar(path, {"train/cat/1.jpg": png(1)}))
    refused("train/cat/l.jpg", "--dereference", path=write_tar(path, [*TREE, ("train/cat/l.jpg", "2")]))
    path.write_bytes(tar_bytes(TREE)[:-10240])
    refused("a.tar", "cut short", path=path)
    raw = bytearray(tar_bytes({"train/c\u00e4t/1.jpg": png(1), "train/dog/1.jpg": png(2)}))
    raw[7:9] = b"\xff\xff"
    path.write_bytes(resum(raw))
    refused("not UTF-8", path=path)


def test_cifars_own_archive_has_to_be_unpacked_even_without_its_gz(tmp_path):
    for folder in ("cifar-100-python", "cifar-10-batches-bin"):
        path = tmp_path / f"{folder}.tar"
        with tarfile.open(path, "w") as tar:
            tar.addfile(tarfile.TarInfo(f"{folder}/test"))
        refused(path.name, "unpack it (tar -xf)", path=path)


def test_a_compressed_archive_has_to_be_unpacked_first(tmp_path):
    for name in ("a.tar.gz", "a.tgz", "a.tar"):
        (tmp_path / name).write_bytes(gzip.compress(tar_bytes(TREE)))
        refused(name, "gunzip", path=tmp_path / name)


def test_the_real_archives_are_listed_by_class():
    for file, classes, per_class in (("tiny-imagenet-40.tar", 40, (500, 50)), ("imagenet-sample-200.tar", 200, (1, 0))):
        path = SHARED / file
        if not path.exists():
            pytest.skip(f"no ../shared/data/{file} next to the repository")
        source = open_source(path)
        assert (source.kind, len(source.class_names)) == ("folder-tar", classes)
        assert np.bincount(source.train.labels).tolist() == [per_class[0]] * classes
        assert (source.val is None) == (per_class[1] == 0)
        for records in (source.train, source.val) if source.val else (source.train,):
            assert np.bincount(records.labels).tolist() == [len(records) // classes] * classes
            for i in range(0, len(records), len(records) // 7):
                assert records.name(i).split("/")[1] == source.class_names[records.labels[i]]
                Image.open(io.BytesIO(records.content(i))).load()


# ILSVRC2012

WNIDS = ["n01440764", "n01443537", "n02110341", "n03662601"]  # sorted
IDS = {"n03662601": 1, "n01443537": 2, "n02110341": 3, "n01440764": 4}  # the devkit's order is another
INNER = {"n00001740": 5, "n02084071": 6}  # nodes of WordNet above the classes
PHOTOS = {wnid: {f"{wnid}_{n}.JPEG": png(100 * k + n) for n in (10, 2, 33)[: 2 + (k == 1)]}
          for k, wnid in enumerate(WNIDS)}  # fmt: skip
TRUTH = [2, 4, 4, 1, 3, 2, 3, 1]  # devkit ids of val images 1 to 8


def meta_mat(ids=None, change=None, compressed=False):
    ids = IDS if ids is None else ids
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images"]  # fmt: skip
    rows = [(number, wnid, f"word of {wnid}, another", "gloss", 0, np.zeros((1, 0)), 0, len(PHOTOS.get(wnid, "")))
            for wnid, number in ids.items()]  # fmt: skip
    rows += [(number, wnid, f"node {wnid}", "gloss", 2, np.array([[1.0, 2.0]]), 1, 0) for wnid, number in INNER.items()]
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in fields])
    for row, values in enumerate(rows):
        for name, value in zip(fields, values, strict=True):
            synsets[row, 0][name] = value if isinstance(value, (str, np.ndarray)) else np.array([[float(value)]])
    if change:
        change(synsets)
    raw = io.BytesIO()
    savemat(raw, {"synsets": synsets}, do_compression=compressed)
    return raw.getvalue()


def devkit(meta=None, truth=TRUTH):
    folder = "ILSVRC2012_devkit_t12"
    return gzip.compress(
        tar_bytes(
            {
                f"{folder}/readme.txt": b"read me",
                f"{folder}/data/._meta.mat": b"apple",
                f"{folder}/data/meta.mat": meta_mat() if meta is None else meta,
                f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in truth).encode()
                if not isinstance(truth, bytes)
                else truth,
            }
        )
    )


def train_members():
    """The outer archive in no order, one class's archive with hidden files, a folder entry and a long name."""
    archives = {wnid: tar_bytes(PHOTOS[wnid]) for wnid in WNIDS}
    inner = {"./": None, "._n02110341_2.JPEG": b"apple", **PHOTOS["n02110341"]}
    archives["n02110341"] = tar_bytes(inner, format=tarfile.PAX_FORMAT)
    return [(f"{wnid}.tar", archives[wnid]) for wnid in ("n02110341", "n01440764", "n03662601", "n01443537")]


def val_members(count=8):
    order = [5, 1, 8, 2, 7, 3, 6, 4][:count]
    return [(f"ILSVRC2012_val_{n:08d}.JPEG", png(1000 + n)) for n in order]


def ilsvrc(folder, train=None, val=None, kit=None):
    folder.mkdir(exist_ok=True)
    for name, content in (
        ("ILSVRC2012_img_train.tar", tar_bytes(train_members()) if train is None else train),
        ("ILSVRC2012_img_val.tar", tar_bytes(val_members()) if val is None else val),
        ("ILSVRC2012_devkit_t12.tar.gz", devkit() if kit is None else kit),
    ):
        (folder / name).unlink(missing_ok=True)
        if content:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("given", [".", "ILSVRC2012_img_train.tar"])
def test_ilsvrc_archives_list_by_sorted_wnid_with_the_labels_of_the_devkit(tmp_path, given):
    source = open_source(ilsvrc(tmp_path) / given)
    assert (source.kind, source.class_names, source.notes) == ("ilsvrc", WNIDS, ())
    assert source.titles == [f"word of {wnid}, another" for wnid in WNIDS]
    # names sort as text: _10 before _2 before _33
    assert listed(source, "train") == [
        ("n01440764.tar/n01440764_10.JPEG", "n01440764", png(10)),
        ("n01440764.tar/n01440764_2.JPEG", "n01440764", png(2)),
        ("n01443537.tar/n01443537_10.JPEG", "n01443537", png(110)),
        ("n01443537.tar/n01443537_2.JPEG", "n01443537", png(102)),
        ("n01443537.tar/n01443537_33.JPEG", "n01443537", png(133)),
        ("n02110341.tar/n02110341_10.JPEG", "n02110341", png(210)),
        ("n02110341.tar/n02110341_2.JPEG", "n02110341", png(202)),
        ("n03662601.tar/n03662601_10.JPEG", "n03662601", png(310)),
        ("n03662601.tar/n03662601_2.JPEG", "n03662601", png(302)),
    ]
    # val images 2 and 3 are of devkit class 4, n01440764; 1 and 6 of 2; 5 and 7 of 3; 4 and 8 of 1
    assert listed(source, "val") == [
        ("ILSVRC2012_val_00000002.JPEG", "n01440764", png(1002)),
        ("ILSVRC2012_val_00000003.JPEG", "n01440764", png(1003)),
        ("ILSVRC2012_val_00000001.JPEG", "n01443537", png(1001)),
        ("ILSVRC2012_val_00000006.JPEG", "n01443537", png(1006)),
        ("ILSVRC2012_val_00000005.JPEG", "n02110341", png(1005)),
        ("ILSVRC2012_val_00000007.JPEG", "n02110341", png(1007)),
        ("ILSVRC2012_val_00000004.JPEG", "n03662601", png(1004)),
        ("ILSVRC2012_val_00000008.JPEG", "n03662601", png(1008)),
    ]
    where = source.train.where(0)
    assert where.endswith("ILSVRC2012_img_train.tar: n01440764.tar/n01440764_10.JPEG")


def test_a_renamed_train_archive_is_known_by_its_members(tmp_path):
    ilsvrc(tmp_path, val=b"", kit=b"")
    (tmp_path / "ILSVRC2012_img_train.tar").rename(tmp_path / "mine.tar")
    source = open_source(tmp_path / "mine.tar")
    assert (source.kind, len(source.train), source.val, source.titles) == ("ilsvrc", 9, None, None)
    assert len(source.notes) == 2


def test_val_of_ilsvrc_may_lie_elsewhere_or_be_train(tmp_path):
    ilsvrc(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a/ILSVRC2012_img_val.tar").rename(tmp_path / "b/ILSVRC2012_img_val.tar")
    for val in (tmp_path / "b", tmp_path / "b/ILSVRC2012_img_val.tar"):
        assert open_source(tmp_path / "a", val=str(val)).val.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    source = open_source(ilsvrc(tmp_path / "c", kit=b""), val="same")
    assert source.val is source.train
    assert "smoke test" in source.notes[-1]


def test_val_of_ilsvrc_may_be_unpacked_into_one_folder(tmp_path):
    """The devkit next to the train archive says which class each image is of."""
    ilsvrc(tmp_path / "a", val=b"")
    (tmp_path / "val").mkdir()
    for name, content in val_members():
        (tmp_path / "val" / name).write_bytes(content)
    source = open_source(tmp_path / "a", val=str(tmp_path / "val"))
    whole = open_source(ilsvrc(tmp_path / "b"))
    assert listed(source, "val") == listed(whole, "val")


def test_other_counts_than_the_devkit_says_are_noted(tmp_path):
    train = [(name, content) for name, content in train_members() if name != "n01440764.tar"]
    train.append(("n01440764.tar", tar_bytes({"n01440764_10.JPEG": png(1)})))
    source = open_source(ilsvrc(tmp_path, train=tar_bytes(train)))
    assert "1 classes have other counts" in source.notes[0]
    assert "n01440764 has 1 instead of 2" in source.notes[0]


def put(field, row, value):
    return lambda synsets: synsets[row, 0].__setitem__(field, value)


DAMAGED = {
    "a missing class": ({"train": tar_bytes(train_members()[1:])}, ["img_train.tar", "n02110341", "devkit"]),
    "a class of no devkit": (
        {"train": tar_bytes([*train_members(), ("n09999999.tar", tar_bytes({"a": b"1"}))])},
        ["img_train.tar", "n09999999"],
    ),
    "a class twice": ({"train": tar_bytes([*train_members(), train_members()[0]])}, ["n02110341.tar", "twice"]),
    "a class without images": (
        {"train": tar_bytes([*train_members()[1:], ("n02110341.tar", tar_bytes({}))])},
        ["n02110341.tar", "no image"],
    ),
    "an image twice": (
        {"train": tar_bytes([*train_members()[1:], ("n02110341.tar", tar_bytes([("a", b"1"), ("a", b"1")]))])},
        ["n02110341.tar/a", "twice"],
    ),
    "a class cut short": (
        {"train": tar_bytes([*train_members()[1:], ("n02110341.tar", tar_bytes(PHOTOS["n02110341"])[:1000])])},
        ["img_train.tar: n02110341.tar", "cut short"],
    ),
    "a class that is no archive": (
        {"train": tar_bytes([*train_members()[1:], ("n02110341.tar", b"<html>" * 200)])},
        ["img_train.tar: n02110341.tar", "not a tar"],
    ),
    "a compressed class": (
        {"train": tar_bytes([*train_members()[1:], ("n02110341.tar", gzip.compress(bytes(9999)) + bytes(512))])},
        ["img_train.tar: n02110341.tar", "gunzip"],
    ),
    "an image among the classes": (
        {"train": tar_bytes([*train_members(), ("stray.JPEG", png(1))])},
        ["img_train.tar", "stray.JPEG"],
    ),
    "train cut short": ({"train": tar_bytes(train_members())[:9000]}, ["img_train.tar", "cut short"]),
    "val cut short": ({"val": tar_bytes(val_members())[:3000]}, ["img_val.tar", "cut short"]),
    "fewer val images": ({"val": tar_bytes(val_members(7))}, ["img_val.tar", "7 images", "8"]),
    "a val image twice": (
        {"val": tar_bytes([*val_members(7), val_members(1)[0]])}, ["img_val.tar", "image 5", "twice"],
    ),
    "a val image with a wrong number": (
        {"val": tar_bytes([*val_members(7), ("ILSVRC2012_val_00000009.JPEG", b"1")])}, ["img_val.tar", "image 4"],
    ),
    "a val image with another name": (
        {"val": tar_bytes([*val_members(7), ("cat.JPEG", b"1")])}, ["img_val.tar", "cat.JPEG"],
    ),
    "a val image of an inner node": ({"kit": devkit(truth=[*TRUTH[:7], 5])}, ["devkit", "image 8", "class 5"]),
    "fewer labels": ({"kit": devkit(truth=TRUTH[:7])}, ["img_val.tar", "8 images", "7"]),
    "labels that are text": ({"kit": devkit(truth=b"one two")}, ["devkit", "ground_truth", "numbers"]),
    "no labels": ({"kit": devkit(truth=b"")}, ["devkit", "ground_truth"]),
    "no devkit": ({"kit": b""}, ["devkit", "missing"]),
    "a devkit cut short": ({"kit": devkit()[:400]}, ["devkit", "cannot be read"]),
    "a devkit of text": ({"kit": b"<html>404</html>"}, ["devkit", "cannot be read"]),
    "a devkit without meta": ({"kit": gzip.compress(tar_bytes({"a/readme": b"1"}))}, ["devkit", "meta.mat"]),
    "meta.mat of text": ({"kit": devkit(meta=b"<html>" * 100)}, ["devkit", "meta.mat"]),
    "meta.mat empty": ({"kit": devkit(meta=b"")}, ["devkit", "meta.mat"]),
    "meta.mat cut short": ({"kit": devkit(meta=meta_mat()[:700])}, ["devkit", "meta.mat"]),
    "meta.mat without classes": ({"kit": devkit(meta=meta_mat(ids={}))}, ["devkit", "meta.mat"]),
    "an id twice": ({"kit": devkit(meta=meta_mat(change=put("ILSVRC2012_ID", 1, 1.0)))}, ["meta.mat", "twice"]),
    "a wnid twice": ({"kit": devkit(meta=meta_mat(change=put("WNID", 1, "n03662601")))}, ["meta.mat", "twice"]),
    "an id of text": ({"kit": devkit(meta=meta_mat(change=put("ILSVRC2012_ID", 1, "x")))}, ["devkit", "meta.mat"]),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "complaints"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_ilsvrc_archives_are_named(tmp_path, parts, complaints):
    refused(*complaints, path=ilsvrc(tmp_path, **parts))


@pytest.mark.parametrize("compressed", [False, True])
def test_meta_mat_of_noise_is_an_error_or_read(tmp_path, compressed):
    """Also where scipy's reader crashes."""
    whole = meta_mat(compressed=compressed)
    generator = np.random.default_rng(0)
    for _ in range(300):
        raw = bytearray(whole[: generator.integers(len(whole) // 2, len(whole))])
        for at in generator.integers(128, len(raw), generator.integers(1, 12)):
            raw[at] = generator.integers(256)
        with contextlib.suppress(ValueError):
            read_variables(bytes(raw))


@pytest.mark.parametrize("compressed", [False, True])
def test_meta_mat_is_read_as_scipy_reads_it(compressed):
    raw = meta_mat(compressed=compressed)
    expected = loadmat(io.BytesIO(raw), squeeze_me=True)["synsets"]
    found = read_variables(raw)["synsets"]
    assert len(found) == len(expected) == 6
    for row, other in zip(found, expected, strict=True):
        assert list(row) == list(other.dtype.names)
        for field, value in row.items():
            if isinstance(value, str):
                assert value == other[field]
            else:
                np.testing.assert_array_equal(value, np.atleast_1d(other[field]))


def test_files_that_matlab_wrote_are_read_as_scipy_reads_them():
    files = sorted((Path(scipy.io.__file__).parent / "matlab/tests/data").glob("teststructarr_*.mat"))
    if not files:
        pytest.skip("scipy came without its tests")
    for file in files:
        expected = loadmat(file, squeeze_me=True)["teststructarr"]
        found = read_variables(file.read_bytes())["teststructarr"]
        assert len(found) == len(expected) == 2
        for row, other in zip(found, expected, strict=True):
            for field in ("one", "two"):
                assert np.atleast_1d(row[field]).tolist() == np.atleast_1d(other[field]).tolist()


def test_a_devkit_that_claims_a_huge_file_is_refused(tmp_path):
    info = tarfile.TarInfo("d/data/meta.mat")
    info.size = 1 << 40
    kit = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    refused("devkit", path=ilsvrc(tmp_path, kit=kit))


def test_a_class_archive_that_claims_more_than_it_has_does_not_read_the_next(tmp_path):
    inner = bytearray(tar_bytes({"a.JPEG": b"1" * 100}))
    inner[124:136] = struct.pack("12s", b"00000200000\0")  # 64 KiB, past the end of the member
    train = [*train_members()[1:], ("n02110341.tar", bytes(resum(inner)))]
    refused("n02110341.tar", "a.JPEG", "cut short", path=ilsvrc(tmp_path, train=tar_bytes(train)))
