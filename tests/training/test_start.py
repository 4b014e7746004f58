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

SETTINGS = {"epochs": 2, "base_epochs": 3, "batch_size": 64, "classes": 6, "base_classes": 4, "increment": 2,
            "precision": "fp32"}  # fmt: skip
COSINE = {"head": "cosine", "last_relu": False, "loss": "softmax"}
PREDICTORS = {
    "cnn": {}, "scaled": COSINE | {"method": "lucir"}, "corrected": {"method": "bic", "exemplars_per_class": 10},
    "nearest mean": {"method": "icarl", "predictor": "nme", "loss": "softmax"},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastil.reporting.figures.draw_run", lambda path: None)
        yield


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
    assert run.predict(str(files[0])) == run.predict([files[0]]) == [pytest.approx(found[0])]  # a batch of another size
    with pytest.raises(UserError, match=r"nowhere\.png: cannot be read \(No such file.*give an image file"):
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
            def loss_weights(self, context):
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
        def loss_weights(self, context):
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
        (torch.full((2, 3, 8, 8), 255.0), "float32"), (torch.full((2, 3, 8, 8), torch.nan), "float32"),
        (torch.full((2, 3, 8, 8), 1.01), "float32"), (np.zeros((2, 8, 8, 3), np.uint8), "ndarray uint8"),
        ([[0.5]], "list"), (torch.zeros(2, 1, 8, 8), r"\[2, 1, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"\[3, 8, 8\]"), (torch.zeros(2, 3, 16, 16), "16"),
        (torch.zeros(2, 8, 8, 3).long(), "int64"),
    ],
)  # fmt: skip
def test_images_that_would_be_taken_wrongly_are_refused(run, images, shown):
    with pytest.raises(UserError, match=f"{shown}.*: give uint8 .n, 8, 8, 3., or float .n, 3, 8, 8. in 0 to 1"):
        run.network()(images)


def test_any_float_is_taken_and_comes_out_as_float32(run):
    """Rounding may leave 0 to 1; no image is no mistake."""
    images = torch.rand(3, 3, 8, 8)
    network = run.network()
    with torch.no_grad():
        wanted = network(images)
        torch.testing.assert_close(network(images.double()), wanted)
        torch.testing.assert_close(network(images.clamp(min=1e-6) + 1e-6), wanted, atol=1e-3, rtol=1e-3)
        assert network(images[:0]).shape == (0, 6)
        lower = network.to(torch.bfloat16)(images)
        assert lower.dtype == torch.float32
        torch.testing.assert_close(lower, wanted, atol=0.1, rtol=0)


def test_it_can_be_exported(run):
    network, images = run.network(), torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    floats = images.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        exported = torch.export.export(network, (floats,)).module()
        torch.testing.assert_close(exported(floats), network(images))


def backbone_of(width):
    """Networks of one name and one shape."""

    def backbone():
        module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, width))
        module.feature_dim = width
        return module

    return backbone


def method_of(share):
    class Mine(fastil.Method):
        def loss_weights(self, context):
            return 1.0, share if context.num_old else 0.0

    return Mine


def test_a_run_holds_its_code_and_leaves_the_process_alone(tmp_path):
    before, images = dict(METHODS), torch.from_numpy(load_dataset(DataConfig()).val.images[:5])
    settings = SETTINGS | {"loss": "softmax", "epochs": 1, "base_epochs": 1, "base_classes": 3, "increment": 3}
    plain = fastil.run("digits", out=tmp_path / "plain", **settings | {"model": "resnet8"})
    with pytest.raises(UserError, match="was run with il_baseline, which comes with fastil; leave method or model out"):
        fastil.Run(plain.path, method=method_of(0.5))
    with pytest.raises(UserError, match="was run with resnet8, which comes with fastil"):
        fastil.Run(plain.path, model=backbone_of(12))
    with pytest.raises(UserError, match="which comes with fastil"):
        fastil.Run(plain.path, model="resnet14")
    given = {
        "method": type("Mine", (method_of(0.5),), {"predict": lambda self, logits: logits}),
        "model": backbone_of(12),
    }
    fastil.run("digits", out=tmp_path / "run", **settings, **given)
    one, two = (
        fastil.Run(tmp_path / "run", model=backbone_of(12), method=type("Mine", (method_of(0.5),), {"predict": how}))
        for how in (lambda self, logits: logits, lambda self, logits: -logits)
    )
    with torch.no_grad():
        first, second = one.network()(images), two.network()(images)
    torch.testing.assert_close(first.log() + second.log(), (first.log() + second.log())[:, :1].expand(5, 6))
    with pytest.raises(UserError, match=r"step_1\.pt: its weights are of another network .*; give the code") as error:
        fastil.Run(tmp_path / "run", method=given["method"], model=backbone_of(7)).network()
    assert "\n" not in str(error.value)
    assert before == METHODS


