"""Backbones from outside: trained, killed, resumed, reported; and that no run directory makes their code run."""

import json
import time

import pytest
import torch
from conftest import ROOT, TINY, assert_user_error
from torch import nn

from fastil.errors import UserError
from fastil.models import Folded, ModelConfig, build_network
from fastil.recipe import load, read_effective

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
    assert fastil("report", "whole", "killed").returncode == 2  # the same run twice
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
