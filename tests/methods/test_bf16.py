"""Every method, loss and correction from its first step to its last in bfloat16, which a CPU may have to emulate."""

import json

import pytest
import torch
from test_runs import BRIEF, COSINE, FINETUNED, METHODS, run, run_until_killed

pytestmark = pytest.mark.usefixtures("without_figures")

BF16 = [*BRIEF, "precision=bf16", "classes=5", "base_classes=4", "increment=1"]  # one incremental step
COMBINATIONS = METHODS | {
    "softmax": ["loss=softmax"],
    "balanced": ["loss=balanced", "alpha=0.5"],
    "separated": ["loss=separated", "sampler=memory_oversampling"],
    "rescaled": ["loss=rescaled", "sampler=class_oversampling"],
    "meta": ["loss=meta_balanced", "meta_every=2"],
    "meta_difference": ["loss=meta_balanced", "meta_every=2", "meta_gradient=difference"],
    "meta_unrolled": ["loss=meta_balanced", "meta_every=2", "meta_gradient=unrolled"],
    "lucir_meta": ["method=lucir", "loss=meta_balanced", "meta_every=2", *COSINE],
    "finetuned": ["loss=softmax", *FINETUNED],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_it_runs_to_its_end(name, tmp_path):
    out = tmp_path / "run"
    results = run([*BF16, *COMBINATIONS[name]], out)
    assert [step["classes_seen"] for step in results["steps"]] == [4, 5]
    assert results["steps"][0]["top1"] > 40  # chance is 25
    assert "precision: bf16" in (out / "recipe.yaml").read_text()
    weights = torch.load(out / "checkpoints/step_1.pt", weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.float32}  # autocast rounds copies of them
    assert all(bool(value.isfinite().all()) for value in weights.values())
    if "meta" in name:
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["alpha"] != 1


@pytest.mark.parametrize("name", ["meta", "podnet_balanced"])
def test_killed_and_resumed_it_ends_bit_for_bit_alike(name, tmp_path, monkeypatch):
    overrides = [*BF16, *COMBINATIONS[name], "epochs=2"]
    results = run(overrides, tmp_path / "whole")
    run_until_killed(overrides, tmp_path / "killed", monkeypatch)
    overrides[overrides.index("precision=bf16")] = "precision=auto"  # the run keeps it
    assert run(overrides, tmp_path / "killed", resume=True) == results
    for file in ("results.json", "metrics.jsonl", "memory/step_1.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    ours, theirs = (torch.load(tmp_path / d / "checkpoints/step_1.pt", weights_only=True) for d in ("killed", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
