"""Training throughput of fastil's loop, of its ceiling and of the usual loop, in float32 and in bfloat16.

python -m bench.train_step [--rounds N] [--steps N] [--precision fp32 --precision bf16] [--model resnet18]

(a) fastil: resident loader, compiled channels-last network, folded teacher, one read per epoch.
(b) ceiling: the same compiled network and loss on one batch that is already there, and nothing else in the loop.
(c) usual: Dataset with PIL transforms, DataLoader with two workers, eager NCHW network in float32, `.item()` in every
step.
ResNet-32 at 32x32, batch 128, with and without a teacher; (c)'s pixels are first checked to be (a)'s. (c)'s workers are
started once and stay ahead between its turns, as they would in a long epoch. Where the device only emulates bfloat16 a
turn in it is one batch.

On a GPU, instead (bench.gpu_step): the loop eager and compiled, each uncaptured and captured in a CUDA graph, the
kernels that a step launches, the share of the time in which the GPU is idle, and as the ceiling the captured step's
kernels back to back; in bf16 unless --precision says otherwise. --model resnet18 is the same at 224x224, without (c),
into train_step_resnet18.json; for a GPU only.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench import gpu_step
from bench.harness import digits_at, ratio, save, show, spread, take_turns
from fastil.data import Batch, Split, make_loader
from fastil.device import Precision, pick_device, precision_note
from fastil.losses import balanced_cross_entropy, distillation, log_prior
from fastil.methods import LossConfig, MethodConfig, StepContext
from fastil.methods.il_baseline import ILBaseline
from fastil.models import ModelConfig, Network, build_network
from fastil.optimiser import TrainConfig
from fastil.plan import EpochPlan, Key, Transform, training_plan
from fastil.training.phases import Phase
from fastil.training.trainer import Trainer

BATCH, STEPS, CLASSES, NUM_OLD = 128, 8, 60, 50
TRANSFORM = Transform(32, 32, pad=4, flip=True, mean=(0.5071, 0.4866, 0.4409), std=(0.2009, 0.1984, 0.2023))
SIZES = {"resnet32": 32, "resnet18": 224}
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
COUNTS = np.array([20] * NUM_OLD + [500] * (CLASSES - NUM_OLD) + [0] * 4)


class PilDataset(Dataset[tuple[Tensor, int]]):
    """A Dataset that pads, crops and flips with PIL, then makes a normalised tensor, image by image, as torchvision's
    transforms do."""

    def __init__(self, split: Split, plan: EpochPlan) -> None:
        self.split, self.plan = split, plan
        self.mean = torch.tensor(TRANSFORM.mean).view(3, 1, 1)
        self.std = torch.tensor(TRANSFORM.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.plan.ids)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.split.images[self.plan.ids[row]])
        top, left, height, width = (int(v) for v in self.plan.boxes[row])
        image = image.crop((left, top, left + width, top + height))  # outside the image PIL pads with black
        if self.plan.flips[row]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return (tensor - self.mean) / self.std, int(self.split.labels[self.plan.ids[row]])


def transform_of(split: Split) -> Transform:
    """Return TRANSFORM at the size of the images."""
    height, width = split.images.shape[1:3]
    return replace(TRANSFORM, height=height, width=width)


def plain_trainer(
    student: Network,
    teacher: Network,
    split: Split,
    device: torch.device,
    precision: Precision = "fp32",
    bn: Literal["local", "sync"] = "local",
) -> Trainer:
    """Return a trainer that keeps and reports nothing, and is not compiled."""
    return Trainer(
        TrainConfig(batch_size=BATCH, epochs=1, precision=precision, bn=bn),
        student,
        teacher,
        make_loader(split, "auto", transform_of(split), device),
        torch.arange(CLASSES, device=device),
        save=lambda phase, epoch, batch: None,
        report=lambda record: None,
        tick=lambda count: None,
        stop=lambda: False,
        say=print,
    )


def compiled_trainer(
    student: Network, teacher: Network, split: Split, device: torch.device, precision: Precision = "fp32"
) -> Trainer:
    """Return a compiled trainer that keeps and reports nothing."""
    trainer = plain_trainer(student, teacher, split, device, precision)
    note = trainer.compile()
    if note:
        raise SystemExit(note)
    return trainer


def build(
    split: Split,
    device: torch.device,
    images: int,
    loss: LossConfig | None = None,
    precision: Precision = "fp32",
    make: Callable[..., Trainer] = compiled_trainer,
    model: str = "resnet32",
) -> tuple[Trainer, ILBaseline, Phase, Phase]:
    """Return a trainer in the middle of an incremental step, its method, its phase with a teacher and the one
    without."""
    student, teacher = (build_network(ModelConfig(model), CLASSES, seed).to(device) for seed in (0, 1))
    trainer = make(student, teacher, split, device, precision)
    method = ILBaseline(MethodConfig(), loss or LossConfig(), student.width, device)
    method.begin_step(StepContext(1, NUM_OLD, CLASSES, COUNTS))

    def phase(with_teacher: bool) -> Phase:
        return Phase(
            name="train",
            step=1,
            parameters=list(student.parameters()),
            plan=lambda epoch: training_plan(np.arange(images), Key(0, 1), transform_of(split), BATCH),
            epochs=1,
            schedule=lambda epoch: 0.01,
            method=method,
            teacher=with_teacher,
        )

    return trainer, method, phase(True), phase(False)


class UsualLoop:
    """The loop that most repositories run."""

    def __init__(self, split: Split, plan: EpochPlan, device: torch.device, teacher: bool) -> None:
        student, frozen = (build_network(ModelConfig("resnet32"), CLASSES, seed).to(device) for seed in (0, 1))
        self.student = student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.teacher = frozen.to(memory_format=torch.contiguous_format).eval() if teacher else None  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4)
        self.prior = log_prior(torch.from_numpy(COUNTS), NUM_OLD).to(device)
        self.device = device
        loader = DataLoader(PilDataset(split, plan), batch_size=BATCH, num_workers=2)
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(loader)
        self.total = self.step(*next(self.batches))  # warm-up

    def images_per_second(self, steps: int = STEPS) -> float:
        """Return the images per second of so many steps."""
        began, seen = time.perf_counter(), 0
        for images, labels in islice(self.batches, steps):
            self.total += self.step(images, labels)
            seen += len(images)
        assert seen == BATCH * steps, "the plan of the usual loop is too short for so many rounds"
        return seen / (time.perf_counter() - began)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Make one step. Returns its loss."""
        images, labels = images.to(self.device), labels.to(self.device)
        logits = self.student(images).logits
        loss = balanced_cross_entropy(logits, labels, self.prior)
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(images).logits
            loss = loss / 6 + distillation(logits, teacher_logits, NUM_OLD, 2.0) * 5 / 6
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()


