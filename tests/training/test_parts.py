"""Whole runs with Meta, corrections, predictors and shared base steps: stopped and resumed, what they train on, what
they write, what they refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_user_error, make_folder

from fastil.data import DataConfig, load_dataset
from fastil.errors import UserError
from fastil.nearest_mean import class_means, nearest_mean_scores
from fastil.recipe_file import load
from fastil.reporting.figures import draw_run
from fastil.training.experiment import Experiment
from fastil.training.trainer import Stopped

pytestmark = pytest.mark.usefixtures("without_figures")

QUICK = ["epochs=3", "base_epochs=2", "batch_size=32", "base_classes=6", "increment=2", "exemplars_per_class=6",
         "precision=fp32"]  # fmt: skip
META = ["loss=meta_balanced", "meta_every=3", "meta_lr=20", "meta_share=0.3"]
FINETUNE = ["loss=softmax", "correction=balanced_finetuning", "finetune_epochs=3"]
SAME = [
    "results.json",
    "metrics.jsonl",
    *(f"{kind}_{k}" for kind in ("memory/step", "predictions/step") for k in (0, 1, 2)),
]


def run_of(folder, *settings, stop_at=None, **options):
    """A run on digits; stop_at=(phase, step, batches): stopped there."""
    experiment = Experiment(load("digits", [*QUICK, *settings]), folder, **{"resume": False} | options)
    if stop_at is not None:
        phase, step, batches = stop_at
        fit, seen = experiment.trainer.fit, [0]

        def counted(asked, *position):
            if (asked.name, asked.step) == (phase, step):
                experiment.trainer.tick = lambda images: seen.__setitem__(0, seen[0] + 1)
            fit(asked, *position)

        experiment.trainer.fit = counted
        experiment.trainer.stop = lambda: seen[0] >= batches
    experiment.run()
    return folder


def assert_same(run, other):
    for name in SAME:
        suffix = ".json" if name.startswith("memory") else ".npy" if name.startswith("pred") else ""
        assert (run / f"{name}{suffix}").read_bytes() == (other / f"{name}{suffix}").read_bytes(), name
    for step in range(3):
        ours, theirs = (torch.load(f / f"checkpoints/step_{step}.pt", weights_only=True) for f in (run, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), step


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("meta") / "run", *META)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("finetuned") / "run", *FINETUNE)


@pytest.mark.parametrize("stop_at", [("train", 1, 2), ("train", 1, 25), ("train", 2, 25)])
def test_a_stopped_meta_run_goes_on_with_its_alpha(meta, tmp_path, stop_at):
    with pytest.raises(Stopped):
        run_of(tmp_path / "run", *META, stop_at=stop_at)
    run_of(tmp_path / "run", *META, resume=True)
    assert_same(tmp_path / "run", meta)


@pytest.mark.parametrize("stop_at", [("correct", 1, 1), ("correct", 1, 4), ("correct", 2, 5), ("train", 2, 5)])
def test_a_stopped_finetuning_goes_on(finetuned, tmp_path, stop_at):
    with pytest.raises(Stopped):
        run_of(tmp_path / "run", *FINETUNE, stop_at=stop_at)
    run_of(tmp_path / "run", *FINETUNE, resume=True)
    assert_same(tmp_path / "run", finetuned)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_alpha_is_logged_in_incremental_steps_and_plotted(meta):
    lines = lines_of(meta)
    assert all(("alpha" in line) == (line["step"] > 0) for line in lines)
    assert len({line["alpha"] for line in lines if line["step"] > 0}) > 3
    draw_run(meta)
    assert (meta / "figures/alpha.png").exists()


def test_an_alpha_per_class_is_logged_per_class(tmp_path):
    run = run_of(tmp_path / "run", *META, "meta_alpha=per_class")
    for line in lines_of(run):
        if line["step"] > 0:
            assert len(line["alpha"]) == 4 + 2 * line["step"]
    assert len(set(lines_of(run)[-1]["alpha"])) > 1


@pytest.mark.parametrize("gradient", ["difference", "unrolled"])
def test_the_ways_to_alphas_gradient_agree_over_a_step(meta, tmp_path, gradient):
    """Training is chaotic, so only the first updates of alpha are compared."""
    run = run_of(tmp_path / "run", *META, f"meta_gradient={gradient}")
    ours, theirs = (next(line["alpha"] for line in lines_of(r) if line["step"] == 1) for r in (run, meta))
    assert abs(ours - 1) > 1e-3
    assert ours == pytest.approx(theirs, abs=0.05 * abs(theirs - 1) + 1e-4)


def test_held_out_images_are_balanced_and_not_trained_on(tmp_path):
    experiment = Experiment(load("digits", [*QUICK, *META]), tmp_path / "run", resume=False)
    labels, seen = experiment.dataset.train.labels, {}
    train_step, before_update = experiment.trainer.train_step, experiment.trainer.before_update

    def watched(phase, update, inputs, size):
        seen.setdefault(phase.step, (set(), set()))[0].update(inputs.ids.tolist())
        train_step(phase, update, inputs, size)

    def watched_before(phase, hook, update, inputs, size, held_out):
        assert len(held_out.ids) == 32
        seen.setdefault(phase.step, (set(), set()))[1].update(held_out.ids.tolist())
        before_update(phase, hook, update, inputs, size, held_out)

    experiment.trainer.train_step, experiment.trainer.before_update = watched, watched_before
    experiment.run()
    assert seen[0][1] == set()
    effective = json.loads((tmp_path / "run/protocol.json").read_text())["effective"]
    assert [step["held_out"] for step in effective] == [0, 2 * 8, 2 * 10]  # round(0.3 * 6) of every class
    for step in (1, 2):
        trained, held_out = seen[step]
        assert trained.isdisjoint(held_out)
        counts = np.bincount(labels[sorted(held_out)], minlength=10)
        assert sorted(counts[counts > 0].tolist()) == [2] * (6 + 2 * step)
        assert len(trained) * 3 == effective[step]["visits"]


def test_finetuning_sees_as_many_images_of_every_class_and_moves_the_classifier_only(finetuned, tmp_path):
    experiment = Experiment(load("digits", [*QUICK, *FINETUNE]), tmp_path / "run", resume=False)
    labels, before, fit = experiment.dataset.train.labels, {}, experiment.trainer.fit

    def watched(phase, *position):
        network = experiment.trainer.student
        if phase.name == "correct":
            ids = phase.plan(0).ids
            assert len(set(ids.tolist())) == len(ids)
            counts = np.bincount(labels[ids], minlength=10)
            assert sorted(counts[counts > 0].tolist()) == [6] * (6 + 2 * phase.step)
            herded = json.loads((finetuned / f"memory/step_{phase.step}.json").read_text())
            assert set(ids.tolist()) == {
                i for exemplars in herded.values() for i in exemplars
            }  # features stay, so do picks
            before[phase.step] = {name: value.clone() for name, value in network.state_dict().items()}
        fit(phase, *position)
        if phase.name == "correct":
            moved = {n for n, v in network.state_dict().items() if not torch.equal(v, before[phase.step][n])}
            assert moved == {"head.weight", "head.bias"}
            assert all(parameter.grad is None for parameter in network.parameters())

    experiment.trainer.fit = watched
    experiment.run()
    assert sorted(before) == [1, 2]
    phases = [(line["step"], line["phase"]) for line in lines_of(tmp_path / "run")]
    assert (
        phases
        == [(0, "train")] * 2 + [(1, "train")] * 3 + [(1, "correct")] * 3 + [(2, "train")] * 3 + [(2, "correct")] * 3
    )
    assert_same(tmp_path / "run", finetuned)


def test_finetuning_everything_moves_everything_but_the_statistics(tmp_path):
    experiment = Experiment(
        load("digits", [*QUICK, *FINETUNE, "finetune_parameters=all", "finetune_lr=0.001"]),
        tmp_path / "run",
        resume=False,
    )
    fit, finetuned = experiment.trainer.fit, []

    def watched(phase, *position):
        network = experiment.trainer.student
        before = {name: value.clone() for name, value in network.state_dict().items()}
        fit(phase, *position)
        if phase.name == "correct":
            same = {n for n, v in network.state_dict().items() if torch.equal(v, before[n])}
            assert same == {n for n in before if "running" in n or "num_batches" in n}
            finetuned.append(phase.step)

    experiment.trainer.fit = watched
    experiment.run()
    assert finetuned == [1, 2]


def test_predictions_add_up_to_the_confusion_matrix_and_the_accuracy(meta):
    results = json.loads((meta / "results.json").read_text())["steps"]
    for step in range(3):
        true, predicted = np.load(meta / f"predictions/step_{step}.npy").T
        matrix = np.zeros((6 + 2 * step,) * 2, dtype=np.int64)
        np.add.at(matrix, (true, predicted), 1)
        assert np.array_equal(matrix, np.load(meta / f"confusion/step_{step}.npy"))
        assert 100 * (true == predicted).mean() == pytest.approx(results[step]["top1"])


def test_the_nearest_mean_predictor_is_icarls():
    """Brute force: squared distances of normalised features to normalised means of the exemplars and their mirrors."""
    random = torch.Generator().manual_seed(0)
    features, exemplars, mirrored = (torch.randn(n, 5, generator=random).double() for n in (20, 12, 12))
    positions = torch.tensor([0, 1, 2, 2, 1, 0, 3, 3, 3, 1, 0, 2])
    scores = nearest_mean_scores(features, class_means(exemplars, mirrored, positions))

    def unit(x):
        return x / x.square().sum(-1, keepdim=True).sqrt()

    for feature, row in zip(features, scores, strict=True):
        distances = []
        for c in range(4):
            mean = unit(exemplars[positions == c]).mean(0) / 2 + unit(mirrored[positions == c]).mean(0) / 2
            distances.append(float((unit(feature) - unit(mean)).square().sum()))
        assert int(row.argmax()) == int(np.argmin(distances))
        assert np.argsort(distances).tolist() == row.argsort(descending=True).tolist()


def test_a_run_predicts_by_the_nearest_mean(tmp_path):
    run = run_of(tmp_path / "run", "loss=softmax", "predictor=nme")
    other = run_of(tmp_path / "cnn", "loss=softmax")
    steps, cnn = (json.loads((r / "results.json").read_text())["steps"] for r in (run, other))
    assert all(step["nme_top1"] == step["top1"] for step in steps)
    assert all(step["nme_top1"] is None for step in cnn)
    assert steps[2]["top1_old"] > cnn[2]["top1_old"]


# Base steps taken from other runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Equal numbers of images in every class."""
    return make_folder(tmp_path_factory.mktemp("images"), classes=4, train=10)


