"""How many kernels the networks of a training step launch on an H100, counted in the code that torch.compile generates.

python -m bench.step_kernels [--model resnet32] [--size 32] [--code FOLDER]

Counted are the student's forward and backward and the teacher's forward, in bfloat16. A convolution is one launch, its
backward two (of the weights and of the images; the first layer's, which sees no gradient of the images, one). What
stands around the networks is a handful more: augment, the loss, the labels, the weights' cast, the fused SGD. Nothing
is timed; there is no GPU.

Bytes: what each launch reads and writes, every tensor once, as Inductor's scheduler states it; caches may serve any of
it.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.code_for_h100 import for_h100
from fastil.device import autocast
from fastil.models import CastWeights, Folded, ModelConfig, build_network
from fastil.text import format_table, say

CLASSES, BATCH = 100, 128
PARTS = ("student, forward", "student, backward", "teacher")
LAUNCH = re.compile(r"(\w+)\.run\(.*stream=|extern_kernels\.(\w+)\(|torch\.ops\.(\w+\.\w+\.\w+)\(.*")


@dataclass(frozen=True)
class Kernel:
    """One launch. bytes: read and written. operations: floating-point, of convolutions only; all else has next to none.
    channels: that a convolution makes."""

    kind: str
    bytes: float
    operations: float = 0.0
    channels: int = 0


def launches(code: str) -> Counter[str]:
    """Count the launches in a generated module, by kind."""
    found: Counter[str] = Counter()
    for match in LAUNCH.finditer(code):
        triton, extern, operator = match.groups()
        if triton:
            found["Triton"] += 1
        elif operator and operator.startswith("aten.convolution_backward"):
            mask = re.search(r"\[(True|False), (True|False), (True|False)\]", match.group(0))
            found["convolution_backward"] += 2 if mask is None or mask.group(1) == "True" else 1
        else:
            found[extern or operator] += 1
    return found


def kernels_of(graph: Any) -> list[Kernel]:
    """Return the launches of a lowered graph, in order."""
    from torch._inductor.ir import MultiOutput

    def size(tensor: Any) -> int:
        return int(math.prod(tensor.get_size())) * int(tensor.get_dtype().itemsize)

    found: list[Kernel] = []
    for node in graph.scheduler.nodes:
        inner = node.node  # None of what was fused, which is Triton
        name = getattr(inner, "python_kernel_name", None)
        moved = float(node.get_read_write_buffers_sizes())
        if isinstance(inner, MultiOutput):  # no launch: an output of the one before
            continue
        if name is None:
            found.append(Kernel("Triton", moved))
        elif "convolution_backward" in name:
            gradient, images, weight = inner.inputs
            made, seen = (int(count) for count in weight.get_size()[:2])
            moved = size(gradient) + size(images) + size(weight)
            work = float(2 * math.prod(gradient.get_size()) * math.prod(weight.get_size()[1:]))
            found.append(Kernel("convolution_backward", moved, work, made))
            if sum(isinstance(one, MultiOutput) for one in inner.outputs) > 1:
                found.append(Kernel("convolution_backward", moved, work, seen))
        elif "convolution" in name:
            made, *others = inner.inputs[1].get_size()
            work = float(2 * math.prod(inner.get_size()) * math.prod(others))
            found.append(Kernel("convolution", moved, work, int(made)))
        else:
            found.append(Kernel(name.removeprefix("extern_kernels."), moved))
    return found


def generate(model: str, size: int, classes: int = CLASSES) -> dict[str, tuple[str, list[Kernel]]]:
    """Return the code of each of PARTS and its launches, for a batch of images of this height and width."""
    torch.manual_seed(0)
    student, teacher = (build_network(ModelConfig(model), classes, seed) for seed in (0, 1))
    images = torch.rand(BATCH, 3, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    frozen = Folded(teacher, torch.bfloat16, BATCH).plain
    found: list[tuple[str, list[Kernel]]] = []

    def read_code(graph: Any) -> None:
        found.append((graph.codegen()[0].value, kernels_of(graph)))

    with for_h100(read_code) as backend:
        with autocast("bf16", torch.device("cpu")):
            cast = CastWeights(student.train())
            out = torch.compile(cast, backend=backend, dynamic=False)(cast.cast(), images)
        out.scaled_logits.sum().backward()
        with torch.no_grad():
            torch.compile(frozen, backend=backend, dynamic=False)(images)
    for code, kernels in found:
        if launches(code) != Counter(kernel.kind for kernel in kernels):
            raise ValueError(f"the code has {launches(code)}, the scheduler {Counter(k.kind for k in kernels)}")
    return dict(zip(PARTS, found, strict=True))


def main(
    model: str = "resnet32",
    size: int = 32,
    code: Annotated[Path | None, typer.Option(help="Folder for the generated code.")] = None,
) -> None:
    parts = generate(model, size)
    if code is not None:
        code.mkdir(parents=True, exist_ok=True)
        for name, (text, _) in parts.items():
            (code / f"{name.replace(', ', '_')}.py").write_text(text)
    found = {name: kernels for name, (_, kernels) in parts.items()}
    counts = {name: Counter(kernel.kind for kernel in kernels) for name, kernels in found.items()}
    kinds = sorted({kind for count in counts.values() for kind in count})
    moved = {name: f"{sum(kernel.bytes for kernel in kernels) / 1e6:,.0f}" for name, kernels in found.items()}
    rows = [
        (name, *(str(count[kind]) for kind in kinds), str(count.total()), moved[name]) for name, count in counts.items()
    ]
    say(format_table(("", *kinds, "launches", "MB"), rows))
    without = sum(count.total() for name, count in counts.items() if name != "teacher")
    say(f"a step: {without + counts['teacher'].total()} with a teacher, {without} without")


if __name__ == "__main__":
    typer.run(main)
