"""Several processes that train together: the step, the exchange, the gradients, the plan, and eight GPUs on paper.

python -m bench.ranks [--rounds N]

ResNet-32 at 32x32, a batch of 128 in all, with a teacher, float32, not compiled, one thread for each process, gloo.
(a) Seconds of a step of the training loop in one process and in two, with batch normalisation on the statistics of
each one's images (bn=local) and of the whole batch (bn=sync). Every turn starts its processes again.
(b) Seconds of the exchange alone (Trainer.exchange), the number of all-reduces in a step, and their bytes.
(c) The gradient of the first update in two processes against that in one, and what float32 does to it in one.
(d) The plan of an epoch over 14,197,122 images, and the share of one of eight processes in it: seconds and memory.
(e) Steps on eight GPUs, calculated from the constants in ESTIMATES. Nothing of it was measured.

Two processes need two cores that nothing else uses. Where they have less, the seconds of the clock say little: look at
the processor time, which is what the busiest process would need at least.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bench.harness import digits_at, ratio, save, show, spread, take_turns
from bench.train_step import BATCH, build, plain_trainer
from fastil import ranks
from fastil.models import Folded, ModelConfig, build_network
from fastil.models.blocks import BatchNorm
from fastil.optimiser import Update
from fastil.plan import Key, SamplerConfig, Transform, draw, training_plan
from fastil.training.trainer import Trainer

STEPS, EXCHANGES = 4, 20  # of a turn
CASES = {"1 process": (1, "local"), "2 processes, bn=local": (2, "local"), "2 processes, bn=sync": (2, "sync")}
ALONE = "1 process"
IMAGES, CLASSES = 14_197_122, 21_841  # of ImageNet-21k, as its authors count them
CPU = torch.device("cpu")

# For (e). Estimates, each with its source; the rates are those of one H100 in bf16 with a teacher.
ESTIMATES = {
    "kernel": (2e-6, "s; a small kernel in a captured step, launch included: assumed"),
    "kernels": (560, "launches of a compiled step of ResNet-32 with a teacher: counted without a GPU"),
    "resnet32": (64e3, "images/s of a captured step at batch 128: estimated from those launches and bytes"),
    "resnet32 eager": (18e3, "images/s of an eager step at batch 128, bound by launches: estimated alike"),
    "resnet18": (7e3, "images/s at 224 pixels, bound by the GPU: from FFCV's published rate without one"),
    "bandwidth": (225e9, "bytes/s: half of what NVLink's data sheet gives an H100 in each direction"),
    "latency": (30e-6, "s of a small all-reduce over eight GPUs of one machine: the order of what nccl-tests print"),
}


def in_float64(student: torch.nn.Module, teacher: torch.nn.Module, *arguments: Any) -> Trainer:
    """Return a trainer that computes in float64."""
    trainer = plain_trainer(student.double(), teacher.double(), *arguments)  # type: ignore[arg-type]
    trainer.pixels = torch.float64
    trainer.folded_teacher = Folded(trainer.teacher, trainer.pixels, trainer.full)
    return trainer


def work(bn: Any, out: Path, wide: bool) -> None:
    """Be one of the processes of a turn. The first one writes out.json and the gradient of the first update, out.pt."""
    torch.set_num_threads(1)
    make = in_float64 if wide else partial(plain_trainer, bn=bn)
    trainer, method, phase, _ = build(digits_at(32, BATCH * STEPS), CPU, BATCH * STEPS, make=make)
    if wide:
        for part in (method, method.classification):
            floats = {name: v for name, v in vars(part).items() if isinstance(v, Tensor) and v.is_floating_point()}
            vars(part).update({name: value.double() for name, value in floats.items()})
    if bn == "sync":
        trainer.student.synchronise()
    first, sent = list[Tensor](), list[int]()
    apply, all_reduce = Update.apply, dist.all_reduce

    def noting(update: Update) -> None:
        first.append(torch.cat([p.grad.flatten() for p in update.parameters if p.grad is not None]))
        apply(update)

    def counting(values: Tensor, *arguments: Any) -> Any:
        sent.append(values.nbytes)
        return all_reduce(values, *arguments)

    with patch.object(Update, "apply", noting), patch.object(dist, "all_reduce", counting):
        trainer.fit(phase)  # also warms up
    if ranks.first():
        torch.save(first[0].double(), out.with_suffix(".pt"))
    if wide:
        return
    figures: dict[str, Any] = {"all-reduces": len(sent) / STEPS, "bytes": sum(sent) / STEPS}
    step, processor = timed(lambda: trainer.fit(phase))
    figures |= {"step": step / STEPS, "processor": [value / STEPS for value in processor]}
    if ranks.count() > 1:
        update = trainer.update(phase)
        trainer.student.train()
        for parameter in update.parameters:
            parameter.grad = torch.zeros_like(parameter)
        alone = [timed(lambda: trainer.exchange(phase, update, 1 / ranks.count()))[0] for _ in range(EXCHANGES)]
        figures["exchange"] = statistics.median(alone)
    if ranks.first():
        out.write_text(json.dumps(figures))


def timed(call: Callable[[], object]) -> tuple[float, list[float]]:
    """Return the seconds of a call that all processes begin together, and the processor seconds of each of them."""
    ranks.total(torch.zeros(1))
    began, processor = time.perf_counter(), time.process_time()
    call()
    seconds, used = time.perf_counter() - began, time.process_time() - processor
    return seconds, ranks.whole_of(torch.tensor([used]), ranks.count()).tolist()


def run(out: Path, processes: int, *options: str) -> None:
    """Run the processes of a turn."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = [*launcher, "-m", "bench.ranks", "--worker", str(out), *options]
    subprocess.run(worker, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def steps(folder: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (a) and (b), and (c)."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}

    def turn(name: str) -> float:
        processes, bn = CASES[name]
        run(folder / f"{name}.json", processes, "--bn", bn)
        turns[name].append(json.loads((folder / f"{name}.json").read_text()))
        return float(turns[name][-1]["step"])

    figures = take_turns({name: partial(turn, name) for name in CASES}, rounds)
    results: dict[str, Any] = {}
    for name, found in turns.items():
        busiest = [max(one["processor"]) for one in found]
        results[name] = {
            "seconds of a step": spread(figures[name]),
            "processor seconds of a step, busiest process": spread(busiest),
            "share of a processor that it had": spread([a / b for a, b in zip(busiest, figures[name], strict=True)]),
        }
        if name != ALONE:
            mine = [max(one["processor"]) for one in turns[ALONE]]
            results[name] |= {
                "times as fast as one process (2 would be ideal)": ratio(figures, ALONE, name),
                "the same by processor time": spread([a / b for a, b in zip(mine, busiest, strict=True)]),
                "seconds of the exchange alone": spread([one["exchange"] for one in found]),
                "all-reduces of a step": found[0]["all-reduces"],
                "bytes of a step": found[0]["bytes"],
            }
    run(folder / "float64.json", 1, "--float64")
    gradients = {name: torch.load(folder / f"{name}.pt") for name in [*CASES, "float64"]}

    def differs(found: str, wanted: str) -> float:
        return float((gradients[found] - gradients[wanted]).norm() / gradients[wanted].norm())

    rounding = {f"{name}, against 1 process": differs(name, ALONE) for name in CASES if name != ALONE}
    rounding |= {f"{name}, against float64": differs(name, "float64") for name in CASES}
    return results, rounding


def planning() -> dict[str, Any]:
    """Return (d)."""
    random, key = np.random.default_rng(0), Key(0, 1)
    ids, sizes = np.arange(IMAGES), random.integers(200, 600, (IMAGES, 2)).astype(np.int32)
    labels = np.sort(random.integers(0, CLASSES, IMAGES))
    transform = Transform(224, 224, 0, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3, resized=True)
    probabilities = SamplerConfig("class_oversampling").probabilities
    plan = training_plan(ids, key, transform, BATCH, sizes)
    parts: dict[str, Callable[[], object]] = {
        "draw, classes oversampled": lambda: draw(ids, probabilities(labels, CLASSES // 2), key),  # type: ignore[arg-type]
        "plan of the epoch": lambda: training_plan(ids, key, transform, BATCH, sizes),
        "share of one of 8": lambda: plan.of_rank(0, 8),
    }
    found = {}
    for name, part in parts.items():
        tracemalloc.start()  # slows what makes many small objects; these make few large ones
        began = time.process_time()
        part()
        seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found[name] = {"processor seconds": seconds, "peak MiB": peak / 2**20}
    return found


def on_paper() -> dict[str, dict[str, float]]:
    """Return (e): milliseconds of a step on one GPU and on eight, with bn=local and bn=sync."""
    of = {name: value for name, (value, _) in ESTIMATES.items()}
    rows = {}
    for title, model, classes, batch in (
        ("CIFAR-100, ResNet-32, batch 128", "resnet32", 100, 128),
        ("ImageNet, ResNet-18, batch 128", "resnet18", 1000, 128),
        ("ImageNet, ResNet-18, batch 1024", "resnet18", 1000, 1024),
    ):
        parameters, layers = sizes(model, classes)
        payload, deep = 4 * parameters, layers / sizes("resnet32", 100)[1]  # launches follow the layers
        captured, eager = of["kernels"] * of["kernel"] * deep, 128 / of["resnet32 eager"] * deep
        exchange = 2 * 7 / 8 * payload / of["bandwidth"] + of["latency"]
        share, statistics_too = batch / 8 / of[model], exchange + 2 * layers * of["latency"]
        rows[title] = {
            "one GPU": 1e3 * max(captured, batch / of[model]),
            "8 GPUs, bn=local": 1e3 * (max(captured, share) + exchange),
            "8 GPUs, bn=sync": 1e3 * (max(eager, share) + statistics_too),  # never captured
            "exchange": 1e3 * exchange,
            "MB sent": payload / 1e6,
        }
    return rows


def sizes(model: str, classes: int) -> tuple[int, int]:
    """Return the number of parameters of a network, and of its layers of batch normalisation."""
    network = build_network(ModelConfig(model), classes, 0)
    return sum(p.numel() for p in network.parameters()), sum(isinstance(m, BatchNorm) for m in network.modules())


def main() -> None:
    """Run the bench and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bn", default="local", help=argparse.SUPPRESS)
    parser.add_argument("--float64", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        with ranks.together(CPU):
            work(arguments.bn, arguments.worker, arguments.float64)
        return
    with tempfile.TemporaryDirectory() as folder:
        results, rounding = steps(Path(folder), arguments.rounds)
    for name, values in results.items():
        for what, value in values.items():
            show(f"{name}: {what}", value if isinstance(value, dict) else spread([value]))
    content = {
        "rounds": arguments.rounds, "batch": BATCH, "model": "resnet32",
        "steps": results, "gradient of the first update, relative difference": rounding,
        "plan of 14,197,122 images": planning(), "estimates": ESTIMATES, "on paper, ms": on_paper(),
    }  # fmt: skip
    print(json.dumps({key: value for key, value in content.items() if key not in ("steps", "estimates")}, indent=1))
    print(f"written to {save('ranks', CPU, content)}")


if __name__ == "__main__":
    main()
