"""Several processes that train one run, over gloo on the CPU, against one process."""

import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SOAK, encoded, environment
from test_bf16 import COMBINATIONS

from fastil.recipe_file import load
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

# Batches of 191 and one of 3, which two and more processes do not share, in the base step; then of 191 and a rest.
SETTINGS = [
    "classes=5", "base_classes=4", "increment=1", "base_epochs=1", "epochs=1", "batch_size=191", "lr=0.06",
    "exemplars_per_class=10", "compile=false", "precision=fp32",
]  # fmt: skip
# 178 images in an incremental step: before the update of the last 3 alpha moves by a held-out batch that is shared out.
COMBINATIONS = COMBINATIONS | {"meta_of_few": ["loss=meta_balanced", "meta_every=1", "batch_size=175"]}


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
    settings = [*SETTINGS, *settings]
    runs = [{"settings": [*settings, *COMBINATIONS.get(name, [])], "out": str(folder / name)} for name in names]
    work(count, {"float64": float64, "runs": runs}, folder)
    return folder


def work(count, job, folder):
    """Have `count` workers do a job."""
    failed = []
    for process in start(count, job, folder):
        errors = process.communicate(timeout=900)[1]
        failed += [errors[-3000:]] if process.returncode else []
    assert not failed, next((text for text in failed if "Connection closed" not in text), failed[0])


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
        figures = ("images", "train_top1", "loss")  # the meter is float32
        ours, theirs = (
            [
                json.loads(line)[key]
                for line in (path / name / "metrics.jsonl").read_text().splitlines()
                for key in figures
            ]
            for path in (together, alone)
        )
        assert ours == pytest.approx(theirs, rel=1e-5), name


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A .beton of JPEGs of several sizes in four classes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 5)):
        for label in range(4):
            for i in range(count):
                path = folder / f"in/{split}/{label}/{i:02d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                size = (*random.integers(30, 60, 2), 3)
                path.write_bytes(encoded(random.integers(0, 60, size).astype(np.uint8) + 40 * label, quality=90))
    convert(folder / "in", folder / "x.beton", options_of(workers=1), Reporter())
    return folder / "x.beton"


def test_each_image_of_a_file_is_read_by_one_process_but_for_small_batches(photos, tmp_path):
    settings = [
        "size=32", "order=alphabetical", "base_classes=2", "increment=1", "exemplars_per_class=4", "model=resnet8",
        "epochs=2", "batch_size=16", "compile=false", "precision=fp32", "loader=threads",
    ]  # fmt: skip
    run = {"recipe": "imagenet_balanced_5", "data": str(photos), "settings": settings}
    reads, exemplars = {}, {}
    for count in (1, 3):
        out = tmp_path / f"{count}"
        work(count, {"float64": False, "runs": [run | {"out": str(out)}]}, tmp_path)
        reads[count] = [json.loads((out / f"reads_{rank}.json").read_text()) for rank in range(count)]
        exemplars[count] = json.loads((out / "protocol.json").read_text())["effective"]
    # 26 images of the base classes are batches of 16 and 10, 25 of the last step of 16 and 9. The 21 in between are of
    # 16 and 5, which are too few for three processes: all three read them, in both epochs.
    read, twice = Counter(reads[1][0]), sum(map(Counter, reads[3]), Counter())
    assert read <= twice
    assert (twice - read).total() == 2 * 2 * 5
    lengths = list(map(len, reads[3]))
    assert max(lengths) <= 1.25 * min(lengths)  # a batch of 16 is shared out as 6, 5 and 5
    # Every image of the base classes twice for training, once for herding: no image was read in vain.
    visits = sum(step["visits"] for step in exemplars[1])
    assert len(reads[1][0]) == visits + 4 * 13 + 5 * (2 + 3 + 4)


