"""Frames of boxes of images of any sizes, against a filter written out in float64, against Pillow, and as plain cuts.

Both forms: the operator (on a CPU by torch's interpolate) and the Triton kernel, on a GPU or in Triton's interpreter.
"""

import numpy as np
import pytest
import torch
from conftest import FEW
from guards import surround
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastil.kernels import crop_resize

SIZE = (9, 11)


def jitted(store, table, frames):
    """The Triton form, with the arguments of `crop_resize`."""
    launcher = pytest.importorskip("fastil.kernels.jit.crop_resize", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    there = frames.to(device)
    launcher.crop_resize(store.to(device), table.to(device), there)
    frames.copy_(there)


both_forms = pytest.mark.parametrize("form", [crop_resize, jitted], ids=["operator", "triton"])


def run(form, images, rows, size=SIZE):
    """The frames, [B, *size, 3], that rows (image, box, resized to, corner) ask for; the last row's comes first."""
    store = np.concatenate([image.reshape(-1) for image in images])
    starts = np.cumsum([0] + [image.size for image in images]).tolist()
    table = [
        [starts[i], *images[i].shape[:2], *box, *new, *corner, len(rows) - 1 - number]
        for number, (i, box, new, corner) in enumerate(rows)
    ]
    frames = torch.full((len(rows), *size, 3), 77, dtype=torch.uint8)
    form(torch.from_numpy(store), torch.tensor(table), frames)
    return frames.numpy()[::-1]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def weights(length, size):
    """float64 [size, length]: how much each pixel of a line counts for each of the resized one. A triangle as wide as
    two pixels of the coarser of the two, cut off at the ends of the line."""
    scale = length / size
    reach = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centers[:, None]) / reach
    triangle = np.maximum(1 - distance, 0)
    return triangle / triangle.sum(axis=1, keepdims=True)


def padded(image, box):
    """The box with black pixels outside the image, pixel by pixel."""
    top, left, height, width = box
    out = np.zeros((height, width, 3), image.dtype)
    for y in range(height):
        for x in range(width):
            if 0 <= top + y < image.shape[0] and 0 <= left + x < image.shape[1]:
                out[y, x] = image[top + y, left + x]
    return out


def in_float64(image, box, new, corner, size):
    """Unrounded: a frame whose values are between those of pixels, and where it shows the resized box."""
    part = padded(image, box).astype(np.float64)
    resized = np.einsum("yh,xw,hwc->yxc", weights(box[2], new[0]), weights(box[3], new[1]), part)
    return padded(resized, (*corner, *size))


@both_forms
@given(st.data(), st.integers(0, 2**32 - 1))
@settings(deadline=None, database=None, derandomize=True, max_examples=15 if FEW else 80)
def test_frames_are_those_of_a_filter_in_float64(form, data, seed):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    images = [noise(*pair(1, 40), seed % 1000 + i) for i in range(data.draw(st.integers(1, 3)))]
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(images) - 1))
        rows.append((i, (*pair(-12, 30), *pair(1, 40)), pair(1, 30), pair(-4, 12)))
    found = run(form, images, rows).astype(np.float64)
    for frame, (i, *row) in zip(found, rows, strict=True):
        assert np.abs(frame - in_float64(images[i], *row, SIZE)).max() <= 0.5 + 1e-3


@both_forms
@pytest.mark.parametrize("new", [(9, 11), (4, 5), (36, 44), (9, 5)], ids=str)
def test_a_box_is_resized_as_pillow_does(form, new):
    """Which rounds lines before it goes on to columns, so that a value may be off by one."""
    image, box = noise(37, 50), (3, 6, 30, 41)
    top, left, height, width = box
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    wanted = np.asarray(part.resize(new[::-1], Image.Resampling.BILINEAR)).astype(int)
    (found,) = run(form, [image], [(0, box, new, (0, 0))], size=new)
    apart = np.abs(found - wanted)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.25


@both_forms
@pytest.mark.parametrize("at", [(0, 0), (-3, 5), (4, -2), (30, 30), (-40, 0), (-(2**20), 2**20)], ids=str)
def test_what_is_not_resized_is_a_plain_cut(form, at):
    images = [noise(13, 8, 1), noise(9, 11, 2), noise(20, 31, 3)]
    rows = [(i, (*at, *SIZE), SIZE, (0, 0)) for i in (2, 0, 1, 2)]
    for frame, (i, box, *_) in zip(run(form, images, rows), rows, strict=True):
        np.testing.assert_array_equal(frame, padded(images[i], box))


@both_forms
def test_a_frame_is_cut_out_of_what_is_resized(form):
    """The test-time transform, short side to 20 and the middle: the whole resized image, and then a view of it."""
    image = noise(31, 47)
    (whole,) = run(form, [image], [(0, (0, 0, 31, 47), (20, 30), (0, 0))], size=(20, 30))
    (middle,) = run(form, [image], [(0, (0, 0, 31, 47), (20, 30), (5, 9))])
    np.testing.assert_array_equal(middle, whole[5:14, 9:20])


@both_forms
def test_halves_go_to_the_even_number_as_torch_rounds(form):
    """Half the size: weights are 1/8 and 3/8, so that sums which end in one half are exact."""
    image = noise(64, 64)
    (found,) = run(form, [image], [(0, (0, 0, 64, 64), (32, 32), (0, 0))], size=(32, 32))
    exact = in_float64(image, (0, 0, 64, 64), (32, 32), (0, 0), (32, 32))[1:-1, 1:-1]
    assert (exact % 1 == 0.5).sum() > 20
    np.testing.assert_array_equal(found[1:-1, 1:-1], np.rint(exact))


