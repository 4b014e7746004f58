"""Backbones from outside: trained, killed, resumed, reported; and that no run directory makes their code run."""

import json
import os
import signal
import time

import pytest
import torch
from conftest import ROOT, TINY, assert_user_error
from torch import nn

import fastil
from fastil.errors import UserError
from fastil.models import Folded, ModelConfig, build_network
from fastil.recipe_file import load, read_effective
from fastil.training.estimate import plan_text
from fastil.training.experiment import Experiment
from fastil.training.trainer import Trainer

NETWORK = (ROOT / "examples/your_own_network.py").read_text()
SETTINGS = ["digits", *TINY, "classes=6", "base_classes=4", "increment=2", "loss=softmax"]


class Plain(nn.Module):
    num_features = 3

    def __init__(self, maps=False, pooled=True):
        super().__init__()
        self.norm, self.maps, self.pooled = nn.BatchNorm2d(3), maps, pooled

    def forward(self, images):
        x = self.norm(images)
        features = x.mean((2, 3)) if self.pooled else x
        return (features, [x, x]) if self.maps else features


def build(factory, **settings):
    return build_network(ModelConfig("test:backbone"), 5, 0, factory=factory, **settings)


def plain():
    return Plain()


def with_maps():
    return Plain(maps=True)


def test_a_backbone_in_a_file_is_trained_killed_resumed_and_reported_and_runs_only_where_it_is_named(
    fastil, start, tmp_path
):
    trace = tmp_path / "trace"
    (tmp_path / "net.py").write_text(f"open({str(trace)!r}, 'w')\n{NETWORK}")
    settings = [*SETTINGS, "model=net.py:backbone"]
    whole = fastil("run", *settings, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    assert len(json.loads((tmp_path / "whole/results.json").read_text())["steps"]) == 2
    killed, metrics = start("run", *settings, "--out", "killed"), tmp_path / "killed/metrics.jsonl"
    while killed.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    resumed = fastil("run", *settings, "--out", "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for file in ("results.json", "metrics.jsonl", "memory/step_1.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    trace.unlink()
    assert "the same run as whole, used once" in fastil("report", "whole", "killed").stdout
    assert fastil("report", "whole").returncode == 0
    assert_user_error(fastil("run", *SETTINGS, "--out", "whole", "--resume"), "model was net.py:backbone")
    assert_user_error(fastil("run", *SETTINGS, "--base", "whole", "--out", "based"), "model is net.py:backbone there")
    assert not trace.exists()


def test_a_command_does_not_take_the_network_of_a_run_directory_without_being_told(tmp_path):
    recipe = load("digits", ["loss=softmax", f"model={ROOT}/examples/your_own_network.py:backbone"])
    (tmp_path / "recipe.yaml").write_text(recipe.in_precision("fp32").dump())
    with pytest.raises(UserError, match="code that a run directory names is not loaded"):
        read_effective(tmp_path / "recipe.yaml").build_network(10, 0)


def test_the_seed_decides_its_weights_and_torchs_generator_is_left_alone():
    recipe = load("digits", [f"model={ROOT}/examples/your_own_network.py:backbone"])
    before = torch.get_rng_state()
    a, b, c = (recipe.build_network(10, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["backbone.module.layers.0.weight"], c["backbone.module.layers.0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_maps_and_the_frozen_twin(dtype):
    network = build(with_maps, keeps_maps=True).train()
    images = torch.rand(4, 3, 6, 6)
    network(images)  # moves the statistics
    out = network.eval()(images)
    assert (out.features.shape, len(out.maps), out.logits.shape) == ((4, 3), 2, (4, 8))
    network.head.open_rows(0, 5, torch.Generator().manual_seed(0))
    frozen = Folded(network, dtype, 4)(images.to(dtype))
    torch.testing.assert_close(frozen.logits.float(), network(images).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: 3, "returns int, not a torch.nn.Module"), (nn.Identity, "needs `feature_dim`"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_is_no_backbone_is_one_line(factory, words):
    with pytest.raises(UserError, match=words):
        build(factory)


def test_features_that_are_not_pooled_and_maps_that_are_missing_are_named():
    network = build(lambda: Plain(pooled=False))
    with pytest.raises(UserError, match=r"features are \[2, 3, 6, 6\], not \[2, 3\]; pool"):
        network(torch.rand(2, 3, 6, 6))
    with pytest.raises(UserError, match="reads the stages' maps"):
        build(plain, keeps_maps=True)(torch.rand(2, 3, 6, 6))


def test_a_network_that_does_not_take_the_images_is_named_before_a_directory_is_made(fastil, tmp_path):
    (tmp_path / "net.py").write_text(NETWORK.replace("widths = (3,", "widths = (1,"))
    done = fastil("run", *SETTINGS, "model=net.py:backbone", "--out", "run")
    assert_user_error(done, "fails on images [2, 3, 8, 8]", "RuntimeError")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [("nowhere.py:x", "no file"), ("math:nothing", "math has no nothing"), ("resnet23", "did you mean resnet"),
     ("nowhere.module:x", "no module nowhere.module")],
)  # fmt: skip
def test_a_network_that_is_not_there_is_one_line(model, words):
    with pytest.raises(UserError, match=words):
        load("digits", [f"model={model}"])


class Dropping(nn.Module):
    """Draws from torch's global generator while it trains."""

    feature_dim = 12

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 12), nn.Dropout(0.5))

    def forward(self, images):
        return self.layers(images)


class Normed(nn.Module):
    """The old weight_norm, whose weight is no leaf, so that it cannot be copied; and a state that no checkpoint has."""

    feature_dim = 12

    def __init__(self):
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.layer, self.factor = nn.utils.weight_norm(nn.Linear(12, 12)), 1.0

    def forward(self, images):
        if self.training:
            self.factor = 2.0
        return self.factor * self.layer(self.pool(images))


def short(tmp_path, name, model, **settings):
    keys = {"epochs": 1, "base_epochs": 2, "classes": 4, "base_classes": 2, "increment": 2, "batch_size": 64}
    return fastil.run("digits", out=tmp_path / name, model=model, **{"loss": "softmax"} | keys | settings)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("fastil.reporting.figures.draw_run", lambda path: None)


@pytest.mark.parametrize("at", [3, 11])
def test_dropout_draws_the_same_in_a_rerun_and_after_a_stop_within_an_epoch(tmp_path, monkeypatch, no_figures, at):
    before, train_step, count = torch.get_rng_state(), Trainer.train_step, [0]
    whole = short(tmp_path, "whole", Dropping)
    assert torch.equal(torch.get_rng_state(), before)

    def interrupted(self, *arguments):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    torch.rand(5)  # whatever was drawn before
    with pytest.raises(KeyboardInterrupt):
        short(tmp_path, "part", Dropping)
    assert torch.load(tmp_path / "part/checkpoints/last.pt", weights_only=True)["position"][3]  # within an epoch
    short(tmp_path, "part", Dropping, resume=True)
    for file in ("results.json", "metrics.jsonl", "memory/step_1.json"):
        assert (tmp_path / "part" / file).read_bytes() == (whole.path / file).read_bytes()


def test_what_cannot_be_copied_is_trained_evaluated_and_taught_by(tmp_path, no_figures):
    """Evaluation is by the trained module itself, with what it holds besides its weights."""
    run = short(tmp_path, "run", Normed, head="cosine")
    assert len(run.results.steps) == 2
    network = build(Normed)
    network.head.open_rows(0, 5, torch.Generator().manual_seed(0))
    frozen, images = Folded(network, torch.float32, 4), torch.rand(4, 3, 6, 6)
    network(images)
    wanted = network.eval()(images).logits
    torch.testing.assert_close(frozen(images).logits, wanted)
    assert network.backbone.module.factor == 2.0
    network.train()
    torch.testing.assert_close(frozen(images).logits, wanted)
    assert network.training
    assert network.backbone.module.layer.training
    assert all(p.requires_grad for p in network.parameters())


def test_lazy_layers_are_named():
    def lazy():
        module = nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten())
        module.feature_dim = 3
        return module

    with pytest.raises(UserError, match="has lazy layers, such as LazyConv2d; give each layer its size"):
        build(lazy)


@pytest.mark.parametrize(
    ("widths", "settings", "words"),
    [("(1,", [], r"fails on images \[2, 3, 8, 8\]"),
     ("(3,", ["method=podnet", "head=proxies", "last_relu=false"], "reads the stages' maps")],
)  # fmt: skip
def test_a_plan_refuses_what_a_run_refuses(tmp_path, widths, settings, words):
    (tmp_path / "net.py").write_text(NETWORK.replace("widths = (3,", f"widths = {widths}").replace(", maps", ""))
    recipe = load("digits", [f"model={tmp_path}/net.py:backbone", "loss=softmax", *settings[:2]])
    with pytest.raises(UserError, match=words):
        plan_text(recipe)
    with pytest.raises(UserError, match=words):
        Experiment(recipe, tmp_path / "run", False)
    assert not (tmp_path / "run").exists()


def test_meta_trains_with_a_frozen_and_an_unused_parameter(tmp_path, no_figures):
    class Half(Dropping):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))
            self.frozen = nn.Linear(12, 12).requires_grad_(False)

        def forward(self, images):
            return self.frozen(super().forward(images))

    run = short(tmp_path, "run", Half, loss="meta_balanced", meta_every=1, exemplars_per_class=20)
    weights = torch.load(run.path / "checkpoints/step_1.pt", weights_only=True)
    assert torch.equal(weights["backbone.module.unused"], torch.ones(3))
    first = torch.load(run.path / "checkpoints/step_0.pt", weights_only=True)
    assert torch.equal(weights["backbone.module.frozen.weight"], first["backbone.module.frozen.weight"])
    assert not torch.equal(weights["backbone.module.layers.2.weight"], first["backbone.module.layers.2.weight"])
