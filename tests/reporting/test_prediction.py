"""`fastil predict`: the classes of image files are those that the run was evaluated with, wherever they lie."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import assert_user_error
from making import PREDICTORS, THREE_STEPS
from PIL import Image

import fastil as package
from fastil.data import DataConfig, load_dataset
from fastil.errors import UserError
from fastil.reporting.prediction import BATCH, files_of, predictions, write_predictions
from fastil.reporting.runs import Run

TIE = 1e-5  # evaluation folds batch normalisation into the convolutions, so the last digits differ

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The test images as PNG files: val/5/00005.png."""
    root, val = tmp_path_factory.mktemp("digits"), load_dataset(DataConfig()).val
    for i, (image, label) in enumerate(zip(val.images, val.labels, strict=True)):
        path = root / f"val/{label}/{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root / "val"


@pytest.fixture(scope="module")
def bic(tmp_path_factory, without_figures):
    return package.run("digits", out=tmp_path_factory.mktemp("bic") / "run", **THREE_STEPS | PREDICTORS["bic"]).path


@pytest.mark.parametrize("kind", PREDICTORS)
def test_files_are_classified_as_the_run_was_evaluated(kind, digits, tmp_path, capsys):
    """At a middle step and the last one, top-1 of every test image of a class seen is that of predictions/."""
    run = package.run("digits", out=tmp_path / "run", **THREE_STEPS | PREDICTORS[kind])
    labels = load_dataset(DataConfig()).val.labels
    for step in (1, 2):
        seen = [c for classes in run.protocol.steps[: step + 1] for c in classes]
        capsys.readouterr()
        assert write_predictions(Run(run.path).network(step), [digits / str(c) for c in seen], as_json=True)
        found = {}
        for line in map(json.loads, capsys.readouterr().out.splitlines()):
            assert list(line) == ["image", "probabilities"]
            found[int(line["image"].removesuffix(".png").rpartition("/")[2])] = line["probabilities"]
        ids = np.flatnonzero(np.isin(labels, seen))
        assert sorted(found) == ids.tolist()
        true, predicted = np.load(run.path / f"predictions/step_{step}.npy").T
        same = 0
        for i, position, wanted in zip(ids, true, predicted, strict=True):
            assert seen[position] == labels[i]
            probabilities = found[i]
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
            assert set(probabilities) == {str(c) for c in seen}
            likeliest = next(iter(probabilities))
            same += likeliest == str(seen[wanted])
            assert probabilities[likeliest] - probabilities[str(seen[wanted])] < TIE
        assert same >= 0.99 * len(ids)


