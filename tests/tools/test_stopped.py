"""A conversion that went on where another had stopped, and what was different by then."""

import json
import resource
import shutil

import pytest
from converting import encoded, outputs, photo, photos, run, write
from killing import KINDS, images, without

from fastil.data.formats.manifest import manifest_path, read_manifest
from fastil.errors import UserError
from fastil.tools.reporting import Reporter

CUT = encoded(photo(60, 60))[:-300]  # seen when it is decoded only


class Stop(Reporter):
    """Ends the work as a stage begins."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def begin(self, stage, *others):
        super().begin(stage, *others)
        if stage == self.at:
            raise KeyboardInterrupt


def stopped(source, folder, at, **options):
    with pytest.raises(KeyboardInterrupt):
        run(source, without(folder) / "x.beton", reporter=Stop(at), commit_bytes=1, **options)


def whole(source, folder, **options):
    run(source, without(folder) / "x.beton", **options)
    return outputs(folder)


def bitmaps(seed=0):
    """By relative name: images of one size and one number of bytes."""
    return {
        f"{split}/{name}/{i}.bmp": encoded(photo(100, 120, seed + 10 * i), "BMP")
        for split in ("train", "val") for name in "ab" for i in range(3)
    }  # fmt: skip


def test_notes_are_those_of_the_split(tmp_path):
    files = bitmaps()
    del files["val/b/2.bmp"]
    run(write(tmp_path / "in", files), tmp_path / "x.beton")
    for split, path, count in (("train", "x.beton", 6), ("val", "x.val.beton", 5)):
        notes = read_manifest(manifest_path(tmp_path / path)).notes
        lossless = [note for note in notes if "lossless" in note]
        assert lossless == [
            f"{split}: {count} lossless images become JPEGs of quality 95; --mode raw keeps their pixels"
        ]


@pytest.mark.parametrize("stage", ["audit val", "convert val"])
def test_an_image_that_fails_behind_the_first_split_is_left_out_by_the_same_command_with_skip(tmp_path, stage):
    source, folder = (
        write(tmp_path / "in", photos(6) | photos(4, split="val") | {"val/class0/9.jpg": CUT}),
        tmp_path / "x",
    )
    with pytest.raises(UserError, match=r"9\.jpg.*--on-corrupt skip"):
        run(source, without(folder) / "x.beton")
    assert (folder / "x.beton").exists()
    run(source, folder / "x.beton", on_corrupt="skip")
    assert outputs(folder) == whole(source, tmp_path / "y", on_corrupt="skip")
    with pytest.raises(UserError, match=r"x\.val\.beton: exists.*other --on-corrupt"):
        run(source, folder / "x.beton")


def test_a_manifest_from_before_on_corrupt_was_left_out_of_it_is_known_again(tmp_path, capsys):
    source = write(tmp_path / "in", photos(5))
    run(source, tmp_path / "x.beton")
    path = tmp_path / "x.manifest.json"
    content = json.loads(path.read_text())
    content["parameters"]["on_corrupt"] = "fail"
    path.write_text(json.dumps(content))
    run(source, tmp_path / "x.beton", on_corrupt="skip")
    assert "converted already" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_other_bytes_but_the_same_size_is_written_again(tmp_path, capsys, kind, mode):
    """In what had been written, of which the listing says the same before and after."""
    folder, options = tmp_path / "x", {"on_corrupt": "skip", "mode": mode}
    files = {
        (s, name, f"{i}.bmp"): encoded(photo(20, 120, i), "BMP")
        for s in ("train", "val")
        for name in ("cat", "dog")
        for i in range(3)
    }
    source = KINDS[kind](tmp_path / "in", files)
    stopped(source, folder, "read back", **options)
    shutil.rmtree(tmp_path / "in")
    changed = files | {("train", "cat", "1.bmp"): encoded(photo(20, 120, 99), "BMP")}
    assert KINDS[kind](tmp_path / "in", changed) == source
    capsys.readouterr()
    run(source, folder / "x.beton", **options)
    said = capsys.readouterr().out
    assert "has changed since the last attempt" in said
    assert "going on after 1 images" in said
    assert outputs(folder) == whole(source, tmp_path / "y", **options)


def test_an_image_that_was_left_out_and_is_good_now_is_written(tmp_path):
    good = encoded(photo(60, 60))
    bad = good[: len(good) // 2].ljust(len(good), b"\0")
    source = write(tmp_path / "in", photos(6) | {"train/class0/0001.jpg": bad})
    folder, options = tmp_path / "x", {"on_corrupt": "skip"}
    stopped(source, folder, "read back", **options)
    (source / "train/class0/0001.jpg").write_bytes(good)
    run(source, folder / "x.beton", **options)
    assert outputs(folder) == whole(source, tmp_path / "y", **options)
    assert read_manifest(folder / "x.manifest.json").skipped == []


def test_images_of_other_sizes_are_not_what_a_finished_split_was_made_of(tmp_path):
    source, folder = KINDS["folder"](tmp_path / "in", images(4)), tmp_path / "x"
    stopped(source, folder, "convert val", on_corrupt="skip")
    before = outputs(folder)["x.beton"]
    for name in ("000.jpg", "grey.jpg", "large.png"):  # kept, and encoded
        path = source / "train/cat" / name
        content = path.read_bytes()
        path.write_bytes(encoded(photo(31, 99, 7)))
        with pytest.raises(UserError, match=r"x\.beton: exists, of another conversion \(other sizes of images\)"):
            run(source, folder / "x.beton", on_corrupt="skip")
        path.write_bytes(content)
    assert outputs(folder)["x.beton"] == before
    run(source, folder / "x.beton", on_corrupt="skip")
    assert outputs(folder) == whole(source, tmp_path / "y", on_corrupt="skip")


@pytest.mark.parametrize("at", ["audit val", "convert train", "read back", "convert val"])
def test_an_output_within_the_source_is_no_part_of_it(tmp_path, at):
    """Class folders without train/, where the files would count as images in no class."""
    source = write(tmp_path / "in", photos(6, split="."))
    (source / "notes.txt").write_text("found in 2020")
    run(source, source / "x.beton", val="same")
    expected = outputs(source)
    assert "1 files in no class folder are left out, such as train/notes.txt" in expected["x.manifest.json"]
    for path in source.glob("x.*"):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(source, source / "x.beton", val="same", reporter=Stop(at), commit_bytes=1)
    run(source, source / "x.beton", val="same")
    assert outputs(source) == expected


def test_a_full_disk_in_the_second_split_and_the_same_command_goes_on(tmp_path):
    """By a limit on the size of a file, which lies behind the first page of the larger split."""
    files = {
        f"{split}/{name}/{i}.jpg": encoded(photo(200, 200, i))
        for split, count in (("train", 2), ("val", 20)) for name in "ab" for i in range(count)
    }  # fmt: skip
    source, folder = write(tmp_path / "in", files), without(tmp_path / "x")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, before[1]))
    try:
        with pytest.raises(UserError, match=r"x\.val\.beton\.partial: disk full .* goes on from what is in place"):
            run(source, folder / "x.beton", mode="raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (folder / "x.beton").exists()
    run(source, folder / "x.beton", mode="raw")
    assert outputs(folder) == whole(source, tmp_path / "y", mode="raw")
