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
from conftest import SOAK, encoded, environment
from test_bf16 import COMBINATIONS

from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

# Batches of 191 and one of 3, which two and more processes do not share, in the base step; then of 191 and a rest.
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
