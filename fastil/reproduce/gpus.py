"""The GPUs that runs are spread over, and whether several share one."""

import os
import re

import torch

from fastil.recipe import Recipe
from fastil.training.compiling import cost_per_image

# What torchrun tells the processes that it starts. A run that inherited it would take itself for one of several.
OF_TORCHRUN = re.compile(
    "(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|"
    "TORCH_NCCL_ASYNC_ERROR_HANDLING"
)
TOGETHER = 2  # launch-bound runs on one GPU
# Estimates; no GPU has been timed. A training step of ResNet-32, which has 101 weight tensors, launches 359 kernels
# without a teacher (python -m bench.step_kernels). A launch takes the host about 5 us, and a GPU of a data centre does
# some 200 TFLOP/s in bf16 where the shapes suit it.
LAUNCHES_PER_WEIGHT, SECONDS_PER_LAUNCH, FLOPS_PER_SECOND = 4, 5e-6, 2e14
FAR_BELOW = 1 / 4


def choice(device: torch.device) -> list[str]:
    """The GPUs that a run on this device may be started on, each as CUDA_VISIBLE_DEVICES names it, in CUDA's order:
    all visible ones for cuda, one for cuda:N, none for a CPU."""
    if device.type != "cuda":
        return []
    asked, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    # Names behind one that does not exist are ignored by CUDA too.
    names = [str(number) for number in range(count)] if asked is None else asked.split(",")[:count]
    names = [name.strip() for name in names]
    return names if device.index is None else [names[device.index]]


def title(gpu: str) -> str:
    """A GPU as text: "GPU 2", or its UUID."""
    return f"GPU {gpu}" if gpu.isdigit() else gpu


def launch_bound(recipe: Recipe, size: tuple[int, int]) -> bool:
    """Whether a GPU mostly waits for the host in training, so that a second run can use it meanwhile.

    It does where the operations of a training step, divided by its launches, are far fewer than the GPU does in the
    time of a launch (10^9): 1.3 10^8 for ResNet-32 at 32x32, 5.6 10^9 for ResNet-18 at 224x224, both with batches of
    128. Two processes take turns on a GPU, so a step that is replayed from a CUDA graph, and waits less, gains less.
    size: height and width of the images.
    """
    network = recipe.build_network(100, 0)
    forward, _ = cost_per_image(network, *size)
    launches = LAUNCHES_PER_WEIGHT * len(list(network.parameters()))
    per_launch = 3 * forward * recipe.train.batch_size / launches
    return per_launch < FAR_BELOW * FLOPS_PER_SECOND * SECONDS_PER_LAUNCH


def environment() -> dict[str, str]:
    """The variables of this process without those of torchrun."""
    return {name: value for name, value in os.environ.items() if not OF_TORCHRUN.fullmatch(name)}
