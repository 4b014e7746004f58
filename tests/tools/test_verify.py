"""`fastil verify` finds every flipped bit and names the sample it belongs to; `info` and `export` tell what is there.

Short counts here; FASTIL_SOAK=1 (make soak) has the full ones.
"""

import json
import os
import random
import re
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import SOAK, assert_user_error
from converting import decoded, encoded, photo, photos, run, write

from fastil.data.formats.beton import Beton
from fastil.data.formats.manifest import manifest_path
from fastil.errors import UserError
from fastil.tools.export import as_text, export, info
from fastil.tools.reporting import Reporter
from fastil.tools.verify import verify

FLIPS = 60  # of each file; every byte but the padding and some of the samples in a soak
SAMPLE_FLIPS = 2000
CUTS = 1000 if SOAK else 30
PAGE, FIELDS, ROWS = 2 << 20, 24, 24 + 3 * 1041
COUNT, CLASSES = 7, 3
SAMPLE_0 = "sample 0 (train/class0/0000.jpg) of class class0:"
SAMPLE_2 = "sample 2 (train/class0/0006.jpg) of class class0:"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def whole(request, tmp_path_factory):
    """A file and its content. Tests put back what they change."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write(folder / "in", photos(COUNT, CLASSES, size=(12, 15)))
    run(source, folder / "x.beton", mode=request.param)
    return folder / "x.beton", (folder / "x.beton").read_bytes()


@pytest.fixture
def file(whole, tmp_path):
    """A copy that a test may do anything to."""
    for path in (whole[0], manifest_path(whole[0])):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / "x.beton"


def problems(path, sample=None):
    found = verify(path, sample, 1, Reporter())
    assert all("\n" not in problem for problem in found)
    return found


def names(found, i):
    return any(re.search(rf"\bsample {i}\b", problem) for problem in found)


def places(content):
    """(start, end) of each sample, by hand."""
    table = struct.unpack_from("<Q", content, 16)[0]
    found = [struct.unpack_from("<QQQ", content, table + 24 * i) for i in range(COUNT)]
    return [(start, start + size) for _, start, size in found], table


def regions(content):
    """Name, first byte, end and the sample that it belongs to, of every part of a file."""
    samples, table = places(content)
    found = [("header", 0, FIELDS, None), ("fields", FIELDS, ROWS, None)]
    found += [("row", ROWS + 32 * i, ROWS + 32 * (i + 1), i) for i in range(COUNT)]
    found += [("padding", ROWS + 32 * COUNT, PAGE, None)]
    found += [("sample", start, end, i) for i, (start, end) in enumerate(samples)]
    found += [("padding", samples[-1][1], table, None)]
    found += [("place", table + 24 * i, table + 24 * (i + 1), i) for i in range(COUNT)]
    assert sum(end - start for _, start, end, _ in found) == len(content)
    return found


# A good file


def test_a_good_file_is_good(file, capsys):
    assert problems(file) == []
    for count in (1, 3, COUNT, 1000):
        assert problems(file, count) == []
    assert "copies" not in capsys.readouterr().out


def test_the_commands_tell_by_their_exit_status(fastil, file, tmp_path):
    process = fastil("verify", file, "--workers", 2)
    assert (process.returncode, process.stdout, process.stderr) == (0, f"{file}: good\n", "")
    process = fastil("verify", file, "--sample", 2, "--workers", 1, "--json")
    assert process.returncode == 0
    assert [json.loads(line) for line in process.stdout.splitlines()] == [
        {"event": "verified", "file": str(file), "good": True}
    ]
    content = bytearray(file.read_bytes())
    content[PAGE + 40] ^= 1
    file.write_bytes(content)
    process = fastil("verify", file, "--workers", 1)
    assert (process.returncode, process.stderr) == (1, "")
    first, *_, last = process.stdout.splitlines()
    assert first == f"{file}: {SAMPLE_0} its bytes are not those that were written"
    assert last == f"{file}: FAILED"
    assert_user_error(fastil("verify", tmp_path / "no.beton"), "no.beton", "no such file")


def test_what_cannot_be_looked_at_is_an_error(file, tmp_path):
    for path, words in ((tmp_path / "no.beton", "no such file"), (tmp_path, "no such file")):
        with pytest.raises(UserError, match=words):
            problems(path)
    with pytest.raises(UserError, match="--sample 0"):
        problems(file, 0)


def test_copies_are_told(tmp_path, capsys):
    files = photos(6)
    files["train/class0/copy.jpg"] = files["train/class1/0001.jpg"]
    files["train/class1/copy.jpg"] = files["train/class0/0000.jpg"]
    run(write(tmp_path / "in", files), tmp_path / "x.beton")
    assert problems(tmp_path / "x.beton") == []
    assert "2 images are copies of others" in capsys.readouterr().out


# Damage


def flipped(path, content, at, bit):
    """What is found with one bit changed; the file is as before afterwards."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ 1 << bit]))
        file.flush()
        found = problems(path)
        file.seek(at)
        file.write(content[at : at + 1])
    return found


