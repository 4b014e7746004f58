"""Every method on a GPU, from its first step to its last: in bfloat16, captured, compiled, killed and resumed.

Without a GPU these skip; FASTIL_DEVICE=cpu runs them on the CPU, where a step is never captured.
"""

import json

import pytest
import torch
from test_bf16 import COMBINATIONS
from test_runs import BRIEF, run, run_until_killed

from fastil.training import trainer
from fastil.training.captured import CapturedStep
from fastil.training.compiling import has_cxx_compiler

pytestmark = pytest.mark.usefixtures("without_figures")

# One incremental step, batches of two sizes in each; 60 updates and more. deterministic: or two runs need not be alike.
SETTINGS = [*BRIEF, "classes=5", "base_classes=4", "increment=1", "batch_size=64", "deterministic=true"]
LONG = [*SETTINGS, "base_epochs=5", "epochs=6"]
COMPILED_ON_A_CPU = ("softmax",)  # each compiles for half a minute there


@pytest.fixture
def graphs(monkeypatch):
    """All graphs that are captured, by size of batch."""
    captured = []

    class Kept(CapturedStep):
        def __init__(self, step, **options):
            super().__init__(step, **options)
            captured.append(self.graphs)

    monkeypatch.setattr(trainer, "CapturedStep", Kept)
    return captured


def weights_of(folder, step=1):
    return torch.load(folder / f"checkpoints/step_{step}.pt", weights_only=True, map_location="cpu")


def assert_alike(ours, theirs):
    for file in ("results.json", "metrics.jsonl", "memory/step_1.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    for step in (0, 1):
        first, second = weights_of(ours, step), weights_of(theirs, step)
        assert first.keys() == second.keys()
        apart = [key for key in first if not torch.equal(first[key], second[key])]
        assert not apart, apart


@pytest.mark.parametrize("name", COMBINATIONS)
def test_in_bf16_and_captured_it_is_the_uncaptured_run(name, gpu, graphs, tmp_path, monkeypatch):
    settings = [*LONG, "precision=bf16", *COMBINATIONS[name], f"device={gpu}"]
    results = run(settings, tmp_path / "captured")
    assert results["steps"][0]["top1"] > 40  # chance is 25
    weights = weights_of(tmp_path / "captured")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in weights.values())
    if "meta" in name:
        last = json.loads((tmp_path / "captured/metrics.jsonl").read_text().splitlines()[-1])
        assert last["alpha"] != 1
    assert len(graphs) >= 2  # a phase for each step
    assert all(made for made in graphs[:2]) == (gpu == "cuda")
    if gpu == "cpu":
        return  # nothing was captured
    graphs.clear()
    monkeypatch.setattr(trainer, "has_streams", lambda device: False)
    run(settings, tmp_path / "plain")
    assert not any(graphs)
    assert_alike(tmp_path / "captured", tmp_path / "plain")


@pytest.mark.skipif(not has_cxx_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("name", COMBINATIONS)
def test_compiled_it_learns_as_uncompiled(name, gpu, tmp_path):
    if gpu == "cpu" and name not in COMPILED_ON_A_CPU:
        pytest.skip("compiles for too long on a CPU")
    settings = [*SETTINGS, "precision=fp32", "base_epochs=1", *COMBINATIONS[name], f"device={gpu}"]
    for compiled in ("true", "false"):
        run([*settings, f"compile={compiled}"], tmp_path / compiled)
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / compiled / "metrics.jsonl").read_text().splitlines()]
        for compiled in ("true", "false")
    )
    # A few updates: the order of sums alone moves a gradient by a hundredth (ReLU), and what follows from it more.
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-2)
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=0.1)
    first, second = weights_of(tmp_path / "true", 0), weights_of(tmp_path / "false", 0)
    for key, value in second.items():
        if value.is_floating_point() and "running" not in key:
            assert torch.linalg.vector_norm(first[key] - value) <= 0.05 * torch.linalg.vector_norm(value) + 1e-3, key


@pytest.mark.parametrize("name", ["softmax", "meta", "podnet_balanced", "bic", "mnemonics"])
def test_killed_and_resumed_it_ends_bit_for_bit_alike(name, gpu, tmp_path, monkeypatch):
    settings = [*SETTINGS, "precision=bf16", *COMBINATIONS[name], "epochs=3", f"device={gpu}"]
    run(settings, tmp_path / "whole")
    run_until_killed(settings, tmp_path / "killed", monkeypatch)
    run(settings, tmp_path / "killed", resume=True)
    assert_alike(tmp_path / "killed", tmp_path / "whole")
