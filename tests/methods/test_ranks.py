"""Several processes that train one run, over gloo on the CPU, against one process."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SOAK, environment
from test_bf16 import COMBINATIONS

# Batches of 64 and one of 3, of which a process of two and more gets nothing, in the base step; then of 64 and a rest.
SETTINGS = [
    "classes=5", "base_classes=4", "increment=1", "base_epochs=1", "epochs=1", "batch_size=191", "lr=0.06",
    "exemplars_per_class=10", "compile=false", "precision=fp32",
]  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(count, job, folder):
    """Start `count` workers on a job."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    common = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    common |= {"LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": f"{environment()['PYTHONPATH']}:{Path(__file__).parent}"}
    worker = Path(__file__).with_name("ranks_worker.py")
    return [
        subprocess.Popen(
            [sys.executable, worker, path], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def train(count, names, folder, *, settings=(), float64=True):
    """Train these combinations by `count` processes. Returns the folder of the runs."""
    folder = folder / f"{count}"
    folder.mkdir()
    runs = [{"settings": [*SETTINGS, *COMBINATIONS[name], *settings], "out": str(folder / name)} for name in names]
    failed = []
    for process in start(count, {"float64": float64, "runs": runs}, folder):
        errors = process.communicate(timeout=900)[1]
        failed += [errors[-3000:]] if process.returncode else []
    assert not failed, next((text for text in failed if "Connection closed" not in text), failed[0])
    return folder


def relative(found, wanted):
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-300))


NAMES = sorted(COMBINATIONS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(1, NAMES, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_in_float64_every_update_is_that_of_one_process(count, alone, tmp_path):
    names = NAMES if SOAK or count == 2 else NAMES[count::4]
    together = train(count, names, tmp_path, settings=["bn=sync"])
    worst = {}
    for name in names:
        ours, theirs = torch.load(together / name / "gradients.pt"), torch.load(alone / name / "gradients.pt")
        assert len(ours) == len(theirs) >= 4
        worst[name] = max(relative(a, b) for a, b in zip(ours, theirs, strict=True))
    assert max(worst.values()) <= 1e-10, {name: value for name, value in worst.items() if value > 1e-10}
    print(count, worst)
    for name in names:
        for file in ("memory/step_0.json", "memory/step_1.json", "results.json"):
            assert (together / name / file).read_bytes() == (alone / name / file).read_bytes(), (name, file)
