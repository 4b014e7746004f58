"""What cannot fit the memory of the device is said before it is asked for, and what could run is not refused."""

import pytest
import torch

from fastil.errors import UserError
from fastil.models import build_network
from fastil.recipe_file import load
from fastil.training import capacity, estimate
from fastil.training.compiling import cost_per_image
from fastil.training.experiment import Experiment
from fastil.training.speed import Rates, Speeds

CPU = torch.device("cpu")
HANDED_ON = 3 * 16 * 64 + 3 * 32 * 16 + 3 * 64 * 4  # by the nine convolutions of resnet8, of an image of 8x8


def test_what_convolutions_hand_on_is_counted():
    network = build_network(load("digits").model, 10, 0)
    flops, handed_on = cost_per_image(network, 8, 8)
    assert handed_on == HANDED_ON
    assert flops > handed_on
    assert not any(part._forward_hooks for part in network.modules())


@pytest.mark.parametrize(
    ("overrides", "least"),
    [
        (["batch_size=64", "precision=fp32"], 64 * HANDED_ON * 4),
        (["batch_size=64", "precision=bf16"], 64 * HANDED_ON * 2),
        (["batch_size=50000", "precision=fp32"], 50_000 * 3 * 64 * 4),  # as pixels; a step has 719 images
        (["batch_size=5000", "precision=fp32", "loss=meta_balanced"], 5000 * HANDED_ON * 4),  # its batches are full
    ],
)
def test_a_batch_is_refused_only_where_its_least_does_not_fit(overrides, least, monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "speeds", lambda *_: Speeds(Rates(1.0, 1.0)))
    recipe = load("digits", overrides)
    monkeypatch.setattr(capacity, "memory_of", lambda device: least)
    assert "exemplars" in estimate.plan_text(recipe)
    Experiment(recipe, tmp_path / "run", resume=False).close()
    monkeypatch.setattr(capacity, "memory_of", lambda device: least - 1)
    for refused in (lambda: estimate.plan_text(recipe), lambda: Experiment(recipe, tmp_path / "run", resume=False)):
        with pytest.raises(UserError, match=r"^batch_size=\d+: a training step on images of 8x8 takes .* GiB"):
            refused()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [["batch_size=1000000000"], ["batch_size=999999999999999999"], ["batch_size=1000000000", "loss=meta_balanced"]],
)
def test_a_batch_that_no_machine_holds_is_refused_before_anything_of_its_size_is_made(overrides, monkeypatch, tmp_path):
    zeros = torch.zeros

    def checked(*size, **options):
        made = zeros(*size, **options)
        assert made.numel() < 10**7
        return made

    monkeypatch.setattr(torch, "zeros", checked)
    recipe = load("digits", overrides)
    for refused in (lambda: estimate.plan_text(recipe), lambda: Experiment(recipe, tmp_path / "run", resume=False)):
        with pytest.raises(UserError, match=rf"^{overrides[0]}: .* lower batch_size"):
            refused()
    assert not (tmp_path / "run").exists()


def test_a_plan_without_the_files_is_of_the_size_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(estimate, "speeds", lambda *_: Speeds(Rates(1.0, 1.0)))
    assert " 64x64, streamed" in estimate.plan_text(load("imagenet_balanced_5", ["size=64"]))
    with pytest.raises(UserError, match=r"images of 100000000x100000000 .*lower batch_size, or the size"):
        estimate.plan_text(load("imagenet_balanced_5", ["size=100000000"]))
