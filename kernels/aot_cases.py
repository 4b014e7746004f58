"""The launches that `python -m fastil.kernels.aot` compiles: real launchers, at the shapes of real runs.

A case is one line in CASES. Its tensors lie on the CPU and hold nothing; only their dtypes, shapes and alignment count.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastil.kernels.alpha_hypergradient import WIDEST
from fastil.kernels.crop_resize import COLUMNS
from fastil.kernels.herd import LARGEST
from fastil.kernels.incremental_loss import WIDEST_COSINES, Operands
from fastil.kernels.jit.alpha_hypergradient import alpha_hypergradient
from fastil.kernels.jit.augment import augment
from fastil.kernels.jit.cosine_head import cosine_head, cosine_head_grad
from fastil.kernels.jit.crop_resize import crop_resize
from fastil.kernels.jit.herd import herd
from fastil.kernels.jit.incremental_loss import incremental_loss
from fastil.kernels.jit.less_forget import less_forget
from fastil.kernels.jit.pod_spatial import pod_spatial

BATCH = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A launch, and the limits on its binaries in addition to the general ones.

    call: builds tensors and calls a launcher. matrices: arguments of the kernel that must be read and written in wide
    pieces. tile: constants of the kernel whose product is the number of elements of each matrix that a program holds.
    max_registers, max_barriers: None for no limit.
    """

    name: str
    call: Callable[[], object]
    matrices: tuple[str, ...] = ()
    tile: tuple[str, ...] = ("BLOCK",)
    max_registers: int | None = None
    max_barriers: int | None = None

    def violations(self, kernel: Any, measured: dict[str, Any]) -> Iterator[str]:
        """Yield the limits that a compiled kernel of this case violates, given its figures."""
        for figure in ("stack", "spill_stores", "spill_loads"):
            # A spilled register goes through memory, and these kernels exist to save memory traffic.
            if measured[figure]:
                yield f"{figure} {measured[figure]}, must be 0"
        for figure, limit in (("registers", self.max_registers), ("barriers", self.max_barriers)):
            if limit is not None and measured[figure] > limit:
                yield f"{figure} {measured[figure]}, must be at most {limit}"
        if not self.matrices:
            return
        constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
        elements = math.prod(constants[name] for name in self.tile) // (32 * kernel.metadata.num_warps)
        for name in self.matrices:
            # Narrow accesses multiply the instructions per byte. Eight elements of any float type fill 16 bytes, the
            # widest access of sm_80 and sm_90; a thread that holds fewer must still move 8 bytes, or all it holds.
            size = int(re.sub(r"\D", "", kernel.src.signature[name]) or 0) // 8
            least = 16 if elements >= 8 else min(8, elements * size)
            widths = {kind: measured[kind][name] for kind in ("loads", "stores") if name in measured[kind]}
            if not widths and kernel.src.signature[name] != "constexpr":
                yield f"neither a load nor a store of {name} found"
            for kind, width in widths.items():
                if width < least:
                    yield f"{kind} {name} {width} bytes at once, must be {least}"


def loss(variant: str, precision: str, width: int) -> Case:
    """Return the case of a step's loss. Variants: the training form without and with a teacher ("plain", "teacher"),
    with counts and weights on the device ("device"), the autograd form ("value"), LUCIR's combination ("lucir"), and
    everything that the width allows ("all").
    """
    flags = variant == "all"
    cosines = variant in ("all", "lucir") and width <= WIDEST_COSINES

    def number(value: float) -> Any:
        return torch.tensor(value) if variant == "device" else value

    def call() -> object:
        logits = torch.empty(BATCH, width, dtype=DTYPES[precision])
        operands = Operands(
            logits,
            target=torch.empty(BATCH, dtype=torch.int64),
            log_prior=torch.empty(width),
            teacher=None if variant in ("plain", "lucir") else torch.empty_like(logits),
            num_old=number(50),
            num_seen=number(100),
            ce_weight=number(0.5),
            kd_weight=number(0.5),
            temperature=number(2.0),
            sample_weight=torch.empty(BATCH) if flags else None,
            logit_scale=torch.empty(()) if cosines else None,
            margin_weight=1.0 if cosines else None,
            separated=flags,
            label_smoothing=0.1 if flags else 0.0,
            margin=0.5,
            hardest=2,
            meter=None if variant == "value" else torch.empty(BATCH, 4),
            value=variant in ("value", "lucir", "all"),
        )
        return incremental_loss(*operands)

    return Case(
        f"incremental_loss {variant} {precision} {width}",
        call,
        matrices=("LOGITS", "TEACHER", "DX"),
        # A row is one warp. The more registers it takes, the fewer rows are there to hide each other's waits.
        max_registers=96 if width <= 128 else None,
        # Two rounds over the lanes are five barriers each. Margin ranking ("lucir", "all") adds one round per rival, so
        # these variants are exempt.
        max_barriers=10 if width == 1000 and variant in ("plain", "teacher", "device", "value") else None,
    )


def alpha_hypergradient_case(precision: str, width: int) -> Case:
    """Return a case of the contraction for alpha."""

    def call() -> object:
        logits = torch.empty(BATCH, width, dtype=DTYPES[precision])
        target, log_prior = torch.empty(BATCH, dtype=torch.int64), torch.empty(width)
        return alpha_hypergradient(logits, torch.empty_like(logits), target, log_prior, 50, 100, 0.5)

    return Case(f"alpha_hypergradient {precision} {width}", call, ("LOGITS", "TANGENT", "PARTIAL"))