def test_in_float32_two_processes_differ_from_one_as_float32_does_from_float64(alone, tmp_path):
    """The first update, by the same weights: ReLUs near 0 make it more than the rounding of a sum."""
    (tmp_path / "32").mkdir()
    together = train(2, ["softmax"], tmp_path, settings=["bn=sync"], float64=False)
    single = train(1, ["softmax"], tmp_path / "32", float64=False)
    ours, theirs, exact = (torch.load(path / "softmax/gradients.pt")[0] for path in (together, single, alone))
    assert relative(ours, theirs) <= 3 * relative(theirs, exact)


# Code from outside: a network without batch normalisation that keeps something of its images, and a method with a state
# that would not be the same everywhere, on which its loss depends.
OUTSIDE = """
import os
import torch
from torch import nn
from fastil.methods import Method

class Grouped(nn.Module):
    feature_dim = 8
    def __init__(self):
        super().__init__()
        self.register_buffer("brightness", torch.zeros(()))
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), *pool)
    def forward(self, images):
        if self.training:
            self.brightness += images.mean()
        return self.layers(images)

class Near(Method):
    share = 0.0
    def after_memory(self, network, memory):
        self.share = 0.5 + float(os.environ["RANK"])
        return {}
    def state_dict(self):
        return {"share": self.share}
    def load_state_dict(self, state):
        self.share = state["share"]
    def loss_weights(self, context):
        return (self.share, 0.5) if context.num_old else (1.0, 0.0)
    def extra_loss(self, batch, out, teacher_out, ops):
        return None if teacher_out is None else 3 * (out.features - teacher_out.features).square().mean()
"""


def test_a_network_and_a_method_from_outside_are_trained_by_two_processes_as_by_one(tmp_path):
    (tmp_path / "own.py").write_text(OUTSIDE)
    settings = [f"model={tmp_path}/own.py:Grouped", f"method={tmp_path}/own.py:Near", "loss=softmax", "bn=local"]
    settings += ["batch_size=90"]  # 183 images in the incremental step: distillation has a gradient from the second on
    together, single = (train(count, ["own"], tmp_path, settings=settings) / "own" for count in (2, 1))
    ours, theirs = (torch.load(path / "gradients.pt") for path in (together, single))
    assert len(ours) == len(theirs) == 7 + 3
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-10
    for file in ("memory/step_0.json", "memory/step_1.json", "results.json"):
        assert (together / file).read_bytes() == (single / file).read_bytes()
    seeds = [json.loads(path.read_text()) for path in (single / "seeds_0.json", *together.glob("seeds_*.json"))]
    assert seeds[0] == json.loads((together / "seeds_0.json").read_text())  # what draws goes on as in one process ...
    assert set(seeds[0]).isdisjoint(json.loads((together / "seeds_1.json").read_text()))  # ... and elsewhere otherwise


@pytest.mark.parametrize("model", ["resnet8", f"{ROOT}/examples/your_own_network.py:backbone"])
def test_with_local_statistics_an_update_is_that_of_the_parts_by_their_shares(model, tmp_path):
    settings = [f"model={model}", "loss=softmax", "bn=local"]
    together, single = (train(count, ["own"], tmp_path, settings=settings) / "own" for count in (3, 1))
    first, after = torch.load(single / "first.pt"), torch.load(together / "first.pt")["after"]
    network = load("digits", [*SETTINGS, *settings]).build_network(5, 0).double()
    gradient, running = 0.0, {}
    for rank in range(3):
        network.load_state_dict(first["before"])
        network.train().zero_grad()
        images, labels = first["images"][rank::3], first["labels"][rank::3]
        share = len(images) / len(first["images"])
        F.cross_entropy(network(images).logits[:, :4], labels).backward()
        gradient += share * torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        for name, value in network.named_buffers():
            running[name] = running.get(name, 0) + share * value
    assert relative(torch.load(together / "gradients.pt")[0], gradient) <= 1e-10
    assert relative(torch.load(single / "gradients.pt")[0], gradient) > 1e-4  # the statistics are others
    for name, value in running.items():
        torch.testing.assert_close(after[name].double(), value.double(), rtol=1e-10, atol=0)
