"""Image folders: what becomes of each kind of file, and of each way a tree can be wrong."""

import tarfile

import numpy as np
import pytest
from conftest import SHARED
from making import png
from PIL import Image

from fastil.data import DataConfig, load_dataset
from fastil.data.formats import in_memory
from fastil.data.formats.detect import open_source
from fastil.data.formats.pixels import Reading
from fastil.data.formats.records import whole_file
from fastil.errors import UserError
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

TINY_IMAGENET = SHARED / "tiny-imagenet-40.tar"
SIZE = 8


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


def plain(root, *names):
    """One PNG of one colour for each name; the colour tells the files apart in the order they are given."""
    for number, name in enumerate(names):
        save(root / name, Image.new("RGB", (SIZE, SIZE), (number, 100, 200)))


def small_tree(root):
    plain(root, *(f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in range(3)))
    return root


def load(root, **keys):
    return load_dataset(DataConfig(dataset="folder", data=str(root), size=SIZE, **keys))


def colours(split):
    """The numbers `plain` gave the files, in the order of the split."""
    assert (split.images[..., 0] == split.images[:, :1, :1, 0]).all()
    return split.images[:, 0, 0, 0].tolist()


# Decoding


def decode(path, size, **how):
    return in_memory.decode(whole_file(path), size, Reading(**how))


def test_grayscale_becomes_three_equal_channels(tmp_path):
    grey = noise(SIZE, SIZE)[..., 0]
    found = decode(save(tmp_path / "a.png", grey), SIZE)
    assert found.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], grey)


@pytest.mark.parametrize("options", [{}, {"transparency": 3}, {"transparency": bytes(range(5))}])
def test_palette_images_show_the_colours_of_their_palette(tmp_path, options):
    colors, index = noise(5, 1).reshape(5, 3), noise(SIZE, SIZE)[..., 0] % 5
    image = Image.fromarray(index, "P")
    image.putpalette(colors.tobytes())
    np.testing.assert_array_equal(decode(save(tmp_path / "a.png", image, **options), SIZE), colors[index])


def test_cmyk_becomes_rgb(tmp_path):
    ink = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 255, 255, 0): (255, 0, 0),
           (0, 0, 0, 255): (0, 0, 0), (255, 255, 0, 0): (0, 0, 255), (0, 0, 0, 155): (100, 100, 100)}  # fmt: skip
    for number, (cmyk, rgb) in enumerate(ink.items()):
        path = save(tmp_path / f"{number}.tif", Image.new("CMYK", (SIZE, SIZE), cmyk))
        assert (decode(path, SIZE) == rgb).all(), (cmyk, rgb)


def sixteen_bit(path, values):
    """Written by hand where Pillow would not: big-endian PGM, otherwise through Pillow."""
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes())
    elif path.suffix == ".tiff":
        save(path, values.astype(">u2"))
    else:
        save(path, values)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".pgm"])
