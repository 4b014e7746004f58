"""An estimate of a row of Table 1 on one H100, from what its steps launch, move and compute: nothing here is measured.

python -m bench.estimate_h100 [--cores 16]

Compiled steps: the launches of `bench.step_kernels`, their bytes and the operations of their convolutions. Eager ones:
the operators that torch is asked for in a step on a CPU, each taken for one launch, batch normalisation for two. A
launch takes a gap and the longest of three times: that of the shortest kernel, of its bytes, of its operations. The
step takes the sum of these, or the time that the host needs to launch them, whichever is longer. What a GPU reaches of
its published rates is not known: FAST and SLOW stand for what is likely at best and at worst.

Left out: ragged batches, captures and compilation, the ends of epochs, checkpoints, and that a cache may hold what a
kernel reads.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer

from bench.harness import RESULTS, digits_at
from bench.launch_counts import Counter
from bench.step_kernels import BATCH, Kernel, generate
from fastil.data import make_loader
from fastil.data.published import table
from fastil.methods import LossConfig, MethodConfig, StepContext
from fastil.methods.il_baseline import ILBaseline
from fastil.models import ModelConfig, build_network
from fastil.optimiser import TrainConfig
from fastil.plan import Key, Transform, training_plan
from fastil.recipe_file import load
from fastil.text import duration, format_table, say
from fastil.training.phases import Phase
from fastil.training.step_plan import StepPlan, effective_steps, frozen_visits
from fastil.training.trainer import Trainer

ROWS = ("cifar100_balanced_5", "imagenet_balanced_5")
CPU = torch.device("cpu")
PARTS = ("launches", "bytes", "math")
MEMORY, TENSOR_CORES, FLOAT32 = 3.35e12, 989e12, 67e12  # H100 SXM: bytes/s, bfloat16 and float32 operations/s, dense
# Around the networks: augment, labels, loss, weights cast and gradients cast back, SGD in groups of tensors, and the
# copies of the inputs into a captured step. Bytes: of each weight 6 and 6 for the casts, 20 for SGD with momentum.
AROUND, BYTES_PER_WEIGHT = 14, 32
FEW, MORE = 2, 4  # batches that are run eagerly: bytes lie on the line through them


# Eager batch normalisation launches twice and reads its inputs both times: the share of its bytes that they are.
READ_TWICE = {"native_batch_norm": 1 / 2, "native_batch_norm_backward": 2 / 3}


@dataclass(frozen=True)
class Rates:
    """What a GPU and its host are taken to reach. Microseconds: gap, between two launches; shortest, of a kernel;
    compiled, eager, of the host for a launch; loop, of the host for a step besides. Shares of the published rates:
    memory, math. tile: channels that a convolution makes at once; one that makes fewer wastes the others' operations.
    """

    gap: float
    shortest: float
    memory: float
    math: float
    tile: int
    compiled: float
    eager: float
    loop: float


FAST = Rates(gap=1.2, shortest=1.5, memory=0.9, math=0.6, tile=32, compiled=5.0, eager=6.0, loop=150)
SLOW = Rates(gap=2.0, shortest=2.5, memory=0.7, math=0.25, tile=64, compiled=8.0, eager=10.0, loop=400)


@dataclass(frozen=True)
class Bounds:
    """Where the seconds of a step on the GPU go: to gaps and the shortest kernels, to bytes, to operations."""

    launches: float
    bytes: float
    math: float

    @property
    def total(self) -> float:
        """Seconds on the GPU."""
        return self.launches + self.bytes + self.math

    @property
    def name(self) -> str:
        """What takes most of it."""
        return max(PARTS, key=lambda part: float(getattr(self, part)))


def math_seconds(kernel: Kernel, peak: float, rates: Rates) -> float:
    """Return the seconds of a launch's operations. peak: operations per second, published."""
    wasted = max(1.0, rates.tile / kernel.channels) if kernel.channels else 1.0
    return kernel.operations * wasted / (peak * rates.math)


def bounds(kernels: list[Kernel], rates: Rates) -> Bounds:
    """Return where the time of these launches goes: each to the longest of its three times, every gap to launches."""
    found = {"launches": len(kernels) * rates.gap * 1e-6, "bytes": 0.0, "math": 0.0}
    for kernel in kernels:
        times = {
            "launches": rates.shortest * 1e-6,
            "bytes": kernel.bytes / (MEMORY * rates.memory),
            "math": math_seconds(kernel, TENSOR_CORES, rates),
        }
        longest = max(times, key=lambda part: times[part])
        found[longest] += times[longest]
    return Bounds(**found)


