"""Whole runs on real images: what is learned, what is remembered, what is measured."""

import json

import numpy as np
import pytest
import torch
from conftest import make_folder

from fastil.data import DataConfig, load_dataset, make_loader
from fastil.data.transforms import transforms
from fastil.models import build_network
from fastil.plan import sequential_plan
from fastil.recipe_file import load
from fastil.reporting.rows import paired_gain
from fastil.reporting.runs import Run, group_runs
from fastil.training.experiment import Experiment

pytestmark = pytest.mark.usefixtures("without_figures")

QUICK = ["epochs=8", "base_epochs=5", "batch_size=16", "base_classes=5", "increment=5", "device=cpu", "precision=fp32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both losses on digits, classes in LUCIR's order, one step of five classes after the base."""
    root = tmp_path_factory.mktemp("runs")
    for loss in ("softmax", "balanced"):
        Experiment(load("digits", [*QUICK, f"loss={loss}"]), root / loss, resume=False).run()
    return root


def steps_of(run):
    return json.loads((run / "results.json").read_text())["steps"]


def test_the_base_is_learned_and_the_balanced_softmax_keeps_the_old_classes(runs):
    softmax, balanced = steps_of(runs / "softmax"), steps_of(runs / "balanced")
    bases = [steps[0]["top1"] for steps in (softmax, balanced)]
    assert min(bases) > 90
    assert max(bases) - min(bases) < 2  # nearly equal counts: nearly the same base, to a few images
    assert balanced[1]["top1_old"] > softmax[1]["top1_old"] + 20
    assert softmax[1]["top1_new"] > 90
    gaps = [abs(steps[1]["top1_old"] - steps[1]["top1_new"]) for steps in (balanced, softmax)]
    assert gaps[0] < gaps[1]


def test_exemplars_are_of_their_class_and_in_the_herding_rank_of_the_released_loop(runs):
    dataset = load_dataset(DataConfig("digits"))
    recipe = load("digits", QUICK)
    transform, _ = transforms(recipe.data, (8, 8), streamed=False)
    loader = make_loader(dataset.train, "auto", transform, "cpu")
    for step in (0, 1):
        network = build_network(recipe.model, 10, 0)
        network.load_state_dict(torch.load(runs / f"balanced/checkpoints/step_{step}.pt", weights_only=True))
        network.eval()
        memory = json.loads((runs / f"balanced/memory/step_{step}.json").read_text())
        classes = json.loads((runs / "balanced/protocol.json").read_text())["steps"][step]
        assert list(memory)[-5:] == [str(c) for c in classes]
        for class_id in classes:
            ids = np.flatnonzero(dataset.train.labels == class_id)
            (batch,) = loader.batches(sequential_plan(ids, transform, 1000))
            with torch.no_grad():
                features = network(batch.images).features.double().numpy()
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            mean, chosen = features.mean(axis=0), []
            target = mean.copy()
            while len(chosen) < 2:
                best = int(np.argmax(features @ target))
                target += mean - features[best]
                if best not in chosen:
                    chosen.append(best)
            assert memory[str(class_id)] == ids[chosen].tolist()


def test_the_saved_network_gives_the_recorded_accuracy(runs):
    dataset = load_dataset(DataConfig("digits"))
    recipe = load("digits", QUICK)
    network = build_network(recipe.model, 10, 0)
    network.load_state_dict(torch.load(runs / "softmax/checkpoints/step_1.pt", weights_only=True))
    images = torch.from_numpy(dataset.val.images).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(recipe.data.mean).view(3, 1, 1)) / torch.tensor(recipe.data.std).view(3, 1, 1)
    with torch.no_grad():
        predicted = network.eval()(images).logits[:, :10].argmax(1).numpy()
    order = np.array(json.loads((runs / "softmax/protocol.json").read_text())["class_order"])
    accuracy = 100 * np.mean(order[predicted] == dataset.val.labels)
    assert steps_of(runs / "softmax")[1]["top1"] == pytest.approx(accuracy)


def test_random_selection_and_a_fixed_budget(tmp_path):
    overrides = [*QUICK, "epochs=1", "base_epochs=1", "exemplars_per_class=null", "memory_budget=47"]
    Experiment(load("digits", [*overrides, "exemplar_selection=random"]), tmp_path / "run", resume=False).run()
    labels = load_dataset(DataConfig("digits")).train.labels
    before, after = (json.loads((tmp_path / f"run/memory/step_{k}.json").read_text()) for k in (0, 1))
    assert {len(ids) for ids in before.values()} == {47 // 5}
    assert {len(ids) for ids in after.values()} == {47 // 10}
    for class_id, ids in before.items():
        assert after[class_id] == ids[:4]
        assert (labels[ids] == int(class_id)).all()


def test_a_class_with_fewer_images_than_the_quota_keeps_them_all_and_says_so(tmp_path, capsys):
    data = make_folder(tmp_path / "data", train=5)
    settings = [
        "size=12",
        "model=resnet8",
        "epochs=1",
        "base_epochs=1",
        "base_classes=2",
        "increment=1",
        "batch_size=8",
        "precision=fp32",
    ]
    recipe = load("folder", [*settings, "exemplars_per_class=8"], data=str(data))
    Experiment(recipe, tmp_path / "run", resume=False).run()
    assert "fewer than 8 images in class" in capsys.readouterr().out
    memory = json.loads((tmp_path / "run/memory/step_2.json").read_text())
    assert {len(ids) for ids in memory.values()} == {5}


def test_runs_on_different_images_are_never_averaged_or_paired(tmp_path):
    settings = [
        "size=12",
        "model=resnet8",
        "epochs=1",
        "base_epochs=1",
        "base_classes=2",
        "increment=1",
        "batch_size=8",
        "precision=fp32",
    ]
    for name, train, loss in (("a", 6, "softmax"), ("b", 7, "balanced"), ("c", 7, "softmax")):
        data = make_folder(tmp_path / name / "data", train=train)
        recipe = load("folder", [*settings, f"loss={loss}", "exemplars_per_class=2"], data=str(data))
        Experiment(recipe, tmp_path / name / "run", resume=False).run()
    found = [Run(tmp_path / name / "run") for name in ("a", "b", "c")]
    groups = group_runs(found)
    assert sorted(len(group) for group in groups.values()) == [1, 1, 1]
    assert paired_gain(group_runs(found[:2])) == []
    assert len(paired_gain(group_runs(found[1:]))) == 1
