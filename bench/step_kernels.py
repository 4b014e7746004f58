"""How many kernels the networks of a training step launch on an H100, counted in the code that torch.compile generates.

python -m bench.step_kernels [--model resnet32] [--size 32] [--code FOLDER]

Counted are the student's forward and backward and the teacher's forward, in bfloat16. A convolution is one launch, its
backward two (of the weights and of the images; the first layer's, which sees no gradient of the images, one). What
stands around the networks is a handful more: augment, the loss, the labels, the weights' cast, the fused SGD. Nothing
is timed; there is no GPU.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.code_for_h100 import for_h100
from fastil.device import autocast
from fastil.models import CastWeights, Folded, ModelConfig, build_network
from fastil.text import format_table, say

CLASSES, BATCH = 100, 128
LAUNCH = re.compile(r"(\w+)\.run\(.*stream=|extern_kernels\.(\w+)\(|torch\.ops\.(\w+\.\w+\.\w+)\(.*")


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


def count(model: str = "resnet32", size: int = 32, code: Path | None = None) -> dict[str, Counter[str]]:
    """Launches of the student's forward and backward and of the teacher, by kind."""
    torch.manual_seed(0)
    student, teacher = (build_network(ModelConfig(model), CLASSES, seed) for seed in (0, 1))
    images = torch.rand(BATCH, 3, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    frozen = Folded(teacher, torch.bfloat16, BATCH).plain
    texts: list[str] = []

    def read_code(graph: Any) -> None:
        texts.append(graph.codegen()[0].value)

    with for_h100(read_code) as backend:
        with autocast("bf16", torch.device("cpu")):
            cast = CastWeights(student.train())
            out = torch.compile(cast, backend=backend, dynamic=False)(cast.cast(), images)
        out.scaled_logits.sum().backward()
        with torch.no_grad():
            torch.compile(frozen, backend=backend, dynamic=False)(images)
    parts = dict(zip(("student, forward", "student, backward", "teacher"), texts, strict=True))
    for name, text in parts.items():
        if code is not None:
            code.mkdir(parents=True, exist_ok=True)
            (code / f"{name.replace(', ', '_')}.py").write_text(text)
    return {name: launches(text) for name, text in parts.items()}


def main(
    model: str = "resnet32",
    size: int = 32,
    code: Annotated[Path | None, typer.Option(help="Folder for the generated code.")] = None,
) -> None:
    parts = count(model, size, code)
    kinds = sorted({kind for found in parts.values() for kind in found})
    rows = [(name, *(str(found[kind]) for kind in kinds), str(found.total())) for name, found in parts.items()]
    say(format_table(("", *kinds, "launches"), rows))
    without = sum(found.total() for name, found in parts.items() if name != "teacher")
    say(f"a step: {without + parts['teacher'].total()} with a teacher, {without} without")


if __name__ == "__main__":
    typer.run(main)
