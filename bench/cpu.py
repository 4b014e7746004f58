"""Speedups that only a CPU needs: augmentation in small groups, keeping freed memory, and bfloat16 where it has it.

python -m bench.cpu [--rounds N]

Claim: `fastil.kernels.augment` by slices takes at most 0.6 of the time of its formula at 32x32 and 0.3 from 64x64 on
(below 16x16 it is the formula), and a step in a process that keeps what it frees (`fastil.device.keep_freed_memory`) at
most 0.97 of one that does not. Where the processor multiplies in bfloat16 (AMX, AVX-512) a step by autocast takes at
most 0.6 of one in float32, and less than with oneDNN's switch that rounds float32 convolutions; elsewhere float32 is
faster.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import ratio, save, seconds, show, spread, take_turns
from fastil.device import Precision, autocast, keep_freed_memory, pixel_dtype, precision_note
from fastil.kernels.augment import by_slices, plain
from fastil.models import ModelConfig, build_network

CPU = torch.device("cpu")
SIZES = ((8, 128), (32, 128), (64, 128), (224, 64))  # side, batch
STEPS = {"resnet32": (32, 128), "resnet18": (224, 32)}  # side, batch
HOW = ("fp32", "bf16", "convolutions")
TIMED = 6


def augments() -> dict[str, Callable[[], float]]:
    """Return contestants by side of the image and form, each of which returns its milliseconds."""
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    contestants: dict[str, Callable[[], float]] = {}
    for side, batch in SIZES:
        images = torch.randint(0, 256, (500, side, side, 3), dtype=torch.uint8)
        boxes = torch.full((batch, 4), side)
        boxes[:, :2] = torch.randint(-side // 8, side // 8 + 1, (batch, 2))
        ids, flips = torch.randint(0, 500, (batch,)), torch.rand(batch) < 0.5
        for name, form in (("slices", by_slices), ("formula", plain)):
            work = partial(form, images, ids, boxes, flips, mean, std, torch.float32, side, side)
            contestants[f"augment {side}x{side}, {name}"] = lambda work=work: 1e3 * seconds(work, CPU)  # type: ignore[misc]
    return contestants


def steps(name: str, how: str) -> None:
    """Print the median seconds of a forward and backward pass: in "fp32", in "bf16" by autocast, or with float32
    tensors that oneDNN rounds in "convolutions"."""
    side, batch = STEPS[name]
    network = build_network(ModelConfig(name), 100, 0)
    precision: Precision = "bf16" if how == "bf16" else "fp32"
    images = torch.randn(batch, 3, side, side).to(pixel_dtype(precision), memory_format=torch.channels_last)
    if how == "convolutions":
        torch.backends.mkldnn.conv.fp32_precision = "bf16"  # type: ignore[attr-defined]

    def step() -> None:
        with autocast(precision, CPU):
            out = network(images)
        out.scaled_logits.sum().backward()
        network.zero_grad()

    step()
    emulated = precision_note(precision, CPU) is not None
    print(spread([seconds(step, CPU) for _ in range(1 if emulated else TIMED)])["median"])


def in_a_process(name: str, keep: bool, how: str = "fp32") -> float:
    """Return the median seconds of `steps` in a process of its own. keep: whether that keeps the memory it frees."""
    kept = "from fastil.device import keep_freed_memory as keep; keep(); " if keep else ""
    code = f"{kept}from bench.cpu import steps; steps({name!r}, {how!r})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run the bench and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    if not keep_freed_memory():
        print("this C library is not glibc: nothing is kept", file=sys.stderr)
    torch.set_num_threads(1)
    for work in augments().values():
        work()
    print("augment: milliseconds of a batch; steps: seconds")
    figures = take_turns(augments(), rounds)
    figures |= take_turns(
        {
            f"step {name}, memory {'kept' if keep else 'given back'}": partial(in_a_process, name, keep)
            for name in STEPS
            for keep in (True, False)
        },
        rounds,
    )
    # ResNet-18 at 224 in an emulated bfloat16 takes minutes and says the same.
    natively = precision_note("bf16", CPU) is None
    precisions = [(name, how) for name in STEPS for how in HOW if natively or name == "resnet32"]
    figures |= take_turns(
        {f"step {name}, {how}": partial(in_a_process, name, True, how) for name, how in precisions}, rounds
    )
    ratios = {
        f"augment {side}x{side}": ratio(figures, f"augment {side}x{side}, slices", f"augment {side}x{side}, formula")
        for side, _ in SIZES
    }
    for name in STEPS:
        ratios[f"step {name}"] = ratio(figures, f"step {name}, memory kept", f"step {name}, memory given back")
    for name, how in precisions:
        if how != "fp32":
            ratios[f"step {name}, {how} over fp32"] = ratio(figures, f"step {name}, {how}", f"step {name}, fp32")
    for label, values in figures.items():
        show(label, spread(values))
    for label, found in ratios.items():
        show(label, found)
    content = {
        "rounds": rounds,
        "figures": {name: spread(values) for name, values in figures.items()},
        "ratios": ratios,
    }
    print(f"written to {save('cpu', CPU, content)}")


if __name__ == "__main__":
    main()
