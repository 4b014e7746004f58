"""The estimate for a GPU: what it counts against torch's own counter and sizes by hand, and what it makes of counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.estimate_h100 import MEMORY, TENSOR_CORES, Kernel, Rates, bounds, operators

ROOT = Path(__file__).parents[2]
RATES = Rates(gap=1.0, shortest=2.0, memory=0.5, math=0.25, tile=32, compiled=5.0, eager=7.0, loop=100.0)
COUNTED = """
import json
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from bench import step_kernels
from fastil.models import ModelConfig, build_network

step_kernels.BATCH = 6
network = build_network(ModelConfig("resnet8"), 10, 0)
moved = []
for part in network.modules():
    if isinstance(part, nn.Conv2d):
        part.register_forward_hook(lambda part, inputs, output: moved.append(
            2 * (inputs[0].numel() + part.weight.numel() + output.numel())
        ))
with FlopCounterMode(display=False) as counter:
    network(torch.rand(6, 3, 20, 20)).logits.sum().backward()
known = {str(op).removeprefix("aten."): count for op, count in counter.get_flop_counts()["Global"].items()}
parts = {name: [vars(kernel) for kernel in kernels] for name, (_, kernels) in
    step_kernels.generate("resnet8", 20, 10).items()}
print(json.dumps([known, moved, parts]))
"""


def test_each_launch_takes_its_gap_and_the_longest_of_its_three_times():
    ten_us_of_bytes, ten_us_of_math = 10e-6 * MEMORY * 0.5, 10e-6 * TENSOR_CORES * 0.25
    found = bounds(
        [
            Kernel("a", 0.0),
            Kernel("b", ten_us_of_bytes),
            Kernel("c", ten_us_of_bytes, 3 * ten_us_of_math, 64),
            Kernel("d", ten_us_of_bytes / 10, ten_us_of_math / 10, 32),
            Kernel("e", ten_us_of_bytes, ten_us_of_math, 8),
        ],
        RATES,
    )
    assert found.launches == pytest.approx(5e-6 + 2e-6 + 2e-6)
    assert found.bytes == pytest.approx(10e-6)
    assert found.math == pytest.approx(30e-6 + 4 * 10e-6)
    assert found.total == pytest.approx(89e-6)
    assert found.name == "math"


@pytest.mark.parametrize("teacher", [False, True])
def test_an_eager_step_asks_for_each_convolution_and_normalisation(teacher):
    kernels = operators("resnet8", 8, 3, teacher)
    kinds = [kernel.kind for kernel in kernels]
    convolutions = 9
    assert kinds.count("convolution") == convolutions * (1 + teacher)
    assert kinds.count("convolution_backward") == kinds.count("native_batch_norm") == convolutions
    assert kinds.count("incremental_loss") == 1
    first = next(kernel for kernel in kernels if kernel.kind == "convolution")
    bias = 16 * teacher  # the teacher is first, and has its normalisation folded in
    assert first.bytes == 2 * (3 * 3 * 8 * 8 + 16 * 3 * 9 + bias + 3 * 16 * 8 * 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU is for machines without one")
def test_operations_and_bytes_of_convolutions_are_those_of_the_network():
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNTED], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    known, moved, parts = json.loads(done.stdout)

    def total(part, kind, key):
        return sum(kernel[key] for kernel in parts[part] if kernel["kind"] == kind)

    assert total("student, forward", "convolution", "operations") == known["convolution"]
    assert total("teacher", "convolution", "operations") == known["convolution"]
    assert total("student, backward", "convolution_backward", "operations") == known["convolution_backward"]
    assert total("student, forward", "convolution", "bytes") == sum(moved)
    assert total("teacher", "convolution", "bytes") == sum(moved)
    assert total("student, backward", "convolution_backward", "bytes") == 2 * sum(moved) - moved[0]
