"""Whether and how the networks are compiled.

Measured on two CPU cores: the first compilation of ResNet-32 costs about 30 s, 4 s from the cache on disk; a module
that is overwritten in place is never compiled again; a batch of another size would be, so ragged ones run uncompiled.
"""

import os
import shutil
import time
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastil.models import CastWeights, Network, Output

# A run below this many floating-point operations ends before a compiled step has repaid its compilation. CPU: about
# 400 s of eager training on two cores at 90 GFLOP/s, of which compilation saves a tenth; GPU, an estimate: 3 million
# visits of ResNet-32, of which each costs 18 us less than its 28.
REPAID_BY = {"cpu": 4e13, "cuda": 1.5e15}


def has_cxx_compiler() -> bool:
    """Whether the compiler that torch.compile needs on the CPU is there."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def cost_per_image(network: Network, height: int, width: int) -> tuple[int, int]:
    """Floating-point operations of one forward, of which a training step takes three times as many, and numbers that
    its convolutions hand on, which training keeps for the backward pass."""
    handed_on = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal handed_on
        handed_on += output.numel()

    hooks = [part.register_forward_hook(count) for part in network.modules() if isinstance(part, nn.Conv2d)]
    device = next(network.parameters()).device
    training = network.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, height, width, device=device))
    for hook in hooks:
        hook.remove()
    network.train(training)
    return int(counter.get_total_flops()), handed_on


def decide(wanted: Literal["auto", True, False], device: torch.device, run_flops: float) -> tuple[bool, str | None]:
    """Whether to compile, and a line for the user if a wish cannot be met. run_flops: of the whole run."""
    if wanted is False:
        return False, None
    if wanted == "auto" and run_flops < REPAID_BY.get(device.type, float("inf")):
        return False, None
    if device.type == "cpu" and not has_cxx_compiler():
        return False, "no C++ compiler found: training runs uncompiled (apt-get install g++ makes it faster)"
    return True, None


def compile_run(
    wanted: Literal["auto", True, False],
    device: torch.device,
    compile_training: Callable[[], str | None],
    training_flops: float,
    compile_evaluation: Callable[[], str | None],
    evaluation_flops: float,
    say: Callable[[str], None],
) -> None:
    """Compile training, and evaluation too where that is repaid. Each function returns why it failed, in one line, or
    None; flops: of the whole run. say: shows the user a line."""
    compiled, note = decide(wanted, device, training_flops)
    if note is not None:
        say(note)
    if not compiled:
        return
    say("compiling the network, which takes from some seconds to minutes")
    began = time.perf_counter()
    why_not = compile_training()
    if why_not is None and evaluation_flops >= REPAID_BY[device.type]:
        slower = compile_evaluation()
        if slower is not None:
            say(slower)
    say(why_not or f"compiled in {time.perf_counter() - began:.0f} s")


def compile_network(
    network: Network, example: Tensor, *, train: bool, use: str = "training", cast_weights: bool = False
) -> tuple[Callable[[Tensor], Output], str | None]:
    """The compiled network, warmed up on the example without a trace in its weights or statistics, and None; or, when
    compilation fails, the network itself and why, in one line. use: what it is compiled for, in that line.
    cast_weights: to bfloat16, see `CastWeights`."""
    compiled: Callable[[Tensor], Output]
    if cast_weights:
        together = CastWeights(network)
        inner = torch.compile(together, dynamic=False)

        def compiled(images: Tensor) -> Output:
            return cast(Output, inner(together.cast(), images))
    else:
        compiled = cast(Callable[[Tensor], Output], torch.compile(network, dynamic=False))
    before = {name: value.clone() for name, value in network.named_buffers()}
    network.train(train)
    try:
        with torch.set_grad_enabled(train):
            out = compiled(example)
            if train:
                out.scaled_logits.sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # a missing header or a broken compiler surfaces as one of many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return network, f"torch.compile failed ({reason}): {use} runs uncompiled"
    finally:
        network.zero_grad()
        for name, value in network.named_buffers():
            value.copy_(before[name])
    return compiled, None
