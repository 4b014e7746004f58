"""Training on streamed images: whether the loop loses anything to the loader, or the loader to the loop.

python -m bench.streamed [--rounds N] [--images N] [--data FOLDER or TAR]

A network of one convolution on random resized crops of ImageNet JPEGs at 224x224, batch 64, by the trainer and
loader=threads. On a CPU decoding and steps would share the cores, so each has one: a thread that decodes and a thread
that steps. Each is also timed alone: the loader without training, and the same steps on frames that are in
memory. With a stride of 2 the steps are the slower, with one of 4 the loader is. Two cores that are both busy
may be slower than one of them, so either is timed a second time while another process does the other's work.

On a GPU, instead: ResNet-18 in bf16, all cores decode, the same three figures, and no second time with another process.

Claim: training takes at most 1.05 times the slower of the two. Also: the shares of an epoch in which training says that
it waited for data, and its loader for training; and an epoch half of whose images are exemplars, as with
sampler=memory_oversampling, read by the loader with memory=streamed and with memory=resident.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count as count_up
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.convert import read_arguments, spread_out
from bench.harness import ratio, save, show, spread, take_turns
from bench.loaders import BATCH, DEVICE, SIDE, TRANSFORM, arrived, convert
from fastil import machine
from fastil.data import Loader, Split
from fastil.data.formats.beton import Beton
from fastil.data.loaders.resident import Resident
from fastil.data.loaders.threads import Threads
from fastil.device import keep_freed_memory
from fastil.methods import LossConfig, MethodConfig, StepContext
from fastil.methods.il_baseline import ILBaseline
from fastil.models import ModelConfig, Network, build_network
from fastil.optimiser import TrainConfig
from fastil.plan import EpochPlan, Key, Transform, training_plan
from fastil.protocol import Ids
from fastil.training.phases import Phase
from fastil.training.trainer import EpochRecord, Trainer

CLASSES, GOAL = 8, 1.05
STRIDES = (2, 4)
WORKERS = 1 if DEVICE.type == "cpu" else machine.cores()
FRAMES = Transform(SIDE, SIDE, 0, True, TRANSFORM.mean, TRANSFORM.std)


class OneConvolution(nn.Module):
    """A backbone of one convolution."""

    feature_dim = 16

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, self.feature_dim, 7, stride)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return features [B, 16] and one map, from images [B, 3, H, W]."""
        features = torch.relu(self.convolution(images))
        return features.mean((2, 3)), [features]


def network(stride: int) -> Network:
    """Return a network of one convolution with that stride, on a GPU a ResNet-18."""
    if DEVICE.type == "cuda":
        return build_network(ModelConfig("resnet18"), CLASSES, 0).to(DEVICE)
    small = Network(OneConvolution(stride), CLASSES, ModelConfig())
    return small.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class Training:
    """The trainer on one loader, an epoch at a time."""

    def __init__(self, loader: Loader, stride: int, plan: Callable[[], EpochPlan]) -> None:
        self.epochs: list[EpochRecord] = []
        torch.manual_seed(0)
        student, teacher = (network(stride) for _ in range(2))
        self.trainer = Trainer(
            TrainConfig(batch_size=BATCH, epochs=1, precision="fp32" if DEVICE.type == "cpu" else "bf16"),
            student, teacher, loader, torch.arange(1000, device=DEVICE) % CLASSES,
            save=lambda phase, epoch, batch: None, report=self.epochs.append, tick=lambda count: None,
            stop=lambda: False, say=print,
        )  # fmt: skip
        method = ILBaseline(MethodConfig(), LossConfig(), student.width, DEVICE)
        method.begin_step(StepContext(0, 0, CLASSES, np.full(student.width, 100)))
        self.phase = Phase(
            name="train", step=0, parameters=list(student.parameters()), plan=lambda epoch: plan(), epochs=1,
            schedule=lambda epoch: 0.0,  # or steps take as long as what has been learned makes them
            method=method, teacher=False,
        )  # fmt: skip

    def seconds(self) -> float:
        """Return the seconds of an epoch."""
        began = time.perf_counter()
        self.trainer.fit(self.phase)
        return time.perf_counter() - began


def on_frames(frames: NDArray[np.uint8], stride: int) -> Training:
    """Return a training with the same steps on frames that are in memory."""
    count = len(frames)
    ready = Resident(Split(frames, np.zeros(count, dtype=np.int64)), FRAMES, DEVICE)
    return Training(ready, stride, lambda: training_plan(np.arange(count), Key(0, 0), FRAMES, BATCH))


def decode_for_ever(path: str, _: int, began: Event) -> None:
    """Decode until the process is killed; set the event once it has begun."""
    torch.set_num_threads(1)
    beton = Beton(path)
    loader = Threads(beton, TRANSFORM, DEVICE, workers=1)
    for epoch in count_up():
        for _frames in loader.pixels(
            training_plan(np.arange(len(beton)), Key(1, 0, "train", epoch), TRANSFORM, BATCH, beton.sizes)
        ):
            began.set()


