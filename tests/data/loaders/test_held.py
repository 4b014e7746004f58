"""Images that are held decoded: what is kept, what is read, and what is left when a read fails."""

import numpy as np
import pytest
import torch

from fastil.data.loaders import held
from fastil.data.loaders.held import Held

SIZES = np.array([(1 + i % 5, 2 + i % 3) for i in range(40)], dtype=np.int32)
CPU = torch.device("cpu")


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (*SIZES[i], 3), dtype=np.uint8)


def holds(some, ids):
    """It holds the images of these ids, and no others."""
    np.testing.assert_array_equal(some.ids, ids)
    for i in ids:
        np.testing.assert_array_equal(some.image(i, SIZES[i]).numpy(), pixels(i))


@pytest.fixture(params=[True, False], ids=["both fit", "one fits"])
def room(request, monkeypatch):
    """Whether the old and the new images are in memory together; several reads a step."""
    monkeypatch.setattr(held, "_fits", lambda count, device: request.param)
    monkeypatch.setattr(held, "TOGETHER", 3)
    return request.param


def test_only_what_is_new_is_read(room):
    some, read = Held(len(SIZES), CPU), []

    def reading(i):
        read.append(i)
        return pixels(i)

    for ids, new in (([3, 7, 8, 30, 39], [3, 7, 8, 30, 39]), ([0, 7, 8, 9, 38, 39], [0, 9, 38]), ([8], []), ([], [])):
        read.clear()
        some.hold(np.array(ids, dtype=np.int64), SIZES, reading)
        assert sorted(read) == new
        holds(some, ids)
    assert len(some.pixels) == 0


def test_a_read_that_fails_leaves_what_was_held_or_nothing(room):
    def broken(i):
        if i == 20:
            raise OSError("image 20 is gone")
        return pixels(i)

    some = Held(len(SIZES), CPU)
    some.hold(np.array([3, 7, 8]), SIZES, pixels)
    with pytest.raises(OSError, match="image 20 is gone"):
        some.hold(np.arange(5, 30), SIZES, broken)
    holds(some, [3, 7, 8] if room else [])
    some.hold(np.array([7, 20]), SIZES, pixels)
    holds(some, [7, 20])


def test_what_is_forgotten_is_read_again(room):
    some = Held(len(SIZES), CPU)
    some.hold(np.array([1, 2, 3]), SIZES, pixels)
    some.forget(np.array([2]))
    holds(some, [1, 3])
    some.hold(np.array([1, 2, 3]), SIZES, pixels)
    holds(some, [1, 2, 3])