def test_a_flipped_bit_is_found_wherever_it_is_and_its_sample_named(whole):
    path, content = whole
    random_bits, parts = random.Random(0), regions(content)
    if SOAK:
        chosen = [(part, at) for part in parts if part[0] not in ("padding", "sample") for at in range(*part[1:3])]
        samples = [part for part in parts if part[0] == "sample"]
        for _ in range(SAMPLE_FLIPS):
            part = random_bits.choice(samples)
            chosen.append((part, random_bits.randrange(*part[1:3])))
    else:
        kinds = ["header", "fields", "row", "padding", "sample", "place"]
        chosen = []
        for number in range(FLIPS):
            part = random_bits.choice([part for part in parts if part[0] == kinds[number % len(kinds)]])
            chosen.append((part, random_bits.randrange(*part[1:3])))
    for (kind, _, _, owner), at in chosen:
        found = flipped(path, content, at, random_bits.randrange(8))
        assert found, (kind, owner, at)
        if owner is not None:
            assert names(found, owner), (kind, owner, at, found)
    assert problems(path) == []


def test_every_bit_of_a_row_and_a_place_tells_its_sample(whole):
    path, content = whole
    table = places(content)[1]
    for at in (*range(ROWS + 32, ROWS + 64), *range(table + 24, table + 48)):
        for bit in range(8) if SOAK else (at % 8,):
            assert names(flipped(path, content, at, bit), 1), (at, bit)