SMALL = [
    "size=8", "base_classes=2", "increment=1", "epochs=2", "base_epochs=3", "model=resnet8", "exemplars_per_class=4",
    "precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def donor(folder, tmp_path_factory):
    """A run that base steps are taken from. Who changes it takes a copy."""
    path = tmp_path_factory.mktemp("donor") / "run"
    Experiment(load("folder", SMALL, data=str(folder)), path, resume=False).run()
    return path


@pytest.fixture
def own_donor(donor, tmp_path):
    return shutil.copytree(donor, tmp_path / "donor")


@pytest.mark.parametrize(
    "settings",
    [["loss=softmax"], ["loss=rescaled"], ["loss=separated", "sampler=memory_oversampling"], ["loss=meta_balanced"],
     ["alpha=0.2", "exemplars_per_class=2"], ["loss=softmax", "correction=balanced_finetuning", "finetune_epochs=1"]],
)  # fmt: skip
def test_a_base_step_taken_from_another_run_is_the_same_run(folder, donor, tmp_path, settings):
    recipe = load("folder", [*SMALL, *settings], data=str(folder))
    Experiment(recipe, tmp_path / "own", resume=False).run()
    Experiment(recipe, tmp_path / "taken", resume=False, base_run=donor).run()
    assert_same(tmp_path / "taken", tmp_path / "own")
    timings = json.loads((tmp_path / "taken/timings.json").read_text())
    assert timings["base_step_of"] == str(donor)
    assert timings["steps"]["0"]["images_per_second"] is None


def test_a_taken_base_step_is_remembered_over_a_resume_and_its_run_may_go(folder, own_donor, tmp_path):
    out = tmp_path / "taken"
    recipe = load("folder", SMALL, data=str(folder))
    experiment = Experiment(recipe, out, resume=False, base_run=own_donor)
    experiment.trainer.stop = lambda: experiment.step == 1
    with pytest.raises(Stopped):
        experiment.run()
    own_donor.rename(tmp_path / "gone")
    Experiment(recipe, out, resume=True, base_run=own_donor).run()
    assert json.loads((out / "timings.json").read_text())["base_step_of"] == str(own_donor)


@pytest.mark.parametrize("damage", ["no metrics", "damaged metrics", "damaged protocol", "damaged weights"])
def test_a_damaged_run_gives_no_base_step_and_leaves_nothing_behind(folder, own_donor, tmp_path, damage):
    recipe = load("folder", SMALL, data=str(folder))
    if damage == "no metrics":
        (own_donor / "metrics.jsonl").unlink()
    elif damage == "damaged metrics":
        (own_donor / "metrics.jsonl").write_text("{\n")
    elif damage == "damaged protocol":
        (own_donor / "protocol.json").write_text("{}")
    else:
        (own_donor / "checkpoints/step_0.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"give another --base, or leave it out$"):
        Experiment(recipe, tmp_path / "new", resume=False, base_run=own_donor)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_another_version_is_refused_in_one_line(folder, own_donor):
    last = own_donor / "checkpoints/last.pt"
    state = torch.load(last, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "format"}, last)
    with pytest.raises(UserError, match="another version of fastil"):
        Experiment(load("folder", SMALL, data=str(folder)), own_donor, resume=True).run()


def test_a_base_step_that_would_be_another_is_refused(folder, donor, tmp_path, meta, fastil):
    common = ["run", "folder", *SMALL, "--data", folder, "--base", donor, "--out", tmp_path / "new"]
    assert_user_error(fastil(*common, "lr=0.2"), "lr is 0.1 there and 0.2 here")
    assert_user_error(fastil(*common, "base_epochs=4"), "epochs of the base step is 3 there and 4 here")
    assert_user_error(fastil(*common, "order=[3,2,1,0]"), "order is")
    other = make_folder(tmp_path / "images", classes=4, train=11)
    assert_user_error(fastil("run", "folder", *SMALL, "--data", other, *common[-4:]), "other images or base classes")
    assert_user_error(fastil(*common[:-3], tmp_path, *common[-2:]), "recipe.yaml: missing")
    digits = ["run", "digits", *QUICK, "loss=softmax", "--base", meta, "--out", tmp_path / "new"]
    assert_user_error(fastil(*digits), "unequal numbers of images", "leave --base out")
    assert not (tmp_path / "new").exists()


# Bad input.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["exemplars_per_class=1"], ["at least 2 per class", "exemplars_per_class=2"]),
        (["exemplars_per_class=null", "memory_budget=15"], ["at least 2 per class", "the memory leaves 1"]),
        (["alpha=0.5"], ["alpha=0.5", "learns its own"]),
        (["meta_bounds=[2,3]"], ["meta_bounds=", "around 1"]),
        (["meta_lr=0"], ["meta_lr=0"]),
        (["meta_share=1.5"], ["meta_share=1.5", "above 0 and below 1"]),
    ],
)
def test_meta_says_what_it_needs(fastil, tmp_path, settings, words):
    process = fastil("run", "digits", "loss=meta_balanced", *settings, "--out", "run")
    assert_user_error(process, *words)
    assert not (tmp_path / "run").exists()


def test_a_class_without_images_is_named(monkeypatch, tmp_path):
    def without(config):
        dataset = load_dataset(config)
        kept = dataset.train.labels != 7
        object.__setattr__(dataset.train, "images", dataset.train.images[kept])
        object.__setattr__(dataset.train, "labels", dataset.train.labels[kept])
        return dataset

    monkeypatch.setattr("fastil.training.experiment.load_dataset", without)
    with pytest.raises(UserError, match=r"too few training images of 7 \(0\): loss=balanced needs at least 1"):
        Experiment(load("digits", ["loss=balanced"]), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_classes_take_part_from_the_front_of_the_order(tmp_path, fastil):
    experiment = Experiment(
        load("digits", ["classes=6", "base_classes=3", "increment=1"]), tmp_path / "run", resume=False
    )
    assert experiment.protocol.order.tolist() == load_order()[:6]
    assert_user_error(fastil("run", "digits", "classes=11"), "classes=11", "10 classes")


def load_order():
    random = np.random.RandomState(1993)
    order = np.arange(len(load_dataset(DataConfig("digits")).class_names))
    random.shuffle(order)
    return order.tolist()
