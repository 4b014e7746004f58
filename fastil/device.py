"""The device a run computes on."""

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
