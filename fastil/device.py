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
    """Have the C library hold on to what is freed, for a training step asks for the same again: given back to the
    system and fetched anew, page by page, it was 5 to 8 % of a CPU step of ResNet-32 and ResNet-18. For the whole
    process; False where the library is not glibc."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return bool(set_option(trim_threshold, 2**31 - 1) and set_option(mmap_threshold, 2**30))
