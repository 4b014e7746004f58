"""What a run plans, selects and counts at ImageNet's size: seconds and memory, without a pixel.

python -m bench.imagenet_size [--rounds N]

1,281,167 training and 50,000 test images of 1,000 classes, of which only the tables and the manifests are there; where
an image is decoded, one JPEG stands for all. Base 500 + 5 x 100, 20 exemplars of each class. Each line is work that a
run does: seconds by the clock, seconds on the processor, which other programs do not lengthen, and the peak of memory
beyond what was there before. Every piece of work has a process of its own, a fork, so that none finds memory that
another has freed.
"""

import argparse
import ctypes
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import save, spread
from bench.loaders import write_tables_of
from fastil.data import DataConfig, Dataset, load_dataset
from fastil.data.formats.beton import JPEG, Beton
from fastil.data.formats.beton_source import val_path_of
from fastil.data.formats.manifest import FORMAT, Manifest, manifest_path
from fastil.data.loaders.threads import Threads
from fastil.data.published import table
from fastil.data.transforms import transforms
from fastil.device import keep_freed_memory
from fastil.doctor import photo
from fastil.evaluation import evaluate, forward
from fastil.memory import herd_classes
from fastil.models import Folded, Output
from fastil.nearest_mean import class_means
from fastil.plan import EpochPlan, Key, Transform, training_plan
from fastil.recipe import Recipe
from fastil.recipe_file import load
from fastil.text import format_table, say
from fastil.training.frozen import FrozenNetwork
from fastil.training.step_plan import effective_steps
from fastil.training.training_set import Rehearsal

CPU = torch.device("cpu")
IMAGES, TESTED = 1_281_167, 50_000
PER_CLASS, WIDTH = 1300, 512  # the images of ImageNet's largest classes, and ResNet-18's features
BATCH, EXEMPLARS = 128, 20


class OnePhoto(Beton):
    """A file of whose images there is one."""

    photo = b""

    def view(self, i: int) -> memoryview:
        return memoryview(self.photo)


class NoFrames:
    """A loader and a network of which nothing is left but their outputs' shapes."""

    transform = Transform(1, 1, 0, False, (0.0,) * 3, (1.0,) * 3)
    sizes, device = None, CPU

    def batches(self, plan: EpochPlan, *_: Any) -> Any:
        for part in plan.batches():
            yield argparse.Namespace(images=torch.empty(part.stop - part.start, 0))

    def refresh(self) -> None:
        pass

    def __call__(self, images: torch.Tensor) -> Output:
        return Output(torch.ones(len(images), WIDTH), [], torch.ones(len(images), 1000))


def write(path: Path, samples: int) -> None:
    """Write the tables of a file and its manifest."""
    write_tables_of(samples, str(path))
    beton, names = Beton(path), list(table()["imagenet"].class_names)
    crc32 = np.random.default_rng(0).integers(0, 2**32, samples).tolist()
    files = [f"{names[label]}/{names[label]}_{i}.JPEG" for i, label in enumerate(beton.labels.tolist())]
    counts = np.bincount(beton.labels).tolist()
    manifest = Manifest(
        FORMAT, "fastil", 2, "train", {"kind": "ilsvrc", "name": "imagenet", "path": "."},
        {"storage": {"mode": "jpeg"}}, {}, names, None, counts, samples, beton.bytes, "0" * 64, crc32, files,
    )  # fmt: skip
    manifest_path(path).write_text(manifest.dump())


