"""A case of `bench.kernels`, one call of a kernel on tensors of one shape and dtype, and how it is said in words."""

import re
from dataclasses import dataclass

import torch

from fastil.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "uint8": torch.uint8}


@dataclass(frozen=True)
class Case:
    """B rows of W columns; where columns are classes, the first `classes` of them are, and half of those are old. What
    rows and columns are each kernel says itself (`bench.contestants`)."""

    batch: int
    width: int
    classes: int
    dtype: str
    kernel: str = "incremental_loss"

    @property
    def num_old(self) -> int:
        """The number of old classes."""
        return self.classes // 2

    @property
    def shape(self) -> str:
        """BxW, and the number of classes where it is another."""
        return f"{self.batch}x{self.width}" + (f"x{self.classes}" if self.classes != self.width else "")

    @property
    def label(self) -> str:
        """The name of the case."""
        return f"{self.kernel} {self.shape} {self.dtype}"


def read_shape(text: str) -> tuple[int, int, int]:
    """Return B, W and the number of classes from BxW or BxWxCLASSES. Raises UserError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"--shape {text}: give BxW or BxWxCLASSES, such as 128x1000 or 128x104x100")
    batch, width, classes = int(match[1]), int(match[2]), int(match[3] or match[2])
    if not 2 <= classes <= width:
        raise UserError(f"--shape {text}: {classes} classes; there must be from 2 to W, which is {width}")
    return batch, width, classes
