"""Buffers whose surroundings tell on a kernel: Triton's interpreter does not notice an access out of bounds."""

import contextlib
import math

import pytest
import torch

BORDER = 1024  # values on either side; the largest distance an unmasked block would reach


def surround(tensor, fill):
    """A copy of the tensor, contiguous, in the middle of a larger buffer."""
    buffer = torch.full((tensor.numel() + 2 * BORDER,), fill, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[BORDER : BORDER + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def poisoned(*tensors):
    """The tensors between NaN, or between the largest integers, which no result may depend on."""
    copies = [
        None if t is None else surround(t, math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)
        for t in tensors
    ]
    return copies if len(copies) > 1 else copies[0]


@contextlib.contextmanager
def guarded():
    """What a launcher allocates in this context lies between sentinels, checked on leaving."""
    buffers = []

    def empty(*shape, dtype=torch.float32, device=None, **_):
        shape = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        buffer = torch.full((shape.numel() + 2 * BORDER,), 77, dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[BORDER : BORDER + shape.numel()].view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda t, **keys: empty(t.shape, dtype=t.dtype, device=t.device))
        yield
    assert buffers, "the launcher allocated nothing"
    for buffer in buffers:
        assert (buffer[:BORDER] == 77).all(), "written in front of an output"
        assert (buffer[-BORDER:] == 77).all(), "written behind an output"