def memory_of(key: str) -> float:
    """Return MiB of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measured(work: Callable[[], object]) -> tuple[float, float, float]:
    """Return seconds by the clock and on the processor, and MiB, of work done in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what is free here already would not show
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
            before, clock, processor = memory_of("VmRSS"), time.perf_counter(), time.process_time()
            work()
            found = time.perf_counter() - clock, time.process_time() - processor, memory_of("VmHWM") - before
            os.write(writing, json.dumps(found).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        content = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the work failed")
    clock, processor, mebibytes = json.loads(content)
    return clock, processor, mebibytes


def rehearsal_of(recipe: Recipe, dataset: Dataset, step: int) -> Rehearsal:
    """Return the rehearsal of a run before a step: the first images of each class stand for those that are herded."""
    protocol = recipe.build_protocol(len(dataset.class_names), dataset.class_names)
    network: FrozenNetwork = None  # type: ignore[assignment]
    rehearsal = Rehearsal(recipe, protocol, dataset, network, print)
    for classes in protocol.steps[:step]:
        for label in classes:
            rehearsal.memory.add(int(label), dataset.train.of_class(int(label))[:EXEMPLARS])
    return rehearsal


def works(path: Path) -> dict[str, Callable[[], object]]:
    """Return what is measured, by its name."""
    config = load("imagenet_balanced_5", [f"data={path}"])
    dataset = load_dataset(config.data)
    train = dataset.train
    assert isinstance(train, Beton)
    transform, _ = transforms(config.data, (224, 224), streamed=True)
    rehearsals = {
        name: rehearsal_of(load(f"imagenet_{name}_5", [f"data={path}"]), dataset, 5)
        for name in ("balanced", "meta", "bic")
    }
    rehearsal = rehearsals["balanced"]
    every = np.arange(len(train))
    base, _ = rehearsal_of(config, dataset, 0).training_set(0)
    last, _ = rehearsal.training_set(5)
    state = rehearsal.state_dict()
    opened = OnePhoto(path)
    OnePhoto.photo = photo(*opened.sizes[0].tolist())
    random = np.random.default_rng(0)
    features = [torch.from_numpy(random.random((PER_CLASS, WIDTH), np.float32)) for _ in range(100)]
    logits, positions = torch.from_numpy(random.random((TESTED, 1000), np.float32)), torch.arange(TESTED) // 50
    exemplars = torch.from_numpy(random.random((1000 * EXEMPLARS, WIDTH), np.float32))
    of_exemplars = torch.arange(1000).repeat_interleave(EXEMPLARS)
    nothing: Any = NoFrames()

    def open_both() -> None:
        found = load_dataset(DataConfig("imagenet", data=str(path), size=224))
        assert found.train.identity is not None
        assert found.val.identity is not None

    def plan(ids: np.ndarray[Any, Any]) -> EpochPlan:
        return training_plan(ids, Key(0, 1), transform, BATCH, train.sizes)

    def begin(count: int) -> None:
        """The loader of the run is there; it gets these ids, and the first batch arrives."""
        with_workers = Threads(opened, transform, CPU)
        batches = with_workers.inputs(plan(last[-count:]))
        next(batches)
        batches.close()

    def protocol() -> None:
        found = config.build_protocol(1000, dataset.class_names)
        effective_steps(config, found, np.bincount(train.labels), dataset.class_names)

    def base_step_features() -> None:
        folded: Folded = nothing
        forward(folded, nothing, base, keeps_logits=False)

    assert train.mode == "jpeg"
    assert int(train.modes.max()) == JPEG
    return {
        "open both files, manifests and identities": open_both,
        "protocol and effective steps": protocol,
        f"plan of an epoch of all {len(every):,} images": lambda: plan(every),
        f"plan of an epoch of the base step ({len(base):,})": lambda: plan(base),
        f"plan of an epoch of the last step ({len(last):,})": lambda: plan(last),
        f"new ids to first batch of {BATCH} ({len(last):,})": lambda: begin(len(last)),
        f"of it, what {BATCH} images alone take": lambda: begin(BATCH),
        "select the last step's images": lambda: rehearsal.training_set(5),
        "select them and hold out Meta's": lambda: rehearsals["meta"].training_set(5),
        "select them without BiC's validation images": lambda: rehearsals["bic"].training_set(5),
        "take up the memory of a checkpoint": lambda: rehearsal.load_state_dict(state["memory"], []),
        f"herd 100 classes of {PER_CLASS:,} x {WIDTH}": lambda: herd_classes(features, EXEMPLARS),
        "hold the features of the base step's images": base_step_features,
        f"means of {len(exemplars):,} exemplars": lambda: class_means(exemplars, exemplars, of_exemplars),
        f"accuracies and confusion of {TESTED:,} x 1,000": lambda: evaluate(
            logits, positions, step=5, num_base=500, num_old=900, num_seen=1000
        ),
    }


def main() -> None:
    """Run the bench and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a run
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "imagenet.beton"
        write(path, IMAGES)
        write(val_path_of(path), TESTED)
        rows: dict[str, list[tuple[float, float, float]]] = {}
        for label, work in works(path).items():
            rows[label] = [measured(work) for _ in range(rounds)]
            say(f"{label:<58}{min(row[1] for row in rows[label]):8.2f} s", flush=True)
    found: dict[str, dict[str, Any]] = {
        label: {
            "seconds": spread([row[0] for row in taken]),
            "processor_seconds": spread([row[1] for row in taken]),
            "mebibytes": max(row[2] for row in taken),
        }
        for label, taken in rows.items()
    }
    header = ("one core", "seconds", "on the processor", "MiB at the peak")
    cells = [
        (label, *(f"{part[key]['median']:.2f}" for key in ("seconds", "processor_seconds")), f"{part['mebibytes']:.0f}")
        for label, part in found.items()
    ]
    say(format_table(header, cells))
    content = {"rounds": rounds, "images": IMAGES, "test_images": TESTED, "work": found}
    say(f"written to {save('imagenet_size', CPU, content)}")


if __name__ == "__main__":
    main()