def test_a_method_predicts_in_the_step_that_was_evaluated(tmp_path):
    run = fastil.run(
        "digits", out=tmp_path / "run", **SETTINGS | {"base_epochs": 1}, method=method_of_last(), loss="softmax"
    )
    with torch.no_grad():
        found = run.network()(torch.from_numpy(load_dataset(DataConfig()).val.images[:5]))
    assert (found[:, :4] < 1e-6).all()
    assert (found[:, 4:] > 1e-6).any(1).all()


def method_of_last():
    class Last(fastil.Method):
        """Predicts a class of the last step, of those with many training images."""

        def loss_weights(self, context):
            return 1.0, 0.0

        def predict(self, logits):
            new = torch.arange(logits.shape[1]) >= self.context.num_old
            many = torch.from_numpy(self.context.counts) > 30
            return torch.where(new & many, logits, -1e4)

    return Last


@pytest.mark.parametrize("key", ["model", "method"])
def test_code_that_was_edited_since_is_told_by_its_source(tmp_path, key):
    """Edited code with the same name and shapes is neither resumed nor taken as a base step."""
    settings = SETTINGS | {"loss": "softmax", "epochs": 1, "base_epochs": 1, "base_classes": 3, "increment": 3}

    def made(value):
        class Mine(fastil.Method):
            def loss_weights(self, context):
                return 1.0, value

        def backbone():
            module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Dropout(value))
            module.feature_dim = 12
            return module

        return {"model": backbone} if key == "model" else {"method": Mine}

    fastil.run("digits", out=tmp_path / "run", **settings, **made(0.5))
    assert fastil.run("digits", out=tmp_path / "run", resume=True, **settings, **made(0.5)).finished
    with pytest.raises(UserError, match=rf"its code was edited since \(code of {key} was \w{{12}}, now \w{{12}}\)"):
        fastil.run("digits", out=tmp_path / "run", resume=True, **settings, **made(0.25))
    with pytest.raises(UserError, match=r"its base step is another one \(code of"):
        fastil.run("digits", out=tmp_path / "other", base=tmp_path / "run", **settings, **made(0.25))
    assert not (tmp_path / "other").exists()
    fastil.run("digits", out=tmp_path / "same", base=tmp_path / "run", **settings, **made(0.5))
    text = (tmp_path / "run/recipe.yaml").read_text()
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith(f"{key}_source")]
    assert len(kept) == text.count("\n") - 1
    (tmp_path / "run/recipe.yaml").write_text("".join(kept))  # as older versions wrote it: not known
    assert fastil.run("digits", out=tmp_path / "run", resume=True, **settings, **made(0.25)).finished


