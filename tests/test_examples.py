"""The examples run as they stand, and show what they say."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, make_folder

from fastil.data import Batch
from fastil.data.formats.beton import Beton
from fastil.methods import LossConfig, MethodConfig, StepContext
from fastil.models import Output
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_the_balanced_softmax_finds_the_rare_classes_more_often():
    import loss_in_your_loop

    accuracy = loss_in_your_loop.main()
    assert accuracy["BalancedSoftmaxLoss"] > accuracy["CrossEntropyLoss"] + 5


def test_the_loader_yields_what_was_asked_for(tmp_path):
    import loader_in_your_loop

    convert(make_folder(tmp_path / "images", size=80), tmp_path / "x.beton", options_of(workers=1), Reporter())
    labels = Beton(tmp_path / "x.beton").labels
    new = int((labels < 2).sum())
    assert loader_in_your_loop.main(str(tmp_path / "x.beton"), epochs=2) == 2 * (new + -(-(len(labels) - new) // 5))


def test_a_method_of_ones_own_runs(fastil, tmp_path):
    method = f"method={ROOT}/examples/your_own_method.py:FixedShare"
    settings = ["digits", *TINY, "classes=6", "base_classes=4", "increment=2", "loss=balanced", method]
    done = fastil("run", *settings, "fixed_share=0.3", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "run/results.json").read_text())["steps"]) == 2


@pytest.mark.parametrize("loss", ["softmax", "balanced"])
def test_smoothed_labels_are_torchs(loss):
    """The loss and its gradient are those of torch's own label smoothing over the classes seen, under the prior of the
    classification loss; columns of other classes have no say."""
    from label_smoothing import Config, Smoothed

    counts = np.array([2, 2, 3, 1, 50, 40, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    method = Smoothed(MethodConfig(), LossConfig(loss=loss), 16, torch.device("cpu"), {"own": Config(0.2)}, 11)
    method.begin_step(StepContext(1, 4, 7, counts))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 7, (9,), generator=generator)
    prior = torch.from_numpy(counts[:7]).log() if loss == "balanced" else torch.zeros(7)
    wanted = 3 / 7 * F.cross_entropy(logits[:, :7] + prior, labels, label_smoothing=0.2)
    images, ids = torch.zeros(9, 3, 1, 1), torch.arange(9)
    found = method.loss(Batch(images, labels, ids), Output(torch.zeros(9, 1), [], logits), None)
    torch.testing.assert_close(found, wanted.float())
    (gradient,), (right,) = (torch.autograd.grad(value, logits) for value in (found, wanted))
    torch.testing.assert_close(gradient, right, atol=1e-6, rtol=1e-5)


def test_the_method_with_smoothed_labels_runs(fastil, tmp_path):
    method = f"method={ROOT}/examples/label_smoothing.py:Smoothed"
    done = fastil("run", "digits", *TINY, "classes=6", "base_classes=4", "increment=2", method, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "run/results.json").read_text())["steps"]) == 2
    done = fastil("plan", "digits", method, "smoothing=1.5")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "smoothing=1.5" in done.stderr


def test_a_network_of_ones_own_runs(fastil, tmp_path):
    settings = ["digits", *TINY, "classes=6", "base_classes=4", "increment=2"]
    done = fastil("run", *settings, f"model={ROOT}/examples/your_own_network.py:backbone", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "run/results.json").read_text())["steps"]) == 2


def test_a_finished_run_classifies(tmp_path):
    """Images of one colour a class, which a few epochs suffice for."""
    import predict

    folder = make_folder(tmp_path / "images", classes=10, size=40)
    image = next((folder / "val").glob("*/*"))
    out = str(tmp_path / "run")
    probabilities = predict.main(str(folder), str(image), out)
    assert len(probabilities) == 10
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert predict.main(str(folder), str(image), out) == probabilities  # read again, not trained again


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 45