def check_pixels(split: Split, plan: EpochPlan, trainer: Trainer) -> None:
    """Raise unless every pixel of (c) equals (a)'s, bit for bit in float32."""
    usual = DataLoader(PilDataset(split, plan), batch_size=BATCH)
    for (theirs, labels), ours in zip(usual, trainer.loader.batches(plan), strict=True):
        assert torch.equal(theirs, ours.images.cpu()), "the two loops see different pixels"
        assert torch.equal(labels, ours.labels.cpu())
    print(f"pixels of (a) and (c) are equal on {len(plan.ids)} augmented images")


class Contestant:
    """fastil's loop and its ceiling in one precision."""

    def __init__(self, split: Split, device: torch.device, precision: Precision, steps: int) -> None:
        self.steps = steps if precision_note(precision, device) is None else 1
        self.trainer, _, *phases = build(split, device, BATCH * self.steps, precision=precision)
        self.phases: dict[bool, Phase] = {phase.teacher: phase for phase in phases}
        plan = phases[0].plan(0)
        self.one: Batch = next(iter(self.trainer.loader.batches(plan, 0, self.trainer.pixels)))
        for phase in phases:
            self.trainer.fit(phase)  # warm-up

    def loop(self, teacher: bool) -> float:
        """Return the images per second of (a)."""
        began = time.perf_counter()
        self.trainer.fit(self.phases[teacher])
        return BATCH * self.steps / (time.perf_counter() - began)

    def ceiling(self, teacher: bool) -> float:
        """Return the images per second of (b)."""
        trainer, phase, one = self.trainer, self.phases[teacher], self.one
        update = trainer.update(phase)
        trainer.student.train()
        began = time.perf_counter()
        for _ in range(self.steps):
            teacher_out = trainer.folded_teacher(one.images) if teacher else None
            with trainer.autocast():
                out = trainer.fast_student(one.images)
            phase.method.backward(one, out, teacher_out, trainer.meter)
            update.apply()
            trainer.student.zero_grad()
        trainer.meter.rows.sum(0).tolist()  # the end of the queue
        return BATCH * self.steps / (time.perf_counter() - began)


