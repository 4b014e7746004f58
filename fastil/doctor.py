"""`fastil doctor`: what is installed, what is missing, the command that installs it, and what would be faster."""

import importlib.metadata
import io
import platform
import shutil
import time

import numpy as np
from PIL import Image

from fastil.data.sources import FASHION_MNIST
from fastil.training.compiling import has_cxx_compiler

TIMED = 12  # decodes

REQUIRED = (
    "torch", "numpy", "pillow", "simplejpeg", "isal", "pydantic", "PyYAML", "typer", "tqdm", "scikit-learn",
    "matplotlib",
)  # fmt: skip
OPTIONAL = {
    "pyarrow": ("parquet files", "pip install pyarrow"),
    "pillow-heif": ("HEIC photos", "pip install pillow-heif"),
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
    """One line per part: what it is, its version or "missing", and the fix."""
    import torch

    lines = [f"python {platform.python_version()}, {platform.platform()}"]
    lines += [_line(name, "needed", f"pip install {name}") for name in REQUIRED]
    lines += [_line(name, f"optional: {use}", fix) for name, (use, fix) in OPTIONAL.items()]
    compiler = "found" if has_cxx_compiler() else "missing; apt-get install g++ (training runs uncompiled without it)"
    lines.append(f"{'C++ compiler':<22}{compiler}")
    if torch.cuda.is_available():
        gpu = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    elif torch.version.cuda:
        gpu = "none visible" + ("" if shutil.which("nvidia-smi") else "; install the NVIDIA driver")
    else:
        gpu = "this torch is a CPU build; training runs on the CPU"
    lines.append(f"{'GPU':<22}{gpu}")
    lines += [f"{'precision':<22}{line}" for line in _precision()]
    fashion = str(FASHION_MNIST) if FASHION_MNIST.is_dir() else "missing; apt-get install dataset-fashion-mnist"
    lines.append(f"{'Fashion-MNIST':<22}{fashion}")
    lines += [f"{'streaming':<22}{line}" for line in _streaming(torch.cuda.is_available())]
    return "\n".join(lines)


def _line(name: str, use: str, fix: str) -> str:
    try:
        return f"{name:<22}{importlib.metadata.version(name)}  ({use})"
    except importlib.metadata.PackageNotFoundError:
        return f"{name:<22}missing  ({use}); {fix}"


def _precision() -> list[str]:
    """What precision=auto takes here, and why."""
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
    """How fast these cores read images from a .beton, and what would be faster."""
    from fastil import machine
    from fastil.data.loaders.choose import GPU_RATE, cpu_rate, installed

    large, small = (float(f"{_images_per_second(*size):.2g}") for size in ((375, 500), (256, 256)))
    lines = [
        f"about {large:,.0f} JPEGs of 500x375 per second by loader=threads on {machine.cores()} cores (timed)",
        f"faster: about {small:,.0f} of 256x256 (fastil convert --squash 256, which changes their shapes)",
    ]
    if not gpu:
        lines.append("nothing that could be installed is faster on a CPU")
    elif cpu_rate(500 * 375) >= GPU_RATE:  # as loader=auto decides
        lines.append(f"a GPU trains a ResNet-18 on about {GPU_RATE:,} images per second: these cores keep up")
    elif installed("nvidia.dali"):
        lines.append("loader=auto takes DALI, so the GPU decodes")
    else:
        lines.append("faster: pip install nvidia-dali-cuda130, and the GPU decodes (loader=auto takes it then)")
    return lines


def _images_per_second(height: int, width: int) -> float:
    """How many JPEGs with as many bytes per pixel as ImageNet's all cores decode and resize to 224x224."""
    import simplejpeg
    import torch

    from fastil import machine
    from fastil.data.loaders.frames import scaled

    noise = np.random.default_rng(0).normal(128, 40, (height // 4, width // 4, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    torch.set_num_threads(1)
    took = []
    for _ in range(TIMED):
        began = time.perf_counter()
        scaled(torch.from_numpy(simplejpeg.decode_jpeg(file.getvalue())), (224, 224))
        took.append(time.perf_counter() - began)
    return machine.cores() / float(np.median(took))
