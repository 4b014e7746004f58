"""`fastil doctor`: what is installed, what is missing, the command that installs it, and what would be faster."""

import importlib.metadata
import io
import platform
import subprocess

import numpy as np
from PIL import Image

from fastil.data.sources import FASHION_MNIST
from fastil.training.compiling import REPAID_BY, cost_per_image, decide, has_cxx_compiler

TIMED = 12  # decodes

REQUIRED = (
    "torch", "numpy", "pillow", "simplejpeg", "isal", "pydantic", "PyYAML", "typer", "tqdm", "scikit-learn",
    "matplotlib",
)  # fmt: skip
OPTIONAL = {
    "pyarrow": ("parquet files", "pip install pyarrow"),
    "pillow-heif": ("HEIC photos", "pip install pillow-heif"),
    "onnx": ("fastil export-model FILE.onnx", "pip install onnx onnxscript onnxruntime"),
    "safetensors": ("fastil export-model FILE.safetensors", "pip install safetensors"),
    "tensorboard": ("track=tensorboard", "pip install tensorboard"),
    "wandb": ("track=wandb", "pip install wandb"),
    "triton": ("fused kernels on NVIDIA GPUs", "pip install triton"),
    "ffcv": (
        "loader=ffcv, FFCV's pixels; on two cores as fast as loader=threads",
        "apt-get install --no-install-recommends libturbojpeg0-dev libopencv-dev pkg-config && "
        "pip install --no-build-isolation ffcv==1.0.2",
    ),
    "nvidia-dali-cuda130": (
        "loader=dali, which decodes on the GPU where there is one",
        "pip install nvidia-dali-cuda130",
    ),
}


def diagnose() -> str:
    """Return one line per part: what it is, its version or "missing", and the fix."""
    import torch

    lines = [f"python {platform.python_version()}, {platform.platform()}"]
    lines += [_line(name, "needed", f"pip install {name}") for name in REQUIRED]
    lines += [_line(name, f"optional: {use}", fix) for name, (use, fix) in OPTIONAL.items()]
    compiler = "found" if has_cxx_compiler() else "missing; apt-get install g++ (training runs uncompiled without it)"
    lines.append(f"{'C++ compiler':<22}{compiler}")
    lines += [f"{'GPU':<22}{line}" for line in _gpu()]
    lines += [f"{'precision':<22}{line}" for line in _precision()]
    lines += [f"{'training step':<22}{line}" for line in _step()]
    fashion = str(FASHION_MNIST) if FASHION_MNIST.is_dir() else "missing; apt-get install dataset-fashion-mnist"
    lines.append(f"{'Fashion-MNIST':<22}{fashion}")
    lines += [f"{'streaming':<22}{line}" for line in _streaming(torch.cuda.is_available())]
    return "\n".join(lines)


def _line(name: str, use: str, fix: str) -> str:
    try:
        return f"{name:<22}{importlib.metadata.version(name)}  ({use})"
    except importlib.metadata.PackageNotFoundError:
        return f"{name:<22}missing  ({use}); {fix}"


def _gpu() -> list[str]:
    """Return lines on the GPUs, their driver, and what the kernels need."""
    import torch

    from fastil.machine import lacks_for_triton

    if not torch.version.cuda:
        return ["this torch is a CPU build; training runs on the CPU"]
    driver = _driver()
    if not torch.cuda.is_available():
        known = f"; its driver is {driver}, this torch wants one for CUDA {torch.version.cuda}"
        return ["none visible" + (known if driver else "; install the NVIDIA driver")]
    lines = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        lines.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}")
    lines.append(
        f"driver {driver or 'of unknown version (no nvidia-smi)'}; torch is built for CUDA {torch.version.cuda}"
    )
    lacking = lacks_for_triton()
    lines.append(f"kernels: Triton lacks {lacking}" if lacking else "kernels: Triton has the C compiler that it needs")
    return lines


def _driver() -> str | None:
    """Return the version of the NVIDIA driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.split()
    return lines[0] if found.returncode == 0 and lines else None


def _step() -> list[str]:
    """Say whether compile=auto compiles here and whether a step is captured, and why."""
    from fastil.device import pick_device
    from fastil.models import ModelConfig, build_network
    from fastil.training.captured import has_streams

    device = pick_device("auto")
    flops, _ = cost_per_image(build_network(ModelConfig("resnet32"), 100, 0), 32, 32)
    visits = REPAID_BY[device.type] / (3 * flops)
    _, why_not = decide("auto", device, float("inf"))
    compiled = f"compiles a run of more than about {visits / 1e6:.1f} million visits of ResNet-32 at 32x32"
    lines = [why_not or f"compile=auto {compiled} (or as much work): a shorter one ends before that is repaid"]
    if has_streams(device):
        lines.append("captured in a CUDA graph: a batch is one launch (steps with code from outside run uncaptured)")
    return lines


def _precision() -> list[str]:
    """Say what precision=auto means here, and why."""
    import torch

    from fastil.device import fastest_precision, pick_device, precision_note, processor_name

    device = pick_device("auto")
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    lines = [f"{place}: precision=auto is {fastest_precision(device)}"]
    slow = precision_note("bf16", device)
    if slow is not None:
        lines.append(slow)
    if torch.cuda.is_available():
        lines.append("precision=fp32 is IEEE float32 on the GPU; precision=tf32 is faster and rounds to 10 bits")
    return lines


def _streaming(gpu: bool) -> list[str]:
    """Say how fast these cores read images from a .beton, and what would be faster."""
    import torch

    from fastil import machine
    from fastil.data.loaders.choose import by_rates, read_rate
    from fastil.device import pick_device
    from fastil.recipe_file import load
    from fastil.training.speed import plain_rate

    frame = (224, 224)
    large, small = (read_rate([photo(*size)] * TIMED, frame) for size in ((375, 500), (256, 256)))
    lines = [
        f"about {large:,.0f} JPEGs of 500x375 per second by loader=threads on {machine.cores()} cores (timed)",
        f"faster: about {small:,.0f} of 256x256 (fastil convert --squash 256, which changes their shapes)",
    ]
    if gpu:
        try:
            trained = plain_rate(load("imagenet_balanced_5"), frame, pick_device("auto"))
        except torch.OutOfMemoryError:
            lines.append("loader=auto: cannot be told, the GPU has no room for a training step now; stop what fills it")
        else:
            backend, why = by_rates(large, trained)
            lines.append(f"loader=auto takes {backend} for a ResNet-18 on them ({why})")
    else:
        lines.append("loader=auto takes threads; nothing that could be installed is faster on a CPU")
    lines.append("images in memory stay on the device (resident)")
    return lines


def photo(height: int, width: int, seed: int = 0) -> bytes:
    """Return a JPEG of noise with as many bytes per pixel as ImageNet's."""
    noise = np.random.default_rng(seed).normal(128, 40, (height // 4, width // 4, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()
