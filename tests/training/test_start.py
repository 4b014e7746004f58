"""A run from Python: trained, read, and used to classify; each method by its own predictor."""

import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import fastil
from fastil.data import DataConfig, load_dataset
from fastil.errors import UserError
from fastil.methods import METHODS

SETTINGS = {"epochs": 2, "base_epochs": 3, "batch_size": 64, "classes": 6, "base_classes": 4, "increment": 2}
COSINE = {"head": "cosine", "last_relu": False, "loss": "softmax"}
PREDICTORS = {
    "cnn": {}, "scaled": COSINE | {"method": "lucir"}, "corrected": {"method": "bic", "exemplars_per_class": 10},
    "nearest mean": {"method": "icarl", "predictor": "nme", "loss": "softmax"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten():
    before = set(METHODS)
    yield
    for name in set(METHODS) - before:
        del METHODS[name]


@pytest.fixture(scope="module", params=PREDICTORS)
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return fastil.run("digits", out=out, **SETTINGS, **PREDICTORS[request.param])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits as PNG files, train/CLASS and val/CLASS, of twice their size."""
    root, split = tmp_path_factory.mktemp("folder"), load_dataset(DataConfig()).train
    for digit in range(4):
        for number, i in enumerate(split.of_class(digit)[:40]):
            path = root / ("train" if number < 30 else "val") / f"digit {digit}"
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[i]).resize((16, 16)).save(path / f"{number}.png")
    return root


def test_a_finished_run_predicts_what_it_was_evaluated_with(run):
    """At both steps, by whatever the method predicts with; and its results are those in its files."""
    assert json.loads((run.path / "results.json").read_text())["final_top1"] == run.results.final_top1
    val = load_dataset(DataConfig()).val
    for step, number in ((0, 0), (1, 1), (-1, 1)):
        true, predicted = np.load(run.path / f"predictions/step_{number}.npy").T
        network = run.network(step)
        seen = [c for classes in run.protocol.steps[: number + 1] for c in classes]
        assert network.class_names == [str(c) for c in seen]
        ids = np.flatnonzero(np.isin(val.labels, seen))
        with torch.no_grad():
            probabilities = network(torch.from_numpy(val.images[ids]))
        assert (probabilities.argmax(1).numpy() == predicted).mean() > 0.99  # rounding may turn a tie
        torch.testing.assert_close(probabilities.sum(1), torch.ones(len(ids)))
        as_floats = torch.from_numpy(val.images[ids[:5]]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(network(as_floats), probabilities[:5])
        confusion = run.confusion(step)
        assert confusion.trace() == (true == predicted).sum()
    assert not network.training


def test_probabilities_are_a_softmax_over_the_classes_seen_by_the_formula(tmp_path):
    run = fastil.run("digits", out=tmp_path / "run", **SETTINGS, method="bic", exemplars_per_class=10)
    images = load_dataset(DataConfig()).val.images[:7]
    state = torch.load(run.path / "checkpoints/predictor_1.pt", weights_only=True)["method"]
    network = run.network()
    with torch.no_grad():
        mean, std = (torch.tensor(getattr(run.recipe.data, key)).view(3, 1, 1) for key in ("mean", "std"))
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
        logits = network.network(pixels).logits[:, :6].double().numpy()
        found = network(torch.from_numpy(images)).numpy()
    assert not np.allclose(state["gamma"][4:6], 0)
    logits = logits * state["beta"][:6].double().numpy() + state["gamma"][:6].double().numpy()
    wanted = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found, wanted / wanted.sum(1, keepdims=True), rtol=1e-5, atol=1e-7)


def test_images_of_a_folder_are_classified_as_the_test_images_were(folder, tmp_path):
    settings = {
        "size": 8,
        "pad": 0,
        "epochs": 2,
        "base_epochs": 2,
        "base_classes": 2,
        "increment": 2,
        "model": "resnet8",
    }
    run = fastil.run("folder", folder, tmp_path / "run", **settings, batch_size=16)
    files = [path for c in run.network().class_names for path in sorted((folder / "val" / c).iterdir())]
    found = run.predict(files)
    names = run.network().class_names
    predicted = [names.index(next(iter(probabilities))) for probabilities in found]
    assert sorted(predicted) == sorted(np.load(run.path / "predictions/step_1.npy")[:, 1].tolist())
    assert all(list(p.values()) == sorted(p.values(), reverse=True) for p in found)
    assert run.predict(str(files[0])) == run.predict([files[0]]) == found[:1]
    with pytest.raises(UserError, match=r"nowhere\.png: No such file"):
        run.predict([folder / "nowhere.png"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png: not a readable image.*"):
        run.predict([tmp_path / "text.png"])


def test_runs_of_versions_that_kept_no_class_means_say_so(tmp_path):
    run = fastil.run("digits", out=tmp_path / "run", **SETTINGS, **PREDICTORS["nearest mean"])
    (tmp_path / "run/checkpoints/predictor_0.pt").unlink()
    with pytest.raises(UserError, match=r"predictor_0.pt: missing, as in runs of older versions"):
        run.network(0)
    run.network(1)
    with pytest.raises(UserError, match="step 2: has finished steps 0 to 1"):
        run.network(2)


def test_a_method_and_a_network_of_a_script_go_in_as_they_are_and_again_after_being_defined_anew(tmp_path):
    def define(share):
        class Halved(fastil.Method):
            def weigh(self, context):
                return 1.0, share if context.num_old else 0.0

        return Halved

    def backbone():
        module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
        module.feature_dim = 12
        return module

    for number, share in enumerate((0.5, 0.25)):
        out = tmp_path / str(number)
        run = fastil.run("digits", out=out, **SETTINGS, method=define(share), model=backbone, loss="softmax")
        assert run.results.method == "halved"
    assert (tmp_path / "0/metrics.jsonl").read_text() != (tmp_path / "1/metrics.jsonl").read_text()
    assert len(run.network().class_names) == 6
    assert run.results.steps[1].classes_seen == 6
    with pytest.raises(UserError, match="code that a run directory names is not loaded; give model= here, too"):
        fastil.Run(tmp_path / "1").network()
    images = torch.from_numpy(load_dataset(DataConfig()).val.images[:5])
    with torch.no_grad():
        again = fastil.Run(tmp_path / "1", model=backbone).network()(images)
        torch.testing.assert_close(again, run.network()(images))


def test_a_method_that_predicts_by_itself_is_given_to_a_run_again(tmp_path):
    class Turned(fastil.Method):
        def weigh(self, context):
            return 1.0, 0.0

        def predict(self, logits):
            return -logits

    images = torch.from_numpy(load_dataset(DataConfig()).val.images[:5])
    run = fastil.run("digits", out=tmp_path / "run", **SETTINGS, method=Turned, loss="softmax")
    network = run.network()
    with torch.no_grad():
        wanted = network(images)
        pixels = (images.permute(0, 3, 1, 2) / 255 - network.mean) / network.std
        torch.testing.assert_close(wanted.log(), (-network.network(pixels).logits[:, :6]).log_softmax(1))
        with pytest.raises(UserError, match="give method= here, too"):
            fastil.Run(tmp_path / "run").network()
        assert fastil.Run(tmp_path / "run").finished
        torch.testing.assert_close(fastil.Run(tmp_path / "run", method=Turned).network()(images), wanted)


@pytest.mark.parametrize(
    ("images", "shown"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8 \[2, 3, 8, 8\]"),
        (torch.full((2, 3, 8, 8), 255.0), "float32"), (torch.zeros(2, 1, 8, 8), r"\[2, 1, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"\[3, 8, 8\]"), (torch.zeros(2, 3, 16, 16), "16"),
        (torch.zeros(2, 8, 8, 3).long(), "int64"),
    ],
)  # fmt: skip
def test_images_that_would_be_taken_wrongly_are_refused(run, images, shown):
    with pytest.raises(UserError, match=f"{shown}.*: give uint8 .n, 8, 8, 3., or float .n, 3, 8, 8. in 0 to 1"):
        run.network()(images)


def test_resume_goes_on_from_a_stop_by_a_signal(tmp_path, monkeypatch):
    from fastil.training.trainer import Trainer

    step, count = Trainer.train_step, [0]

    def interrupted(self, *arguments):
        count[0] += 1
        if count[0] == 7:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, *arguments)

    whole = fastil.run("digits", out=tmp_path / "whole", **SETTINGS)
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="resume=True goes on"):
        fastil.run("digits", out=tmp_path / "part", **SETTINGS)
    part = fastil.run("digits", out=tmp_path / "part", resume=True, **SETTINGS)
    assert part.results == whole.results
    with pytest.raises(UserError, match="exists already"):
        fastil.run("digits", out=tmp_path / "part", **SETTINGS)


def test_it_runs_in_a_thread(tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(fastil.run("digits", None, tmp_path / "run", epochs=1, base_epochs=1))
    )
    thread.start()
    thread.join()
    assert found[0].results.steps[-1].classes_seen == 10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epoch": 3}, "unknown key epoch: did you mean epochs"), ({"epochs": "many"}, "epochs=many"),
        ({"lucir_lambda": 3.0}, "lucir_lambda=3.0: nothing reads it here"), ({"method": dict}, "method"),
        ({"model": torch.nn.Identity()}, "give a function with a name"), ({"model": torch.nn.Identity}, "feature_dim"),
        ({"method": "BiC"}, "did you mean bic"), ({"method": "mine.py"}, "write mine.py:NAME"),
        ({"model": "net.py"}, "write net.py:NAME"), ({"method": fastil.Method}, "write weigh"),
        ({"seed": True}, "seed=True: must be a number"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(settings, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        fastil.run("digits", out=tmp_path / "run", **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