def test_sixteen_bit_grayscale_keeps_its_high_byte(tmp_path, suffix):
    steps = np.arange(SIZE * SIZE, dtype=np.int64).reshape(SIZE, SIZE)
    values = (65535 * steps // (SIZE * SIZE - 1)).astype(np.uint16)
    found = decode(sixteen_bit(tmp_path / f"a{suffix}", values), SIZE)
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], values // 256)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_and_not_blended(tmp_path, mode):
    pixels = noise(SIZE, SIZE, len(mode))
    pixels[: SIZE // 2, :, -1] = 0
    found = decode(save(tmp_path / "a.png", Image.fromarray(pixels, mode)), SIZE)
    np.testing.assert_array_equal(found, pixels[..., :3] if mode == "RGBA" else pixels[..., :1].repeat(3, axis=2))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_the_orientation_tag_is_applied_unless_it_is_to_be_ignored(tmp_path, suffix):
    pixels = noise(SIZE, SIZE + 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    path = save(tmp_path / f"a{suffix}", pixels, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    with Image.open(path) as opened:
        assert opened.getexif()[0x0112] == 6
    np.testing.assert_array_equal(decode(path, None), np.rot90(pixels, -1))
    np.testing.assert_array_equal(decode(path, None, exif="ignore"), pixels)


@pytest.mark.parametrize(
    ("width", "height", "size", "resized", "left", "top"),
    [
        (16, 16, 16, None, 0, 0),
        (24, 16, 16, None, 4, 0),
        (16, 21, 16, None, 0, 2),  # an odd rest is cut at the end
        (21, 16, 16, None, 2, 0),
        (40, 20, 10, (20, 10), 5, 0),
        (20, 40, 10, (10, 20), 0, 5),
        (30, 21, 14, (20, 14), 3, 0),
        (8, 8, 16, (16, 16), 0, 0),
        (12, 8, 16, (24, 16), 4, 0),
        (50, 37, 16, (22, 16), 3, 0),  # 21.6 is rounded
        (1, 100, 8, (8, 800), 0, 396),
    ],
)
def test_the_short_side_is_resized_and_the_centre_cropped(tmp_path, width, height, size, resized, left, top):
    image = Image.fromarray(noise(height, width, seed=width))
    path = save(tmp_path / "a.png", image)
    if resized:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    expected = np.asarray(image)[top : top + size, left : left + size]
    np.testing.assert_array_equal(decode(path, size), expected)


# Trees


def test_classes_and_files_are_taken_in_sorted_order(tmp_path):
    plain(tmp_path, "train/b/9.png", "train/b/10.png", "train/Z/1.png", "train/a/2.png", "train/a/1.png",
          "val/a/1.png", "val/b/1.png", "val/Z/1.png")  # fmt: skip
    dataset = load(tmp_path)
    assert dataset.name == tmp_path.name
    assert dataset.class_names == ["Z", "a", "b"]
    assert (colours(dataset.train), dataset.train.labels.tolist()) == ([2, 4, 3, 1, 0], [0, 1, 1, 2, 2])
    assert (colours(dataset.val), dataset.val.labels.tolist()) == ([7, 5, 6], [0, 1, 2])
    assert dataset.train.labels.dtype == np.int64
    assert not dataset.notes


def test_hidden_files_and_folders_and_what_is_no_class_are_left_out(tmp_path):
    small_tree(tmp_path)
    expected = load(tmp_path)
    (tmp_path / "train/cat/.DS_Store").write_bytes(b"no image")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/README.txt").write_text("not a class")
    plain(tmp_path, "train/cat/deeper/1.png", "extra/1.png")
    found = load(tmp_path)
    assert (found.class_names, found.train.sha256) == (expected.class_names, expected.train.sha256)
    assert found.notes == (
        "images in folders below their class: 1 in class cat left out; move them up",
        "1 files in no class folder are left out, such as train/README.txt",
    )


def test_class_folders_alone_are_training_images(tmp_path):
    plain(tmp_path, "a/1.png", "b/1.png")
    source = open_source(tmp_path)
    assert (source.class_names, [source.train.name(i) for i in range(2)], source.val) == (
        ["a", "b"],
        ["a/1.png", "b/1.png"],
        None,
    )


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_validation_images_are_known_by_other_names_if_they_have_the_classes(tmp_path, name):
    plain(tmp_path, "train/a/1.png", "train/b/1.png", f"{name}/a/2.png", f"{name}/b/2.png")
    source = open_source(tmp_path)
    assert [source.val.name(i) for i in range(2)] == [f"{name}/a/2.png", f"{name}/b/2.png"]
    assert source.notes == (f"{name}/ is taken for the validation images",)
    (tmp_path / name / "a").rename(tmp_path / name / "images")
    assert open_source(tmp_path).val is None


def test_images_in_folders_below_a_class_are_an_error_that_says_where_they_are(tmp_path):
    plain(tmp_path, "train/a/images/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    with pytest.raises(
        UserError, match=r"train/a: no image in it \(1 in folders below\); move its images up, or remove"
    ):
        open_source(tmp_path)


def test_what_is_no_image_by_its_name_is_left_out(tmp_path):
    plain(tmp_path, "train/a/1.png", "train/a/2.png", "train/b/1.JPG", "train/__MACOSX/1.png")
    (tmp_path / "train/a/2.png").rename(tmp_path / "train/a/2")
    (tmp_path / "train/b/Thumbs.db").write_bytes(b"thumbs")
    source = open_source(tmp_path, val="same")
    assert [source.train.name(i) for i in range(3)] == ["train/a/1.png", "train/a/2", "train/b/1.JPG"]
    assert source.notes[0] == ".db: 1 in class b left out"


def test_a_dataset_given_as_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(small_tree(tmp_path / "pets"))
    assert load(".").name == "pets"


@pytest.mark.parametrize("below", ["train", "."])
def test_val_may_lie_elsewhere(tmp_path, below):
    plain(tmp_path / "data" / below, "a/1.png", "b/1.png")
    plain(tmp_path / "elsewhere", "unused/1.png", "a/1.png", "b/1.png")
    (tmp_path / "elsewhere/unused/1.png").unlink()
    (tmp_path / "elsewhere/unused").rmdir()
    dataset = load(tmp_path / "data", val=str(tmp_path / "elsewhere"))
    assert (colours(dataset.train), colours(dataset.val)) == ([0, 1], [1, 2])


def test_val_wins_over_the_val_folder_of_the_data(tmp_path):
    small_tree(tmp_path)
    plain(tmp_path / "other", "x/unused.png", "cat/1.png", "dog/1.png")
    (tmp_path / "other/x/unused.png").rename(tmp_path / "other/unused.png")
    (tmp_path / "other/x").rmdir()
    assert colours(load(tmp_path, val=str(tmp_path / "other")).val) == [1, 2]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("present", "complaint"),
    [((), "no class folder"), (("only",), r"only one class folder \(only\)"), ((".git", "cat"), "only one class")],
)
def test_fewer_than_two_classes_are_refused(tmp_path, split, present, complaint):
    small_tree(tmp_path)
    (tmp_path / split).rename(tmp_path / "moved")
    (tmp_path / split).mkdir()
    plain(tmp_path / split, *(f"{name}/1.png" for name in present))
    with pytest.raises(UserError, match=f"{tmp_path / split}: {complaint}"):
        load(tmp_path)


@pytest.mark.parametrize(("there", "missing"), [("train", "val"), ("val", "train")])
def test_a_class_in_one_split_only_is_named_with_the_split_that_lacks_it(tmp_path, there, missing):
    small_tree(tmp_path)
    plain(tmp_path, f"{there}/emu/1.png")
    with pytest.raises(UserError, match=f"emu is in {tmp_path / there} but not in {tmp_path / missing}"):
        load(tmp_path)


@pytest.mark.parametrize("on_corrupt", ["fail", "skip"])
def test_an_empty_class_is_named(tmp_path, on_corrupt):
    small_tree(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "emu").mkdir()
        (tmp_path / split / "emu/.hidden").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/train/emu: no image"):
        load(tmp_path, on_corrupt=on_corrupt)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_split_is_named(tmp_path, missing):
    small_tree(tmp_path)
    (tmp_path / missing).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{tmp_path / missing}: no such folder"):
        load(tmp_path)


def test_a_missing_val_path_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load(small_tree(tmp_path), val=str(tmp_path / "nowhere"))


def test_images_that_cannot_fit_the_memory_are_refused_before_they_are_decoded(tmp_path):
    with pytest.raises(UserError, match="lower size"):
        load_dataset(DataConfig(dataset="folder", data=str(small_tree(tmp_path)), size=10**7))


# Damaged files


def damaged(path, kind):
    whole = save(path.with_name("whole.jpg"), noise(64, 64)).read_bytes()
    path.with_name("whole.jpg").unlink()
    content = {"truncated": whole[: len(whole) // 2], "text": b"this is a text, not an image\n", "empty": b""}
    if kind == "broken png":
        save(path.with_name("whole.png"), noise(64, 64))
        raw = bytearray(path.with_name("whole.png").read_bytes())
        path.with_name("whole.png").unlink()
        raw[100:120] = bytes(20)
        content[kind] = bytes(raw)
    path.write_bytes(content[kind])
    return path


KINDS = ["truncated", "text", "empty", "broken png"]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named(tmp_path, kind, split):
    small_tree(tmp_path)
    path = damaged(tmp_path / split / "dog" / "bad.JPEG", kind)
    with pytest.raises(UserError, match=str(path)) as error:
        load(tmp_path, on_corrupt="fail")
    assert "on_corrupt=skip" in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_left_out_and_named_in_a_note(tmp_path, kind, split):
    small_tree(tmp_path)
    whole = load(tmp_path)
    path = damaged(tmp_path / split / "cat" / "1-bad.JPEG", kind)  # between the others
    dataset = load(tmp_path, on_corrupt="skip")
    for name in ("train", "val"):
        assert getattr(dataset, name).sha256 == getattr(whole, name).sha256
    assert len(dataset.notes) == 1
    assert str(path) in dataset.notes[0]
    assert "1 of 7" in dataset.notes[0]


def test_many_damaged_files_are_counted_after_the_first_few(tmp_path):
    small_tree(tmp_path)
    paths = [damaged(tmp_path / "train/cat" / f"bad{i}.jpg", "text") for i in range(5)]
    with pytest.raises(UserError, match="2 more") as error:
        load(tmp_path)
    assert [str(path) in str(error.value) for path in paths] == [True] * 3 + [False] * 2
    assert "5 of 11" in load(tmp_path, on_corrupt="skip").notes[0]


def test_a_class_whose_files_are_all_damaged_is_refused_even_with_skip(tmp_path):
    small_tree(tmp_path)
    for path in (tmp_path / "train/cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="train has no image of class cat"):
        load(tmp_path, on_corrupt="skip")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_whose_files_are_all_damaged_is_refused_even_with_skip(tmp_path, split):
    small_tree(tmp_path)
    for path in (tmp_path / split).glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=split):
        load(tmp_path, on_corrupt="skip")


# Real images


@pytest.mark.skipif(not TINY_IMAGENET.exists(), reason="no ../shared/data/tiny-imagenet-40.tar next to the repository")
def test_real_images_decode_as_pillow_does(tmp_path):
    modes, per_class = set(), {}
    with tarfile.open(TINY_IMAGENET) as tar:
        for member in tar:  # some files of the first two classes, and on until there was a grayscale one
            with Image.open(tar.extractfile(member)) as image:
                mode = image.mode
            name = member.name.split("/")[1]
            if member.name.startswith("train/") and (mode not in modes or per_class.get(name, 0) < 6):
                tar.extract(member, tmp_path, filter="data")
                modes.add(mode)
                per_class[name] = per_class.get(name, 0) + 1
            if len(modes) > 1 and len(per_class) > 1 and min(per_class.values()) > 5:
                break
    dataset = load_dataset(DataConfig(dataset="folder", data=str(tmp_path), val=str(tmp_path / "train"), size=64))
    files = sorted((tmp_path / "train").glob("*/*"))
    assert {"RGB", "L"} <= modes
    assert len(dataset.train.images) == len(files)
    for file, pixels, label in zip(files, dataset.train.images, dataset.train.labels, strict=True):
        with Image.open(file) as image:
            rgb = image.convert("RGB")
        assert dataset.class_names[label] == file.parent.name
        np.testing.assert_array_equal(pixels, np.asarray(rgb))
        np.testing.assert_array_equal(decode(file, 64), np.asarray(rgb))
        half = rgb.resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(decode(file, 32), np.asarray(half))


# Halves of a data set


def halves(root, val="val", names=("ant", "bee", "cow")):
    for split in ("train", val):
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                (root / split / name / f"{i}.png").write_bytes(png(number))
    return root


def load_folder(path, **settings):
    return load_dataset(DataConfig(dataset="folder", data=str(path), size=8, **settings))


def test_a_half_of_a_data_set_names_the_whole(tmp_path, monkeypatch):
    """DIR/train/val was not there, it said, and the val file of the val file."""
    root = halves(tmp_path / "in")
    for half in ("train", "val"):
        with pytest.raises(UserError, match=rf"in/{half}: is one half of the data set .*; give --data {root}$"):
            load_folder(root / half)
    monkeypatch.chdir(root / "train")
    with pytest.raises(UserError, match=f"give --data {root}$"):
        load_folder(".")
    assert len(load_folder(root / "train", val=str(root / "val")).train.labels) == 6
    with pytest.raises(UserError, match=r"train/val: no such folder"):  # there is no other half
        load_folder(halves(tmp_path / "alone", val="other") / "train")
    convert(root, tmp_path / "x.beton", options_of(workers=1), Reporter())
    for dataset in ("folder", "imagenet"):
        with pytest.raises(
            UserError, match=rf"x\.val\.beton: holds the .* of x\.beton; give --data {tmp_path}/x\.beton$"
        ):
            load_dataset(DataConfig(dataset=dataset, data=str(tmp_path / "x.val.beton")))
    (tmp_path / "x.beton").unlink()
    with pytest.raises(UserError, match="give --data the file of its training images"):
        load_folder(tmp_path / "x.val.beton")


def test_a_class_renamed_in_test_is_named_in_both_splits(tmp_path):
    """test/ was passed over without a word, for its classes were others."""
    root = halves(tmp_path / "in", val="test")
    assert "test/ is taken for the validation images" in load_folder(root).notes
    (root / "test/bee").rename(root / "test/bees")
    with pytest.raises(
        UserError, match=r"class bee is in .*train but not in .*test; bees is in .*test but not in .*train"
    ):
        load_folder(root)
    for old, new in (("ant", "a"), ("cow", "c")):
        (root / "test" / old).rename(root / "test" / new)
    with pytest.raises(UserError, match="in/val: no such folder"):  # which has nothing in common with train
        load_folder(root)


def test_a_class_may_be_called_train(tmp_path):
    """As in CIFAR-100, whose train/ alone was refused."""
    root = halves(tmp_path / "in", names=("rabbit", "road", "train"))
    dataset = load_folder(root / "train", val=str(root / "val"))
    assert dataset.class_names == ["rabbit", "road", "train"]
    assert len(dataset.val.labels) == 6