def on_gpu(device: torch.device, model: str, precisions: list[Precision], rounds: int) -> None:
    """Measure all modes on a GPU, and write the result file after each."""
    images = BATCH * STEPS
    split = digits_at(SIZES[model], images)
    name = "train_step" if model == "resnet32" else f"train_step_{model}"
    content: dict[str, Any] = {"rounds": rounds, "batch": BATCH, "model": model, "results": {}}
    for precision in precisions:
        trainer, _, *phases = build(split, device, images, precision=precision, model=model)
        for phase in phases:
            label = f"{precision}, {'with' if phase.teacher else 'without'} a teacher"
            print(label, flush=True)
            content["results"][label] = gpu_step.measure(trainer, phase, BATCH, rounds)
            save(name, device, content)
    if model != "resnet32":
        return
    plan = training_plan(np.tile(np.arange(images), rounds + 1), Key(0, 2), TRANSFORM, BATCH)
    usual = UsualLoop(split, plan, device, True)
    content["usual loop, fp32, with a teacher"] = rates = spread([usual.images_per_second() for _ in range(rounds)])
    show("usual loop, fp32, with a teacher", rates, "img/s")
    print(f"written to {save(name, device, content)}")


def main() -> None:
    """Run the bench and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="default: all that the device has")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a turn, on a CPU")
    parser.add_argument("--model", default="resnet32", choices=[*SIZES], help="on a GPU")
    arguments = parser.parse_args()
    rounds, steps, device = arguments.rounds, arguments.steps, pick_device("auto")
    if device.type == "cuda":
        on_gpu(device, arguments.model, arguments.precision or ["bf16"], rounds)
        return
    if arguments.model != "resnet32":
        parser.error(f"--model {arguments.model}: for a GPU only")
    precisions = arguments.precision or [p for p in PRECISIONS if p != "tf32"]
    images = BATCH * steps
    split = digits_at(32, images)
    contestants = {precision: Contestant(split, device, precision, steps) for precision in precisions}
    first = next(iter(contestants.values())).trainer
    check_pixels(split, training_plan(np.arange(images), Key(0, 1), TRANSFORM, BATCH), first)
    long_plan = training_plan(np.tile(np.arange(images), rounds + 1), Key(0, 2), TRANSFORM, BATCH)
    results = {}
    for teacher, label in ((False, "without a teacher"), (True, "with a teacher")):
        turns: dict[str, Callable[[], float]] = {}
        for precision, contestant in contestants.items():
            turns[f"a fastil, {precision}"] = partial(contestant.loop, teacher)
            turns[f"b ceiling, {precision}"] = partial(contestant.ceiling, teacher)
        usual = UsualLoop(split, long_plan, device, teacher)
        turns["c usual"] = partial(usual.images_per_second, steps)
        print(f"{label}, images per second, {steps} batches of {BATCH} a turn")
        figures = take_turns(turns, rounds)
        ratios = {}
        for precision in precisions:
            ours = f"a fastil, {precision}"
            ratios[f"{precision}: a / b"] = ratio(figures, ours, f"b ceiling, {precision}")
            ratios[f"{precision}: a / c"] = ratio(figures, ours, "c usual")
            if precision != "fp32" and "fp32" in precisions:
                ratios[f"{precision} / fp32"] = ratio(figures, ours, "a fastil, fp32")
        rates = {name: spread(values) for name, values in figures.items()}
        for name, values in rates.items():
            show(f"{label}: {name}", values, "img/s")
        for name, values in ratios.items():
            show(f"{label}: {name}", values)
        results[label] = {"images_per_second": rates, "ratios": ratios}
    content = {
        "rounds": rounds,
        "steps": steps,
        "batch": BATCH,
        "model": "resnet32",
        "precisions": precisions,
        "results": results,
    }
    print(f"written to {save('train_step', device, content)}")


if __name__ == "__main__":
    main()
