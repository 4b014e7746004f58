"""`fastil doctor`: what is installed, what is missing, and the command that installs it."""

import importlib.metadata
import platform
import shutil

from fastil.compiling import has_cxx_compiler
from fastil.data.sources import FASHION_MNIST

REQUIRED = (
    "torch", "numpy", "pillow", "simplejpeg", "isal", "pydantic", "PyYAML", "typer", "tqdm", "scikit-learn",
    "matplotlib",
)  # fmt: skip
OPTIONAL = {
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
    fashion = str(FASHION_MNIST) if FASHION_MNIST.is_dir() else "missing; apt-get install dataset-fashion-mnist"
    lines.append(f"{'Fashion-MNIST':<22}{fashion}")
    return "\n".join(lines)


def _line(name: str, use: str, fix: str) -> str:
    try:
        return f"{name:<22}{importlib.metadata.version(name)}  ({use})"
    except importlib.metadata.PackageNotFoundError:
        return f"{name:<22}missing  ({use}); {fix}"
