"""The device a run computes on, and the precision it computes in."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from fastil import ranks
from fastil.errors import UserError
from fastil.settings import shown

# bf16: matrix products and convolutions of training in bfloat16, the weights in float32 (autocast). tf32: float32
# tensors, which CUDA multiplies with 10 bits of mantissa. fp32: IEEE float32 everywhere.
Precision = Literal["fp32", "tf32", "bf16"]
BF16_FLAGS = ("amx_bf16", "avx512_bf16")  # instruction sets that multiply in bfloat16


def pick_device(name: str) -> torch.device:
    """Return the device of this process. Raises UserError if there is none of this name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={shown(name)}: unknown; use auto, cpu, cuda or cuda:N")
    visible = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= visible:
        raise UserError(f"device={name}: {visible} such devices are visible; use device={'cuda' if visible else 'cpu'}")
    if device.type == "cuda":
        # cuBLAS needs this to add in the same order every time, and reads it once, before its first product. The size
        # is the default of recent GPUs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if ranks.launched():
            return _gpu_of_its_own(device)
    return device


def _gpu_of_its_own(device: torch.device) -> torch.device:
    """Return the GPU of one of several processes."""
    number, processes = ranks.on_this_machine()
    if processes > 1 and device.index is not None:
        raise UserError(
            f"device={device}: one GPU for {processes} processes; use device=cuda, which gives each its own, and "
            "CUDA_VISIBLE_DEVICES for a choice of them"
        )
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes on this machine see {gpus} GPU{'s' * (gpus > 1)}; start as many as there are "
            f"(--nproc-per-node {gpus}), or set device=cpu"
        )
    return torch.device("cuda", number) if device.index is None else device


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the whole process. Returns False if it is not glibc.

    A training step on a CPU frees memory and asks for it again. Memory that went back to the system has to be mapped
    and cleared again, page by page (python -m bench.cpu).
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    # Old versions accept 32 MiB at most. If the other were set first, glibc would no longer raise this one by itself.
    if not (set_option(mmap_threshold, 2**30) or set_option(mmap_threshold, 2**25)):
        return False
    return bool(set_option(trim_threshold, 2**31 - 1))


def cpu_capabilities() -> dict[str, Any]:
    """Return what torch knows of the processor: instruction sets as booleans ("amx_bf16"), and its "cpu_name"."""
    try:
        return dict(torch.cpu.get_capabilities())
    except AttributeError:  # an older torch, which knows only a few of them
        return {"amx_bf16": torch.cpu._is_amx_tile_supported()}


def processor_name() -> str:
    """Return the processor and its bfloat16 instructions, such as "AMD EPYC (no bfloat16)"."""
    found = cpu_capabilities()
    flags = [flag for flag in BF16_FLAGS if found.get(flag)]
    return f"{found.get('cpu_name') or platform.machine()} ({', '.join(flags) or 'no bfloat16'})"


def multiplies_in_bf16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 products, so that bf16 trains faster than float32 (bench.cpu)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = cpu_capabilities()
    return any(found.get(flag) for flag in BF16_FLAGS)


def fastest_precision(device: torch.device) -> Precision:
    """Return what `precision=auto` means: bf16 if the device multiplies in it, otherwise fp32.

    The device's capabilities decide, never a timing, so that the same machine always trains the same.
    """
    return "bf16" if multiplies_in_bf16(device) else "fp32"


def settle_precision(wanted: Literal["auto", "fp32", "tf32", "bf16"], device: torch.device) -> Precision:
    """Return the precision of a run that starts on this device. Raises UserError if the device does not have it."""
    if wanted == "auto":
        return fastest_precision(device)
    if wanted == "tf32" and device.type != "cuda":
        raise UserError("precision=tf32: only CUDA multiplies in TF32; use fp32, or bf16")
    return wanted


def precision_note(precision: Precision, device: torch.device) -> str | None:
    """Return a line for the user if this device, on which a run may be resumed, is slow in the precision or lacks
    it.
    """
    if precision == "tf32" and device.type != "cuda":
        return "precision=tf32: this device has none and computes in float32"
    if precision != "bf16" or multiplies_in_bf16(device):
        return None
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):  # measured: 10 to 11 times
        return (
            "precision=bf16: this processor only emulates it, so training will be about ten times slower than in fp32"
        )
    return "precision=bf16: this device is not known to multiply in it, so training may be slower than in fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context of training in this precision: on in bf16, otherwise without effect."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def pixel_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of training images: bfloat16 in bf16, because a float32 image would only be cast again."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


@contextlib.contextmanager
def choosing_kernels(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Set how CUDA chooses among kernels that compute the same: the fastest, found by trying each shape once, or only
    those that always add in the same order. Does nothing on a CPU, which always does so.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode = torch.get_deterministic_debug_mode()

    def set_to(benchmark: bool, fixed: bool, fill: bool, debug_mode: int) -> None:
        cudnn.benchmark, cudnn.deterministic = benchmark, fixed
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_deterministic_debug_mode(debug_mode)

    try:
        # Warn (1), do not raise: code from outside may call operators that have no such form.
        set_to(not deterministic, deterministic, False, 1 if deterministic else mode)
        yield
    finally:
        set_to(*before, mode)


@contextlib.contextmanager
def multiplying_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Set how CUDA multiplies float32 tensors: in TF32 if that is the precision, otherwise as IEEE says.

    By default torch uses TF32 for convolutions. Does nothing on a CPU.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    places = cudnn.conv, cudnn.rnn, products

    def set_to(precisions: Sequence[str]) -> None:
        # The older switches come first: torch.compile reads them, and raises if they disagree with the newer ones.
        cudnn.allow_tf32, products.allow_tf32 = precisions[0] == "tf32", precisions[-1] == "tf32"
        for place, value in zip(places, precisions, strict=True):
            place.fp32_precision = value

    before = [place.fp32_precision for place in places]
    try:
        set_to(["tf32" if precision == "tf32" else "ieee"] * len(places))
        yield
    finally:
        set_to(before)
