"""What is claimed of a GPU against what was measured there."""

import json

from bench.claims import CLAIMS, verdicts


def figures(captured, compiled, eager, ceiling, launches=(373.0, 438.0), idle=(0.36, 0.6)):
    modes = {
        "eager": {"median": eager, "launches_a_step": 484.0, "idle_share": 0.68},
        "compiled": {"median": compiled, "launches_a_step": launches[1], "idle_share": idle[1]},
        "compiled, captured": {"median": captured, "launches_a_step": launches[1], "idle_share": idle[0]},
        "ceiling, images per second": ceiling,
    }
    alone = {"compiled, captured": {"median": captured, "launches_a_step": launches[0], "idle_share": idle[0]}}
    return {"results": {"bf16, with a teacher": modes, "bf16, without a teacher": alone}}


def found(folder):
    return [verdict for _, _, _, verdict in verdicts(folder)]


def test_what_is_as_estimated_holds(tmp_path):
    (tmp_path / "train_step.json").write_text(json.dumps(figures(68_000.0, 43_000.0, 33_000.0, 70_000.0)))
    (tmp_path / "train_step_resnet18.json").write_text(json.dumps(figures(12_000.0, 11_900, 1, 1, idle=(0.04, 0.04))))
    (tmp_path / "streamed.json").write_text(json.dumps({"waits": {"stride 2, data": {"median": 0.4}}}))
    assert found(tmp_path) == ["holds"] * len(CLAIMS)
    assert verdicts(tmp_path)[6][2] == "1.581"


def test_what_is_not_is_refuted(tmp_path):
    slow = figures(40_000.0, 39_000.0, 41_000.0, 50_000.0, launches=(340.0, 470.0), idle=(0.6, 0.3))
    (tmp_path / "train_step.json").write_text(json.dumps(slow))
    (tmp_path / "train_step_resnet18.json").write_text(json.dumps(figures(12_000.0, 9_000.0, 1, 1, idle=(0.2, 0.2))))
    (tmp_path / "streamed.json").write_text(json.dumps({"waits": {"stride 2, data": {"median": 0.02}}}))
    assert found(tmp_path) == ["refuted"] * len(CLAIMS)


def test_what_failed_there_is_not_measured(tmp_path):
    content = figures(68_000.0, 43_000.0, 33_000.0, "out of memory")
    content["results"]["bf16, with a teacher"]["compiled"] = {"failed": "out of memory"}
    content["results"]["bf16, with a teacher"]["compiled, captured"]["idle_share"] = None
    (tmp_path / "train_step.json").write_text(json.dumps(content))
    missing = "not measured: train_step.json"
    assert found(tmp_path)[:8] == ["holds", "holds", *[missing] * 6]
    assert set(found(tmp_path)[8:]) == {"not measured: train_step_resnet18.json", "not measured: streamed.json"}


def test_a_cpu_proves_and_refutes_nothing(tmp_path):
    content = figures(68_000.0, 43_000.0, 33_000.0, 70_000.0) | {"machine": {"device": "CPU (1 threads)"}}
    (tmp_path / "train_step.json").write_text(json.dumps(content))
    assert {verdict.partition(":")[0] for verdict in found(tmp_path)} == {"not measured"}
