"""Files carried in parts: whole again at the other end, or one line that names what to carry again."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import TINY, make_folder

from bench.carry import main, pack, unpack
from bench.wheels import ROOT
from fastil import recipe_file
from fastil.data import load_dataset

PART = 1000


def made(path, size, seed=0):
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


@pytest.fixture
def carried(tmp_path):
    """Two files in parts of PART bytes: 3 parts and 1."""
    files = [made(tmp_path / "a.beton", 2 * PART + 17), made(tmp_path / "b.beton", 5, seed=1)]
    pack(files, tmp_path / "parts", PART)
    return tmp_path / "parts"


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 7])
def test_a_file_of_any_size_arrives_whole(tmp_path, size):
    file = made(tmp_path / "x.beton", size)
    parts = pack([file], tmp_path / "parts", PART)
    assert len(parts) == -(-size // PART)
    assert all(part.stat().st_size <= PART for part in parts)
    (arrived,) = unpack(tmp_path / "parts", tmp_path / "there")
    assert arrived == tmp_path / "there/x.beton"
    assert arrived.read_bytes() == file.read_bytes()
    assert [path.name for path in arrived.parent.iterdir()] == ["x.beton"]


def test_the_manifest_holds_the_hashes_that_sha256sum_prints(carried):
    (entry, _) = json.loads((carried / "manifest.json").read_text())["files"]
    content = b"".join((carried / part["name"]).read_bytes() for part in entry["parts"])
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_what_is_missing_or_damaged_is_named_and_nothing_is_written(carried, tmp_path, capsys):
    (carried / "a.beton.001").unlink()
    content = bytearray((carried / "b.beton.000").read_bytes())
    content[2] ^= 1
    (carried / "b.beton.000").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["unpack", str(carried), str(tmp_path / "there")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error == f"{carried}: a.beton.001 is missing, b.beton.000 is damaged; carry them again\n"
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "text", [None, "", "{}", '{"files": 3}', '{"files": [{"name": "../x", "sha256": "", "parts": []}]}']
)
def test_a_manifest_that_is_none_is_one_line(carried, tmp_path, text):
    (carried / "manifest.json").unlink()
    if text is not None:
        (carried / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: (missing|damaged); carry it"):
        unpack(carried, tmp_path / "there")


def test_parts_in_another_order_are_noticed(carried, tmp_path):
    path = carried / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["parts"].reverse()
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"its parts do not make up a\.beton"):
        unpack(carried, tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())


def test_packing_says_what_it_cannot_do(carried, tmp_path):
    file = made(tmp_path / "x", 3)
    with pytest.raises(ValueError, match="not empty"):
        pack([file], carried)
    with pytest.raises(ValueError, match="no such file"):
        pack([tmp_path / "none"], tmp_path / "new")
    with pytest.raises(ValueError, match="two files have one name"):
        pack([file, file], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def carry(data, folder, *words):
    main(["pack", *map(str, words), str(data), str(folder / "parts")])
    main(["unpack", str(folder / "parts"), str(folder / "there")])
    return folder / "there"


def lines_of(process):
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.parametrize("count", [2, 5])
def test_the_first_classes_train_as_with_classes_n_on_the_whole(count, tmp_path, fastil):
    """The same classes in the same steps, of the same images."""
    data = make_folder(tmp_path / "data", classes=7)
    there = carry(data, tmp_path, "--classes", count, "--recipe", "folder")
    assert {path.name for path in there.iterdir()} == {f"first{count}.tar", f"first{count}.yaml"}

    part = load_dataset(recipe_file.load(str(there / f"first{count}.yaml"), data=str(there / f"first{count}.tar")).data)
    whole = load_dataset(recipe_file.load("folder", data=str(data)).data)
    keys = yaml.safe_load((there / f"first{count}.yaml").read_text())
    order = keys["order"]
    assert sorted(part.class_names) == sorted(order)
    assert len(order) == count
    for name in order:
        for ours, all_of_it in ((part.train, whole.train), (part.val, whole.val)):
            images = ours.images[ours.of_class(part.class_names.index(name))]
            assert np.array_equal(images, all_of_it.images[all_of_it.of_class(whole.class_names.index(name))])

    settings = [*TINY, "compile=false", f"base_classes={keys['base_classes']}", f"increment={keys['increment']}"]
    of_part = lines_of(fastil("run", there / f"first{count}.yaml", "--data", there / f"first{count}.tar", *settings))
    of_whole = lines_of(fastil("run", "folder", f"classes={count}", "--data", data, *settings))
    steps = [line for line in of_whole if line.startswith(("| ", "step ")) and "top-1" not in line]
    assert steps
    assert [line for line in steps if " adds " in line] == [line for line in of_part if " adds " in line]
    classes = next(line for line in of_whole if "class list" in line).split("class list ")[1].split(",")[0]
    assert any(f"class list {classes}" in line for line in of_part)


@pytest.mark.parametrize(("count", "base", "increments"), [
    (10, None, None), (3, 2, [1]), (2, 1, [1]), (5, 3, [1, 1]), (13, 7, [1, 1, 1, 1, 2]), (20, None, None),
])  # fmt: skip
def test_where_the_recipe_has_no_steps_for_so_few_classes_half_come_first(tmp_path, count, base, increments):
    data = make_folder(tmp_path / "data", classes=21, train=1, val=1)
    there = carry(data, tmp_path, "--classes", count, "--recipe", "folder")
    found = recipe_file.load(str(there / f"first{count}.yaml")).protocol
    assert (found.base_classes, found.increment) == (base, increments)


def test_pixels_are_carried_as_they_are(tmp_path):
    """From a source of pixels: a .beton."""
    from fastil.tools.convert import convert, options_of
    from fastil.tools.reporting import Reporter

    data = make_folder(tmp_path / "data", classes=4)
    convert(data, tmp_path / "x.beton", options_of(mode="raw", workers=1), Reporter())
    there = carry(tmp_path / "x.beton", tmp_path, "--classes", 3, "--recipe", "folder")
    part = load_dataset(recipe_file.load("folder", data=str(there / "first3.tar")).data)
    whole = load_dataset(recipe_file.load("folder", data=str(data)).data)
    for label, name in enumerate(part.class_names):
        images = whole.train.images[whole.train.of_class(whole.class_names.index(name))]
        assert np.array_equal(part.train.images[part.train.of_class(label)], images)


def test_it_says_how_much_is_to_be_carried_and_how_to_train_there(tmp_path, capsys):
    there = carry(make_folder(tmp_path / "data"), tmp_path, "--classes", 2, "--recipe", "folder")
    out = capsys.readouterr().out
    assert "MiB, to be carried at once\n" in out
    assert f"train on it: fastil run {there / 'first2.yaml'} --data {there / 'first2.tar'}\n" in out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--classes", "5", "--recipe", "folder"], "--classes 5: must lie between 2 and the 4 classes of "),
        (["--classes", "1", "--recipe", "folder"], "--classes 1: must lie between 2 and the 4 classes"),
        (["--classes", "2", "--recipe", "mine.yaml"], "--recipe mine.yaml: no recipe that comes with fastil"),
        (["--classes", "2", "--recipe", "imagenet_balanced_5"], "fastil convert --classes makes a small one to carry"),
        (["--classes", "2", "more"], "--classes 2: takes one data set, not 2"),
    ],
)
def test_classes_that_cannot_be_packed_are_one_line(tmp_path, capsys, words, error):
    with pytest.raises(SystemExit) as stopped:
        main(["pack", *words, str(make_folder(tmp_path / "data")), str(tmp_path / "parts")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1
    assert not (tmp_path / "parts").exists()


def test_classes_without_fastil_say_what_to_install(carried, tmp_path):
    """By a Python that has no packages."""
    words = ["pack", "--classes", "3", str(carried), str(tmp_path / "new")]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "bench.carry", *words], cwd=ROOT, capture_output=True, text=True, env={}
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"--classes needs fastil and what it requires \(No module named .*\): pip install -e \.\n", done.stderr
    )
