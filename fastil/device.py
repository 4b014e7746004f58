"""The device a run computes on."""

import ctypes

import torch

from fastil.errors import UserError


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name}: unknown; use auto, cpu, cuda or cuda:N")
    visible = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= visible:
        raise UserError(f"device={name}: {visible} such devices are visible; use device={'cuda' if visible else 'cpu'}")
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def keep_freed_memory() -> bool:
    """Have the C library hold on to what is freed, for a training step on a CPU asks for the same again; given back to
    the system it is mapped and cleared anew, page by page (python -m bench.cpu). For the whole process; False where
    the library is not glibc."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    # Old versions take 32 MiB at most. Setting the other first would stop glibc from raising this one by itself.
    if not (set_option(mmap_threshold, 2**30) or set_option(mmap_threshold, 2**25)):
        return False
    return bool(set_option(trim_threshold, 2**31 - 1))