@pytest.fixture
def folder(digits, tmp_path):
    """Images in folders in folders, among what is none."""
    sources, top = sorted((digits / "3").iterdir()), tmp_path / "top"
    for name in ("b/2.png", "b/10.png", "b/c/a.png", "a.png", "b.png", ".hidden/x.png", "d/\x1b[31m\n.png"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(sources[0]).save(top / name)
    (top / "b/c/notes.txt").write_text("no image")
    (top / "b/broken.png").write_bytes(sources[0].read_bytes()[:60])
    (top / "b/link").symlink_to(top)
    (top / "b/nothing.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(top / "pipe.png")
    return top


ORDER = ["a.png", "b/10.png", "b/2.png", "b/broken.png", "b/c/a.png", "b/c/notes.txt", "b/link", "b/nothing.png",
         "b.png", "d/\x1b[31m\n.png", "pipe.png"]  # fmt: skip
NONE = ["b/broken.png", "b/c/notes.txt", "b/link", "b/nothing.png", "pipe.png"]


def test_a_folder_is_read_with_all_below_in_the_order_of_names(bic, folder, fastil):
    process = fastil("predict", bic, folder, "--json")
    assert (process.returncode, process.stderr) == (1, "")
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(folder / name) for name in ORDER]
    assert [line["image"] for line in lines if "error" in line] == [str(folder / name) for name in NONE]
    assert "\x1b" not in process.stdout

    process = fastil("predict", bic, folder)
    assert process.returncode == 1
    good = [line.split("\t") for line in process.stdout.splitlines()]
    shown = [str(folder / name) for name in ORDER if name not in NONE]
    assert [line[0] for line in good] == [*shown[:-1], f"{folder}/d/\\u001b[31m .png"]
    assert all(len(line) == 6 for line in good)
    wanted = list(lines[0]["probabilities"].items())[:5]
    assert good[0][1:] == [f"{100 * p:.1f} % {name}" for name, p in wanted]
    said = process.stderr.splitlines()
    assert len(said) == len(NONE)
    assert all(str(folder / name) in line for name, line in zip(NONE, said, strict=True))

    process = fastil("predict", bic, folder / "a.png", folder / "b/c/a.png", "--step", 0)
    assert (process.returncode, process.stderr) == (0, "")
    assert [len(line.split("\t")) for line in process.stdout.splitlines()] == [3, 3]  # of the two classes of step 0


def test_mistakes_are_one_line(bic, tmp_path, fastil):
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").write_bytes(b"")
    assert_user_error(fastil("predict", bic, "image.png", "nowhere"), "nowhere: no such image or folder")
    assert_user_error(fastil("predict", bic, "empty"), "empty: no images; give")
    assert_user_error(fastil("predict", bic, "image.png", "--step", 3), "step 3: has finished steps 0 to 2")
    assert_user_error(fastil("predict", "nowhere", "image.png"), "nowhere: no such run directory")
    assert_user_error(fastil("predict", bic, "image.png", "--method", "bic"), "comes with fastil")


def test_runs_of_versions_that_kept_no_correction_say_so(bic, tmp_path):
    copy = tmp_path / "run"
    copy.symlink_to(bic)
    path, aside = bic / "checkpoints/predictor_1.pt", tmp_path / "aside"
    path.rename(aside)
    try:
        with pytest.raises(UserError, match=r"predictor_1.pt: missing, as in runs of older versions"):
            Run(copy).network(1)
    finally:
        aside.rename(path)


def test_a_batch_at_a_time_is_read_and_what_is_none_does_not_shift_the_others(bic, digits, monkeypatch):
    """More files than a batch, in which every third is no image; each image comes out as it does alone."""
    network, read, most = Run(bic).network(), [], []
    image, forward = network.image, network.forward
    monkeypatch.setattr(network, "image", lambda path: (read.append(path), image(path))[1])
    monkeypatch.setattr(network, "forward", lambda images: (most.append(len(images)), forward(images))[1])
    good = [path for path in files_of([digits]) if "/3/" in str(path) or "/8/" in str(path)][:50]
    paths = [path for one in good for path in (one, one, one.with_suffix(".txt"))]
    found = []
    for one in predictions(network, paths):
        found.append(one)
        assert len(read) - len(found) < BATCH
    assert max(most) <= BATCH < len(paths)
    assert [one.path for one in found] == paths
    assert [one.problem is None for one in found] == [True, True, False] * 50
    with torch.no_grad():
        for one, path in zip(found[::3], good, strict=True):
            (alone,) = forward(torch.from_numpy(image(path).copy())[None])
            wanted = dict(zip(network.class_names, alone.tolist(), strict=True))
            assert one.probabilities == pytest.approx(wanted, abs=1e-5)


def test_a_run_of_ones_own_network_is_given_it_again(fastil, tmp_path, digits):
    code = """
import torch

def backbone():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    module.feature_dim = 12
    return module
"""
    (tmp_path / "own.py").write_text(code)
    settings = [f"{key}={value}" for key, value in THREE_STEPS.items()]
    assert fastil("run", "digits", *settings, "model=own.py:backbone", "--out", "run").returncode == 0
    image = next((digits / "4").iterdir())
    assert_user_error(fastil("predict", "run", image), "own.py:backbone", "give model= here, too", "--model")
    process = fastil("predict", "run", image, "--model", "own.py:backbone", "--json")
    assert process.returncode == 0, process.stderr
    assert len(json.loads(process.stdout)["probabilities"]) == 6
    process = fastil("export-model", "run", "out/model.pt2", "--model", "own.py:backbone")
    assert process.returncode == 0, process.stderr
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    assert program(torch.rand(5, 3, 8, 8)).shape == (5, 6)