@both_forms
def test_a_large_image_counts_in_all_its_pixels(form):
    image = noise(700, 20)
    (found,) = run(form, [image], [(0, (0, 0, 700, 20), (2, 2), (0, 0))], size=(2, 2))
    wanted = in_float64(image, (0, 0, 700, 20), (2, 2), (0, 0), (2, 2))
    assert np.abs(found - wanted).max() <= 0.5 + 1e-2


@both_forms
def test_other_frames_of_the_batch_stay_as_they_are(form):
    store = torch.from_numpy(noise(12, 12).reshape(-1))
    frames = torch.full((4, 5, 5, 3), 77, dtype=torch.uint8)
    form(store, torch.tensor([[0, 12, 12, 0, 0, 5, 5, 5, 5, 0, 0, 2]]), frames)
    assert (frames[[0, 1, 3]] == 77).all()
    assert torch.equal(frames[2], store.view(12, 12, 3)[:5, :5])
    form(store, torch.empty(0, 12, dtype=torch.int64), frames)
    assert (frames[[0, 1, 3]] == 77).all()


@both_forms
def test_an_image_may_begin_beyond_2_gib(form):
    store = torch.empty(2**31 + 9 * 12 * 3, dtype=torch.uint8)  # of which the system has only what is written
    image = noise(9, 12)
    store[2**31 :] = torch.from_numpy(image.reshape(-1))
    frames = torch.full((2, *SIZE, 3), 77, dtype=torch.uint8)
    form(store, torch.tensor([[2**31, 9, 12, 0, 1, *SIZE, *SIZE, 0, 0, 1]]), frames)
    np.testing.assert_array_equal(frames[1].numpy(), padded(image, (0, 1, *SIZE)))


WRONG = {
    "beyond its end": {0: 1}, "before it": {0: -1}, "too high": {1: 13}, "no frame": {11: 4}, "nor this": {11: -1},
    "no height": {1: 0}, "no width": {2: 0}, "both below 0": {1: -12, 2: -12}, "2**32 + 12 high": {1: 2**32 + 12},
    "product beyond int64": {1: 2**32, 2: 2**32}, "product wraps": {1: 2**31 - 1, 2: 2**31 - 1},
    "end wraps": {0: 2**63 - 100}, "side of 2**24": {5: 2**24}, "shrunk to a column": {6: 8192, 8: 1},
    "shrunk to a line": {5: 2**23, 7: 1}, "box of no height": {5: 0}, "box below 0": {6: -5},
    "to no height": {7: 0}, "to a width below 0": {8: -1}, "no image and no frame": {1: 0, 11: 4},
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_not_there_is_an_error_on_the_cpu_and_black_or_nothing_on_a_gpu(change):
    store = torch.from_numpy(np.full(12 * 12 * 3, 255, np.uint8))
    row = [0, 12, 12, 0, 0, 5, 5, 5, 5, 0, 0, 3]
    for column, value in change.items():
        row[column] = value
    frames = torch.full((4, 5, 5, 3), 77, dtype=torch.uint8)
    with pytest.raises(IndexError, match="the store has 432 bytes and there are 4 frames"):
        crop_resize(store, torch.tensor([row]), frames)
    jitted(store, torch.tensor([row]), frames)
    assert (frames[:3] == 77).all()
    assert (frames[3] == (77 if 11 in change else 0)).all()


def test_nothing_outside_the_tensors_is_read_or_written(device):
    """What lies next to the images is 255, and what lies next to the frames is looked at."""
    launcher = pytest.importorskip("fastil.kernels.jit.crop_resize")
    store = surround(torch.zeros(2 * 7 * 9 * 3, dtype=torch.uint8, device=device), 255)
    frames = surround(torch.full((3, *SIZE, 3), 5, dtype=torch.uint8, device=device), 77)
    rows = [[189, 7, 9, -3, 4, 12, 13, *SIZE, 0, 0, 2], [0, 7, 9, 0, 0, 7, 9, 30, 40, 20, 28, 0]]
    rows.append([189, 7, 9, 2, -5, 9, 11, *SIZE, 0, 0, 1])
    launcher.crop_resize(store, torch.tensor(rows, device=device), frames)
    assert (frames == 0).all()
    buffer = frames._base
    border = (len(buffer) - frames.numel()) // 2
    assert (buffer[:border] == 77).all()
    assert (buffer[-border:] == 77).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": torch.zeros(12)}, r"store must be uint8 \[bytes\], not torch.float32"),
        ({"store": torch.zeros(2, 6, dtype=torch.uint8)}, r"store must be uint8 \[bytes\]"),
        ({"table": torch.zeros(1, 11, dtype=torch.int64)}, r"table must be int64 \[B, 12\], not torch.int64 \[1, 11\]"),
        ({"table": torch.zeros(1, 12, dtype=torch.int32)}, r"table must be int64"),
        ({"frames": torch.zeros(1, 3, 5, 5, dtype=torch.uint8)}, r"frames must be uint8 \[N, H, W, 3\]"),
        ({"frames": torch.zeros(1, 5, 3, 5, dtype=torch.uint8).mT}, "contiguous"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_named(change, message):
    given = {
        "store": torch.zeros(75, dtype=torch.uint8), "table": torch.zeros(0, 12, dtype=torch.int64),
        "frames": torch.zeros(1, 5, 5, 3, dtype=torch.uint8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        crop_resize(**(given | change))


def test_the_operator_works_under_fake_tensors_and_follows_its_schema():
    store = torch.from_numpy(noise(12, 12).reshape(-1))
    table = torch.tensor([[0, 12, 12, 1, -2, 10, 9, 5, 5, 0, 0, 1]])
    arguments = (store, table, torch.zeros(2, 5, 5, 3, dtype=torch.uint8))
    torch.library.opcheck(torch.ops.fastil.crop_resize.default, arguments)