class Operators(Counter):  # type: ignore[no-untyped-call]
    """The operators that torch is asked for, with their names and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operator(func, args, kwargs or {}, result)
        self.names += [func._schema.name.split("::")[1]] * (len(self.count.bytes) - len(self.names))
        return result


def operators(model: str, size: int, batch: int, teacher: bool) -> list[Kernel]:
    """Return the operators of an uncompiled training step in bfloat16, run on this CPU."""
    transform = Transform(size, size, pad=4, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3)
    networks = [build_network(ModelConfig(model), 100, seed) for seed in (0, 1)]
    student, frozen = networks
    trainer = Trainer(
        TrainConfig(batch_size=batch, epochs=1, precision="bf16"), student, frozen,
        make_loader(digits_at(size, batch), "auto", transform, CPU), torch.arange(10),
        save=lambda phase, epoch, at: None, report=lambda record: None, tick=lambda count: None,
        stop=lambda: False, say=say,
    )  # fmt: skip
    method = ILBaseline(MethodConfig(), LossConfig("balanced"), student.width, CPU)
    counts = np.array([20] * 50 + [500] * 50 + [0] * (student.width - 100))
    method.begin_step(StepContext(1, 50, 100, counts))
    phase = Phase(
        name="train", step=1, parameters=list(student.parameters()), epochs=1, schedule=lambda epoch: 0.01,
        plan=lambda epoch: training_plan(np.arange(batch), Key(0, 1), transform, batch), method=method, teacher=teacher,
    )  # fmt: skip
    update = trainer.update(phase)
    inputs = next(iter(trainer.loader.inputs(phase.plan(0))))
    trainer.train_step(phase, update, inputs, batch)  # what is made once
    with Operators() as counter:
        trainer.train_step(phase, update, inputs, batch)
    return [Kernel(*pair) for pair in zip(counter.names, counter.count.bytes, strict=True)]


def eager(model: str, size: int, teacher: bool, compiled: list[Kernel]) -> list[Kernel]:
    """Return the launches of an uncompiled step. Convolutions are those of the compiled one, which it calls as well."""
    few, more = (operators(model, size, batch, teacher) for batch in (FEW, MORE))
    if [kernel.kind for kernel in few] != [kernel.kind for kernel in more]:
        raise ValueError("the operators of a step depend on the size of the batch")
    share = (BATCH - FEW) / (MORE - FEW)
    pairs = [pair for pair in zip(few, more, strict=True) if "convolution" not in pair[0].kind]
    others = [Kernel(a.kind, a.bytes + (b.bytes - a.bytes) * share) for a, b in pairs]
    again = [Kernel(one.kind, one.bytes * READ_TWICE[one.kind]) for one in others if one.kind in READ_TWICE]
    return [*others, *again, *(kernel for kernel in compiled if "convolution" in kernel.kind)]


@dataclass(frozen=True)
class Row:
    """A recipe: its steps, what passes through the frozen network, and the launches of a step by mode and teacher."""

    name: str
    model: str
    size: int
    streamed: bool
    steps: list[StepPlan]
    frozen: int
    teacher: list[Kernel]
    kernels: dict[str, dict[bool, list[Kernel]]]

    def visits(self, teacher: bool) -> int:
        """Return the images trained on with a teacher, or without."""
        return sum(plan.visits for plan in self.steps if bool(plan.step) == teacher)


def row_of(name: str) -> Row:
    """Return a recipe on the published data, with its launches counted."""
    recipe = load(name)
    known = table()[recipe.data.dataset]
    counts = np.full(known.classes, known.per_class)
    protocol = recipe.build_protocol(known.classes, known.class_names)
    steps = effective_steps(recipe, protocol, counts)
    size, model = known.shape[0], recipe.model.model
    parts = {part: kernels for part, (_, kernels) in generate(model, size, known.classes).items()}
    weights = sum(p.numel() for p in build_network(recipe.model, known.classes, 0).parameters())
    around = [Kernel("around", weights * BYTES_PER_WEIGHT / AROUND)] * AROUND
    student = [*parts["student, forward"], *parts["student, backward"], *around]
    compiled = {False: student, True: [*student, *parts["teacher"]]}
    uncompiled = {with_one: eager(model, size, with_one, compiled[with_one]) for with_one in (False, True)}
    tests = np.full(known.classes, known.val.images // known.classes)
    return Row(
        name, model, size, recipe.data.dataset == "imagenet", steps, frozen_visits(steps, tests), parts["teacher"],
        {"captured": compiled, "compiled": compiled, "eager": uncompiled},
    )  # fmt: skip


def step_seconds(row: Row, mode: str, teacher: bool, rates: Rates) -> tuple[float, str]:
    """Return the seconds of a step and what bounds it."""
    kernels = row.kernels[mode][teacher]
    on_gpu = bounds(kernels, rates)
    each = {"captured": 0.0, "compiled": rates.compiled, "eager": rates.eager}[mode]
    host = (rates.loop + each * len(kernels)) * 1e-6
    return (host, "the host") if host > on_gpu.total else (on_gpu.total, on_gpu.name)


def frozen_seconds(row: Row, rates: Rates) -> float:
    """Return the seconds of herding's and evaluation's forwards: the teacher's launches, in float32."""
    each = (
        max(
            rates.shortest * 1e-6,
            2 * kernel.bytes / (MEMORY * rates.memory),
            math_seconds(kernel, FLOAT32, rates),
        )
        + rates.gap * 1e-6
        for kernel in row.teacher
    )
    return row.frozen / BATCH * sum(each)