def augment_case(precision: str, source: int, size: int) -> Case:
    """Return a case of the augmentation."""

    def call() -> object:
        images = torch.empty(1_000, source, source, 3, dtype=torch.uint8)
        ids, boxes = torch.empty(BATCH, dtype=torch.int64), torch.empty(BATCH, 4, dtype=torch.int32)
        flips, channels = torch.empty(BATCH, dtype=torch.bool), torch.empty(3)
        return augment(images, ids, boxes, flips, channels, channels, DTYPES[precision], size, size)

    return Case(f"augment {precision} {size}x{size}", call, ("OUT",))


def crop_resize_case(size: int, held: int = 1_000_000) -> Case:
    """Return a case of the frames from `held` bytes of images. They are read and written byte by byte, because boxes
    begin anywhere and a pixel has three bytes.
    """

    def call() -> None:
        table = torch.empty(BATCH, COLUMNS, dtype=torch.int64)
        frames = torch.empty(BATCH, size, size, 3, dtype=torch.uint8)
        crop_resize(torch.empty(held, dtype=torch.uint8), table, frames)

    # Room for eight programs of four warps or more per multiprocessor, which hide each other's waits for bytes.
    return Case(f"crop_resize {size}x{size}{' of 2 GiB' * (held >= 2**31)}", call, max_registers=64)


def herd_case(images: int) -> Case:
    """Return a case of herding. Loads are one number wide: Gram matrices are as wide as the largest class, unpadded."""

    def call() -> object:
        counts = torch.empty(10, dtype=torch.int64)
        return herd(torch.empty(10, images, images, dtype=torch.float64), counts, 20, 1_000, 1e-9)

    return Case(f"herd {images}", call)


def less_forget_case(precision: str, width: int) -> Case:
    """Return a case of the less-forget constraint."""

    def call() -> object:
        features = torch.empty(BATCH, width, dtype=DTYPES[precision])
        return less_forget(features, torch.empty_like(features))

    return Case(f"less_forget {precision} {width}", call, ("FEATURES", "TEACHER", "DX"))


def pod_spatial_case(precision: str, channels: int, size: int) -> Case:
    """Return a case of the spatial distillation."""

    def call() -> object:
        maps = torch.empty(BATCH, channels, size, size, dtype=DTYPES[precision], memory_format=torch.channels_last)
        return pod_spatial(maps, torch.empty_like(maps), 4)

    return Case(
        f"pod_spatial {precision} {size}x{size}x{channels}",
        call,
        ("MAPS", "TEACHER", "DX"),
        ("ROWS", "BLOCK_W", "BLOCK_C"),
    )


def cosine_head_case(precision: str, dim: int, classes: int, proxies: int, *, backward: bool) -> Case:
    """Return a case of the cosine head. No tile must be wide: tl.dot decides which thread holds what."""

    def call() -> object:
        features = torch.empty(BATCH, dim, dtype=DTYPES[precision])
        weight = torch.empty(classes, proxies, dim, dtype=DTYPES[precision])
        scale = torch.empty(())
        if not backward:
            return cosine_head(features, weight, scale, 1.0)
        cosines, inv_x, inv_v = (torch.empty(n) for n in (BATCH * classes * proxies, BATCH, classes * proxies))
        grad = torch.empty(BATCH, classes, dtype=DTYPES[precision])
        return cosine_head_grad(grad, features, weight, scale, cosines.view(BATCH, -1), inv_x, inv_v, 1.0)

    name = "cosine_head_grad" if backward else "cosine_head"
    return Case(f"{name} {precision} {dim} {classes}x{proxies}", call)


WIDTHS = (104, 200, 504, 1000, 4000, 8192, 21848)
CIFAR_MAPS = ((16, 32), (32, 16), (64, 8))  # (channels, size): ResNet-32
IMAGENET_MAPS = ((64, 56), (128, 28), (256, 14), (512, 7))  # ResNet-18
CASES = [
    *(loss("teacher", dtype, width) for dtype in DTYPES for width in WIDTHS),
    *(loss("plain", dtype, width) for dtype in DTYPES for width in (104, 1000, 21848)),
    *(loss("value", "fp32", width) for width in (104, 1000)),
    *(loss("device", "bf16", width) for width in (104, 1000)),
    *(loss("lucir", dtype, width) for dtype in DTYPES for width in (104, 1000, WIDEST_COSINES)),
    *(loss("all", dtype, width) for dtype in DTYPES for width in (104, 1000, WIDEST_COSINES, 4000, 8192)),
    loss("all", "fp32", 21848),
    *(alpha_hypergradient_case("fp32", width) for width in (104, 1000, WIDEST)),
    *(augment_case(dtype, 32, 32) for dtype in DTYPES),
    augment_case("bf16", 256, 224),
    crop_resize_case(224),
    crop_resize_case(224, 2**31),  # positions do not fit into 32 bits
    *(herd_case(images) for images in (500, 1_300, LARGEST)),
    *(less_forget_case(dtype, width) for dtype in DTYPES for width in (64, 512, WIDEST)),
    *(pod_spatial_case("bf16", *shape) for shape in (*CIFAR_MAPS, *IMAGENET_MAPS)),
    *(pod_spatial_case("fp32", *shape) for shape in (CIFAR_MAPS[0], IMAGENET_MAPS[0])),
    *(cosine_head_case("bf16", 64, 104, proxies, backward=b) for proxies in (1, 10) for b in (False, True)),
    *(cosine_head_case("bf16", 512, 1000, 1, backward=b) for b in (False, True)),
    *(cosine_head_case("fp32", 64, 104, 10, backward=b) for b in (False, True)),
]