def test_weights_that_do_not_fit_leave_no_directory(tmp_path):
    """Damaged or foreign files, where the recipe says the same."""
    settings = SETTINGS | {"epochs": 1, "base_epochs": 1, "base_classes": 3, "increment": 3}
    run = fastil.run("digits", out=tmp_path / "run", **settings)
    for name in ("state_0.pt", "state_1.pt"):  # else a resume goes on from there
        (run.path / "checkpoints" / name).unlink()
    for name in ("step_0.pt", "last.pt"):
        state = torch.load(run.path / "checkpoints" / name, weights_only=True)
        weights = state["trainer"]["student"] if name == "last.pt" else state
        weights["head.weight"] = weights["head.weight"][:, :5]
        torch.save(state, run.path / "checkpoints" / name)
    with pytest.raises(UserError, match=r"step_0\.pt: its weights are of another network .*give another base"):
        fastil.run("digits", out=tmp_path / "other", base=run.path, **settings)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"last\.pt: its weights are of another network"):
        fastil.run("digits", out=run.path, resume=True, **settings)


@pytest.mark.parametrize("found", [0.5, (1.0,), (1.0, 0.0, 0.0), None, ("a", "b")])
def test_weights_of_the_loss_that_are_none_are_said_before_there_is_a_directory(tmp_path, found):
    class Mine(fastil.Method):
        def loss_weights(self, context):
            return (1.0, 0.0) if context.num_old == 0 else found

    with pytest.raises(UserError, match=r"method=mine: loss_weights returns .*; return two numbers"):
        fastil.run("digits", out=tmp_path / "run", method=Mine, loss="softmax", **SETTINGS)

    class Broken(fastil.Method):
        def loss_weights(self, context):
            return 1.0, 1 / context.num_old

    with pytest.raises(UserError, match=r"method=broken: .*test_start\.py, line \d+: ZeroDivisionError"):
        fastil.run("digits", out=tmp_path / "run", method=Broken, loss="softmax", **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_signal_after_the_last_batch_is_not_swallowed(tmp_path, monkeypatch, capsys):
    """The run is finished, and whoever loops over runs stops."""
    monkeypatch.setattr("fastil.reporting.figures.draw_run", lambda path: os.kill(os.getpid(), signal.SIGINT))
    settings = SETTINGS | {"epochs": 1, "base_epochs": 1}
    with pytest.raises(KeyboardInterrupt, match="finished"):
        fastil.run("digits", out=tmp_path / "run", **settings)
    assert fastil.Run(tmp_path / "run").finished
    from fastil import cli

    keys = [f"{key}={value}" for key, value in settings.items()]
    monkeypatch.setattr("sys.argv", ["fastil", "run", "digits", *keys, "--out", str(tmp_path / "again")])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 128 + signal.SIGINT
    assert "finished" in capsys.readouterr().err


def test_paths_folders_and_messages_are_those_of_python(tmp_path, folder):
    with pytest.raises(UserError, match=r"go on with resume=True, or choose another out$"):
        fastil.run("digits", out=tmp_path.parent, **SETTINGS)
    settings = {"size": 8, "pad": 0, "epochs": 1, "base_epochs": 1, "base_classes": 2, "increment": 2}
    (tmp_path / "empty").mkdir()  # as tempfile.mkdtemp makes it
    run = fastil.run(
        "folder", folder / "train", tmp_path / "empty", val=folder / "val", model="resnet8", batch_size=16, **settings
    )
    assert run.finished
    with pytest.raises(UserError, match=r"method=lucir: is fastil\.methods\.lucir\.Lucir already; give yours another"):
        fastil.run("digits", method=type("Lucir", (method_of(0.5),), {}), **SETTINGS)
    with pytest.raises(UserError, match="needs data PATH"):
        fastil.run("folder", out=tmp_path / "none")


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
    with pytest.raises(UserError, match="exists already; go on with resume=True"):
        fastil.run("digits", out=tmp_path / "part", **SETTINGS)
    with pytest.raises(UserError, match=r"a run of another recipe \(seed was 0, now 7\); choose another out"):
        fastil.run("digits", out=tmp_path / "part", **SETTINGS | {"seed": 7})


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
        ({"model": "net.py"}, "write net.py:NAME"), ({"method": fastil.Method}, "write loss_weights"),
        ({"seed": True}, "seed=true: must be an integer of at least 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(settings, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        fastil.run("digits", out=tmp_path / "run", **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