def row_seconds(row: Row, mode: str, rates: Rates, decoded: float) -> float:
    """Return the seconds of a whole row. decoded: images per second of the cores, for streamed ones."""
    seconds = frozen_seconds(row, rates)
    for teacher in (False, True):
        rate = BATCH / step_seconds(row, mode, teacher, rates)[0]
        seconds += row.visits(teacher) / (min(rate, decoded) if row.streamed else rate)
    return seconds


def decoding_rate() -> float:
    """Return the images per second of one core that decodes and crops, as `bench.loaders` has measured it here."""
    found = json.loads((RESULTS / "loaders.json").read_text())
    return float(found["images_per_second"]["threads"]["median"]) / int(found["workers"])


def both(values: Iterable[float], form: str = ",.0f") -> str:
    """Return FAST to SLOW as text."""
    return " to ".join(format(value, form) for value in values)


STEP = ("", "step", "teacher", "launches", "GB", "TFLOP", "ms", *(f"% {part}" for part in PARTS), "% idle", "bound by")
WHOLE = ("", "step", "images/s without", "with a teacher", "a row", "cores to keep up", "a row with {} cores")


def of_step(row: Row, mode: str, teacher: bool) -> tuple[str, ...]:
    """Return the cells of STEP."""
    kernels = row.kernels[mode][teacher]
    on_gpu = {rates: bounds(kernels, rates) for rates in (FAST, SLOW)}
    took = {rates: step_seconds(row, mode, teacher, rates) for rates in on_gpu}
    gaps = {rates: len(kernels) * rates.gap * 1e-6 for rates in on_gpu}
    bound = list(dict.fromkeys(name for _, name in took.values()))
    return (
        row.model, mode, "with" if teacher else "without", str(len(kernels)),
        f"{sum(kernel.bytes for kernel in kernels) / 1e9:.2f}",
        f"{sum(kernel.operations for kernel in kernels) / 1e12:.3f}",
        both((1e3 * seconds for seconds, _ in took.values()), ".2f"),
        *(both(100 * getattr(part_of, part) / part_of.total for part_of in on_gpu.values()) for part in PARTS),
        both(100 * (1 - (on_gpu[rates].total - gaps[rates]) / took[rates][0]) for rates in on_gpu),
        " to ".join(bound),
    )  # fmt: skip


def of_row(row: Row, mode: str, cores: int, per_core: float) -> tuple[str, ...]:
    """Return the cells of WHOLE."""
    rates = {
        teacher: [BATCH / step_seconds(row, mode, teacher, r)[0] for r in (FAST, SLOW)] for teacher in (False, True)
    }

    def whole(decoded: float) -> str:
        return " to ".join(duration(row_seconds(row, mode, r, decoded)) for r in (FAST, SLOW))

    streamed = (both(rate / per_core for rate in rates[False]), whole(cores * per_core)) if row.streamed else ("", "")
    return row.name, mode, both(rates[False]), both(rates[True]), whole(float("inf")), *streamed


def main(cores: Annotated[int, typer.Option(help="That decode for the GPU.")] = 16) -> None:
    per_core, rows = decoding_rate(), [row_of(name) for name in ROWS]
    say("ESTIMATES, from counts and published rates; nothing ran on a GPU. FAST to SLOW.")
    modes = [(row, mode) for row in rows for mode in row.kernels]
    say(format_table(STEP, [of_step(row, mode, teacher) for row, mode in modes for teacher in (False, True)]))
    header = tuple(cell.format(cores) for cell in WHOLE)
    say(format_table(header, [of_row(row, mode, cores, per_core) for row, mode in modes]))
    for row in rows:
        say(
            f"{row.name}: {row.visits(False):,} visits without a teacher, {row.visits(True):,} with one; "
            f"{row.frozen:,} images through the frozen network in "
            f"{both(frozen_seconds(row, rates) for rates in (FAST, SLOW))} s"
        )
    say(f"one core decodes and crops {per_core:,.0f} images/s (bench/results/loaders.json)")


if __name__ == "__main__":
    typer.run(main)