def step_for_ever(_: str, stride: int, began: Event) -> None:
    """Train until the process is killed; set the event once it has begun."""
    torch.set_num_threads(1)
    training = on_frames(np.zeros((8 * BATCH, SIDE, SIDE, 3), np.uint8), stride)
    while True:
        training.seconds()
        began.set()


def while_busy(other: Callable[[str, int, Event], None], path: Path, stride: int, work: Callable[[], float]) -> float:
    """Return the figure of `work` while another process does `other`."""
    spawn = multiprocessing.get_context("spawn")
    began = spawn.Event()
    process = spawn.Process(target=other, args=(str(path), stride, began), daemon=True)
    process.start()
    try:
        if not began.wait(120):
            raise RuntimeError("the other process does not begin")
        return work()
    finally:
        process.kill()
        process.join()


def main() -> None:
    """Run the bench and write its result file."""
    arguments = read_arguments(__doc__, rounds=3, images=3000)
    on_cpu = DEVICE.type == "cpu"
    if on_cpu:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    thorough = on_cpu and "FASTIL_RESULTS" not in os.environ  # not in a stage of bench.first_contact
    strides = STRIDES if thorough else STRIDES[:1]
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count, _, _ = spread_out(arguments.data, folder / "images", arguments.images)
        beton = convert(folder / "images", folder / "x.beton")
        loader, epochs = Threads(beton, TRANSFORM, DEVICE, workers=WORKERS), count_up()

        def streamed() -> EpochPlan:
            key = Key(0, 0, "train", next(epochs))
            return training_plan(np.arange(count), key, TRANSFORM, BATCH, beton.sizes)

        def read(plan: EpochPlan) -> float:
            began = time.perf_counter()
            assert sum(len(frames) for frames in loader.pixels(plan)) == len(plan.ids)
            arrived()
            return time.perf_counter() - began

        frames = torch.cat([part.clone() for part in loader.pixels(streamed())]).cpu().numpy()
        contestants: dict[str, Callable[[], float]] = {}
        trainings: dict[int, Training] = {}
        for stride in strides:
            training, steps = Training(loader, stride, streamed), on_frames(frames, stride)
            trainings[stride] = training
            alone = {"loader": lambda: read(streamed()), "steps": steps.seconds}
            contestants |= {f"stride {stride}, training": training.seconds}
            contestants |= {f"stride {stride}, {name}": work for name, work in alone.items()}
            contestants |= {
                f"stride {stride}, {name}, other core busy": partial(
                    while_busy, other, folder / "x.beton", stride, alone[name]
                )
                for name, other in (("loader", step_for_ever), ("steps", decode_for_ever))
                if thorough
            }
            training.seconds()
            steps.seconds()
        print(
            f"seconds for {count} images, {'one thread decodes' if on_cpu else f'{WORKERS} threads decode'}, one steps"
        )
        figures = take_turns(contestants, arguments.rounds)

        def holding(held: Ids) -> float:
            loader.keep(held)
            return read(streamed())

        nothing, half = np.empty(0, dtype=np.int64), np.arange(0, count, 2)
        memories = take_turns(
            {"memory=streamed": lambda: holding(nothing), "memory=resident": lambda: holding(half)}, arguments.rounds
        )
    ratios = {}
    for stride in strides:
        for busy in ("", ", other core busy") if thorough else ("",):
            names = [f"stride {stride}, {name}" for name in ("training", f"loader{busy}", f"steps{busy}")]
            turns = zip(*(figures[name] for name in names), strict=True)
            ratios[f"stride {stride}, training / slower{busy}"] = spread([a / max(b, c) for a, b, c in turns])
    for label, values in figures.items():
        show(label, spread(values), "s")
    for label, found in ratios.items():
        show(label, found, f"goal {GOAL:g}")
    waits: dict[str, list[float]] = {}
    for stride, training in trainings.items():
        said = training.epochs[1:]  # the first one warms up
        waits[f"stride {stride}, data"] = [epoch.data_seconds / epoch.seconds for epoch in said]
        waits[f"stride {stride}, loader idle"] = [epoch.loader_idle or 0.0 for epoch in said]
    for label, values in waits.items():
        show(label, spread(values), "of the time")
    speedup = ratio(memories, "memory=streamed", "memory=resident")
    show("memory=streamed / memory=resident", speedup)
    content = {
        "rounds": arguments.rounds, "images": count, "batch": BATCH,
        "seconds": {name: spread(values) for name, values in (figures | memories).items()},
        "waits": {name: spread(values) for name, values in waits.items()},
        "ratios": ratios | {"memory=streamed / memory=resident": speedup}, "goal": GOAL,
    }  # fmt: skip
    print(f"written to {save('streamed', DEVICE, content)}")


if __name__ == "__main__":
    main()