def test_a_file_that_was_cut_names_the_first_sample_that_is_not_whole(whole):
    path, content = whole
    samples, table = places(content)
    moments = random.Random(0)
    lengths = [0, 1, 23, 24, ROWS - 1, ROWS + 31, PAGE - 1, PAGE, PAGE + 1, table - 1, table, len(content) - 1]
    lengths += [end + more for _, end in samples for more in (-1, 0, 1)]
    lengths += [moments.randrange(samples[0][0], samples[-1][1]) for _ in range(CUTS)]
    lengths += [moments.randrange(len(content)) for _ in range(CUTS // 10)]
    try:
        for length in sorted(lengths, reverse=True):
            os.truncate(path, length)
            (problem,) = problems(path)
            cut = next((i for i, (_, end) in enumerate(samples) if end > length), None)
            if cut is None:
                assert "samples from" not in problem, (length, problem)
            elif length >= 24:
                assert f"samples from {cut} on are not whole or gone" in problem, (length, problem)
    finally:
        path.write_bytes(content)


def test_a_jpeg_that_ends_in_zeros_is_whole(tmp_path):
    """Where the file is cut in the padding behind it."""
    files = {f"train/{c}/{i}.jpg": encoded(photo(9, 9, i)) + bytes(20) for c in "ab" for i in range(2)}
    run(write(tmp_path / "in", files), tmp_path / "x.beton")
    with Beton(tmp_path / "x.beton") as file:
        end = int(file.starts[-1] + file.lengths[-1])
    for length, words in ((end + 100, ""), (end, ""), (end - 1, "samples from 3 on"), (end - 21, "samples from 3 on")):
        os.truncate(tmp_path / "x.beton", length)
        (problem,) = problems(tmp_path / "x.beton")
        assert ("; samples" in problem) == bool(words)
        assert words in problem


def test_a_look_at_some_samples_sees_those_only(file):
    content = bytearray(file.read_bytes())
    start, end = places(content)[0][3]
    content[(start + end) // 2] ^= 4
    file.write_bytes(content)
    assert names(problems(file, 3), 3)  # samples 0, 3 and 6
    assert problems(file, 2) == []
    assert names(problems(file), 3)


def test_samples_put_in_another_order_are_found(whole):
    """A row and a place swapped with those of another sample: all of it is consistent but for the manifest."""
    path, content = whole
    table = places(content)[1]
    swapped = bytearray(content)
    for begin, size in ((ROWS, 24), (table, 24)):  # all but the id
        for a, b in ((1, 2), (2, 1)):
            step = 32 if begin == ROWS else 24
            swapped[begin + a * step : begin + a * step + size] = content[begin + b * step : begin + b * step + size]
    for i in (1, 2):
        swapped[table + 24 * i : table + 24 * i + 8] = struct.pack("<Q", i)
    path.write_bytes(swapped)
    try:
        found = problems(path)
    finally:
        path.write_bytes(content)
    assert names(found, 1)
    assert names(found, 2)


# Manifests


def edited(path, **changes):
    text = json.loads(manifest_path(path).read_text()) | changes
    manifest_path(path).write_text(json.dumps(text))


def test_the_manifest_of_another_file_is_found(file, tmp_path):
    other = tmp_path / "y.beton"
    mode = json.loads(manifest_path(file).read_text())["parameters"]["storage"]["mode"]
    shifted = {f"train/class{i % CLASSES}/{i:04d}.jpg": encoded(photo(12, 15, seed=50 + i)) for i in range(COUNT)}
    run(write(tmp_path / "other", shifted), other, mode=mode)
    ours, theirs = manifest_path(file).read_text(), manifest_path(other).read_text()
    manifest_path(file).write_text(theirs)
    manifest_path(other).write_text(ours)
    for path in (file, other):
        found = problems(path)
        assert all(names(found, i) for i in range(COUNT))
    run(write(tmp_path / "fewer", photos(COUNT - 1, CLASSES)), tmp_path / "z.beton", mode=mode)
    shutil.copyfile(manifest_path(tmp_path / "z.beton"), manifest_path(file))
    assert "belongs to another file, of 6 images" in problems(file)[0]


def test_a_manifest_that_says_something_else_is_found(file):
    whole = json.loads(manifest_path(file).read_text())
    counts = whole["counts"]
    assert len(counts) == CLASSES
    for changes, words in (
        ({"bytes": 5}, "the manifest says 5"),
        ({"sha256": "0" * 64}, "its header, a table or the padding"),
        ({"counts": [counts[0] - 1, counts[1] + 1, counts[2]]}, f"{SAMPLE_2} has"),
        ({"crc32": [0, *whole["crc32"][1:]]}, f"{SAMPLE_0} its bytes"),
        ({"names": []}, "its counts differ"),
        ({"class_names": ["class0"]}, "its counts differ"),
        ({"format": 2}, "install a newer one"),
    ):
        edited(file, **(whole | changes))
        assert any(words in problem for problem in problems(file)), (changes, problems(file))
    manifest_path(file).write_text("{")
    assert "damaged" in problems(file)[0]


def test_a_file_without_a_manifest_is_looked_at_as_far_as_it_goes(file, capsys):
    manifest_path(file).unlink()
    assert problems(file) == []
    assert "no manifest next to it, so there are no checksums to compare" in capsys.readouterr().out
    content = file.read_bytes()
    (start, _), table = places(content)[0][2], places(content)[1]
    for at, value in ((ROWS + 2 * 32 + 1, b"\1\0"), (table + 2 * 24 + 8, b"\7"), (table + 2 * 24, b"\1")):
        with open(file, "r+b") as opened:
            opened.seek(at)
            opened.write(value)
        assert names(problems(file), 2), at
        file.write_bytes(content)
    with Beton(file) as beton:
        mode = beton.mode
    if mode == "jpeg":
        with open(file, "r+b") as opened:
            opened.seek(start)
            opened.write(b"\0\0")
        assert "sample 2 of class 0: does not decode" in problems(file)[0]


# info


def test_info_tells_what_is_there(fastil, whole):
    path, content = whole
    found = info(path)
    assert (found["images"], found["counts"], found["class_names"]) == (7, [3, 2, 2], ["class0", "class1", "class2"])
    assert (found["heights"], found["widths"], found["bytes"]) == ([12, 12], [15, 15], len(content))
    assert (found["page_size"], found["split"], found["skipped"]) == (PAGE, "train", 0)
    text, made = as_text(found), "encoded again" if found["mode"] == "jpeg" else "decoded to pixels"
    for words in (
        "7 images of 3 classes, 4.2 MB", f"{found['mode']}, 15 to 15 wide, 12 to 12 high, pages of 2 MiB",
        "2 to 3 images each: class0, class1, class2", found["sha256"], "written   by fastil", "no validation images",
        f"changed   {found['reencoded']} {made}, 0 left out",
        f"folder: {path.parent / 'in'} (train)",
    ):  # fmt: skip
        assert words in text, (words, text)
    process = fastil("info", path, "--json")
    assert json.loads(process.stdout) == found
    assert fastil("info", path).stdout == text + "\n"
    assert_user_error(fastil("info", path.parent), str(path.parent), "cannot be read")


def test_info_of_a_file_without_a_manifest(file):
    manifest_path(file).unlink()
    found = info(file)
    assert (found["images"], found["class_names"]) == (7, ["0", "1", "2"])
    assert "no manifest next to it" in as_text(found)


# export


def exported(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_export_gives_the_images_back(whole, tmp_path):
    path, _ = whole
    assert export(path, tmp_path / "out", [], []) == COUNT
    found = exported(tmp_path / "out")
    with Beton(path) as beton:
        suffix = ".png" if beton.mode == "raw" else ".jpg"
        order = [0, 3, 6, 1, 4, 2, 5]
        assert sorted(found) == sorted(
            f"class{number % CLASSES}/{i:08d}_{number:04d}{suffix}" for i, number in enumerate(order)
        )
        for i, number in enumerate(order):
            content = found[f"class{number % CLASSES}/{i:08d}_{number:04d}{suffix}"]
            if beton.mode == "jpeg":
                assert content == beton.encoded(i)
            np.testing.assert_array_equal(decoded(content), beton.image(i))


@pytest.mark.parametrize(
    ("classes", "ids", "expected"),
    [(["class1"], [], [3, 4]), ([], [6, 0, 6], [0, 6]), (["class2", "class1"], [0, 3], [0, 3, 4, 5, 6])],
)
def test_export_by_class_and_id(whole, tmp_path, classes, ids, expected):
    assert export(whole[0], tmp_path / "out", classes, ids) == len(expected)
    assert sorted(int(Path(name).name[:8]) for name in exported(tmp_path / "out")) == expected


def test_export_refuses_what_is_not_there_and_what_is(fastil, whole, tmp_path):
    path, _ = whole
    process = fastil("export", path, "out", "--class", "class1", "--id", 0)
    assert (process.returncode, process.stdout) == (0, "3 images in out\n")
    before = exported(tmp_path / "out")
    assert_user_error(fastil("export", path, "out"), "out/class0/00000000_0000", "exists already", "empty folder")
    assert exported(tmp_path / "out") == before
    for arguments, words in (((["class9"], []), "--class class9"), (([], [7]), "--id 7"), (([], [-1]), "--id -1")):
        with pytest.raises(UserError, match=words):
            export(path, tmp_path / "other", *arguments)
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        export(path, tmp_path / "file", [], [])


def test_export_of_a_file_that_ffcv_wrote(file, tmp_path):
    manifest_path(file).unlink()
    assert export(file, tmp_path / "out", ["1"], []) == 2
    assert sorted(Path(name).with_suffix("").as_posix() for name in exported(tmp_path / "out")) == [
        "1/00000003", "1/00000004",
    ]  # fmt: skip


EVIL = ["../../evil", "a/b/c", "..", ".", ".hidden", "/etc/evil", "..\\evil", "a\0b", "", "x" * 300, "a\n", "\udcff"]


@pytest.mark.parametrize("evil", EVIL)
def test_names_from_the_manifest_stay_inside_the_folder(file, tmp_path, evil):
    edited(file, class_names=[evil, "class1", "class2"], names=[evil] * COUNT)
    before = set(tmp_path.rglob("*"))
    if len(evil) > 255:
        with pytest.raises(UserError, match="cannot be written"):
            export(file, tmp_path / "deep/out", [], [0])
    else:
        assert export(file, tmp_path / "deep/out", [], []) == COUNT
        found = exported(tmp_path / "deep/out")
        assert len(found) == COUNT
        assert all(name.count("/") == 1 and not name.startswith(".") for name in found)
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "deep") for path in new)


def test_an_export_that_fails_leaves_no_half_image(fastil, file, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    assert_user_error(fastil("export", file, "out", preexec_fn=limit), "cannot be written (File too large)")
    assert exported(tmp_path / "out") == {}
