"""Crops, flips and normalisation against a loop over pixels and against PIL, bit for bit in float32.

All forms: the operator (on a CPU by slices), the formula, and the Triton kernel, on a GPU or in Triton's interpreter.
"""

import numpy as np
import pytest
import torch
from conftest import FEW
from guards import guarded, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastil.kernels import augment
from fastil.kernels.augment import plain
from fastil.plan import Key, Transform, training_plan

MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)


def random_images(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def normalised(pixel, channel):
    """(pixel / 255 - mean) / std, each operation rounded to float32."""
    return (np.float32(pixel) / np.float32(255) - np.float32(MEAN[channel])) / np.float32(STD[channel])


def pixel_by_pixel(images, ids, boxes, flips, size):
    """float32 [B, 3, H, W]."""
    _, height, width, _ = images.shape
    out = np.empty((len(ids), 3, *size), dtype=np.float32)
    for b, (sample, (top, left, *_), flip) in enumerate(zip(ids, boxes, flips, strict=True)):
        for row in range(size[0]):
            for column in range(size[1]):
                y, x = top + row, left + (size[1] - 1 - column if flip else column)
                inside = 0 <= y < height and 0 <= x < width
                for channel in range(3):
                    pixel = images[sample, y, x, channel] if inside else 0
                    out[b, channel, row, column] = normalised(pixel, channel)
    return out


def by_pil(images, ids, boxes, flips):
    """PIL's crop pads black outside the image."""
    out = []
    for sample, (top, left, height, width), flip in zip(ids, boxes, flips, strict=True):
        image = Image.fromarray(images[sample]).crop((left, top, left + width, top + height))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image)
        out.append(np.stack([normalised(pixels[..., channel], channel) for channel in range(3)]))
    return np.stack(out)


def jitted(images, ids, boxes, flips, mean, std, dtype=torch.float32, size=None):
    """The Triton form, with the arguments of `augment`."""
    launcher = pytest.importorskip("fastil.kernels.jit.augment", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [t.to(device) for t in (images, ids, boxes, flips)]
    normal = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in (mean, std)]
    return launcher.augment(*tensors, *normal, dtype, *(size or images.shape[1:3])).cpu()


def formula(images, ids, boxes, flips, mean, std, dtype=torch.float32, size=None):
    normal = [torch.as_tensor(v, dtype=torch.float32) for v in (mean, std)]
    return plain(images, ids, boxes, flips, *normal, dtype, *(size or images.shape[1:3]))


all_forms = pytest.mark.parametrize("form", [augment, formula, jitted], ids=["operator", "formula", "triton"])


def run(form, images, ids, boxes, flips, mean=MEAN, std=STD, **keys):
    return form(
        torch.from_numpy(images),
        torch.tensor(ids),
        torch.tensor(boxes, dtype=keys.pop("box_dtype", torch.int32)),
        torch.tensor(flips),
        mean,
        std,
        **keys,
    )


@all_forms
@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.integers(1, 6), st.integers(1, 7),
    st.integers(0, 2**32 - 1), st.data(),
)  # fmt: skip
@settings(deadline=None, database=None, derandomize=True, max_examples=10 if FEW else 60)
def test_every_pixel_is_where_the_box_and_the_flip_put_it(
    form, count, height, width, out_height, out_width, seed, data
):
    images = random_images(count, height, width, seed)
    batch = data.draw(st.integers(1, 3))
    ids = data.draw(st.lists(st.integers(0, count - 1), min_size=batch, max_size=batch))
    offsets = st.tuples(st.integers(-9, 9), st.integers(-9, 9))
    boxes = [(*data.draw(offsets), out_height, out_width) for _ in ids]
    flips = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    out = run(form, images, ids, boxes, flips, size=(out_height, out_width))
    assert out.dtype == torch.float32
    np.testing.assert_array_equal(out.numpy(), pixel_by_pixel(images, ids, boxes, flips, (out_height, out_width)))


@all_forms
@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 31)])
def test_a_training_plan_is_cut_as_pil_cuts_it(form, height, width):
    images = random_images(20, height, width)
    plan = training_plan(np.arange(20), Key(0, 0), Transform(height, width, 4, True, MEAN, STD), 8)
    out = form(*(torch.from_numpy(a) for a in (images, plan.ids, plan.boxes, plan.flips)), MEAN, STD)
    np.testing.assert_array_equal(out.numpy(), by_pil(images, plan.ids, plan.boxes.tolist(), plan.flips))


@pytest.mark.parametrize(("batch", "side"), [(70, 32), (66, 32), (65, 32), (2, 300), (5, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_images_than_are_worked_on_together(batch, side, dtype):
    images = torch.from_numpy(random_images(9, side, side))
    plan = training_plan(np.arange(batch) % 9, Key(0, 0), Transform(side, side, 4, True, MEAN, STD), batch)
    ids, boxes, flips = (torch.from_numpy(a) for a in (plan.ids, plan.boxes, plan.flips))
    found = augment(images, ids, boxes, flips, MEAN, STD, dtype)
    assert torch.equal(found, formula(images, ids, boxes, flips, MEAN, STD, dtype))
    assert found.is_contiguous(memory_format=torch.channels_last)


@all_forms
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (3, 5), (-2, 1), (7, -3), (9, 11)])
def test_a_size_smaller_or_larger_than_the_images_is_cut_as_pil_cuts_it(form, top, left, flip):
    images = random_images(3, 12, 14)
    for size in ((5, 4), (12, 14), (17, 20)):
        boxes = [(top, left, *size)] * 2
        out = run(form, images, [2, 0], boxes, [flip, not flip], size=size)
        assert out.shape == (2, 3, *size)
        np.testing.assert_array_equal(out.numpy(), by_pil(images, [2, 0], boxes, [flip, not flip]))


@all_forms
@pytest.mark.parametrize("offset", [-(2**31), -10_000, -8, 8, 10_000, 2**31 - 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_box_that_misses_the_image_is_black_before_normalisation(form, offset, axis):
    images = np.full((2, 8, 8, 3), 255, dtype=np.uint8)
    box = [0, 0, 8, 8]
    box[axis] = offset
    out = run(form, images, [0, 1], [box, box], [False, True]).numpy()
    for channel in range(3):
        assert (out[:, channel] == normalised(0, channel)).all()


@all_forms
def test_every_value_of_a_pixel_is_normalised_bit_for_bit(form):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    out = run(form, images, [0], [[0, 0, 16, 16]], [False]).numpy()
    for value in range(256):
        for channel in range(3):
            assert out[0, channel, value // 16, value % 16] == normalised(value, channel)


@all_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(form, dtype):
    images = random_images(4, 9, 7)
    arguments = ([3, 1, 1], [[-2, 3, 9, 7], [1, -1, 9, 7], [0, 0, 9, 7]], [True, False, True])
    out = run(form, images, *arguments, dtype=dtype)
    assert out.dtype == dtype
    wanted = torch.from_numpy(pixel_by_pixel(images, *arguments, (9, 7)))
    if form is jitted and dtype == torch.bfloat16 and not torch.cuda.is_available():
        wanted = (wanted.view(torch.int32) & -65536).view(torch.float32)  # the interpreter cuts off instead of rounding
    assert torch.equal(out, wanted.to(dtype))


@all_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [None, (5, 3)])
def test_the_batch_is_laid_out_channels_last(form, dtype, size):
    height, width = size or (9, 7)
    out = run(form, random_images(4, 9, 7), [0, 3], [[0, 0, height, width]] * 2, [False, True], dtype=dtype, size=size)
    assert out.shape == (2, 3, height, width)
    assert out.stride() == (height * width * 3, 1, width * 3, 3)
    assert out.is_contiguous(memory_format=torch.channels_last)


@all_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_and_std_may_be_lists_or_tensors(form, dtype):
    images = random_images(3, 6, 6)
    arguments = ([0, 2], [[-1, 1, 6, 6], [0, 0, 6, 6]], [True, False])
    lists = run(form, images, *arguments, list(MEAN), list(STD))
    tensors = run(form, images, *arguments, torch.tensor(MEAN, dtype=dtype), torch.tensor(STD, dtype=dtype))
    assert torch.equal(lists, tensors)


@all_forms
def test_boxes_of_any_integer_type_are_the_same(form):
    images = random_images(2, 6, 6)
    arguments = ([0, 1], [[-1, 1, 6, 6], [2, -3, 6, 6]], [True, False])
    assert torch.equal(run(form, images, *arguments), run(form, images, *arguments, box_dtype=torch.int64))


def test_the_data_set_is_not_changed():
    images = random_images(3, 6, 6)
    before = images.copy()
    run(augment, images, [0, 1, 1], [[3, 3, 6, 6], [-9, 0, 6, 6], [0, 0, 6, 6]], [True, False, True])
    np.testing.assert_array_equal(images, before)


def test_an_id_the_data_set_lacks_is_an_error_on_the_cpu_and_not_a_number_on_a_gpu():
    images = random_images(3, 6, 6)
    for sample in (3, -1):
        with pytest.raises(IndexError, match=r"ids must lie in \[0, 3\)"):
            run(augment, images, [sample], [[0, 0, 6, 6]], [False])
    out = run(jitted, images, [3, 1, -1], [[0, 0, 6, 6]] * 3, [False] * 3)
    assert out[[0, 2]].isnan().all()
    assert torch.equal(out[1:2], run(augment, images, [1], [[0, 0, 6, 6]], [False]))


@pytest.mark.parametrize(
    ("ids", "boxes", "flips"),
    [
        ([0], [[0, 0, 6, 6]] * 2, [False] * 2),
        ([0, 1], [[0, 0]] * 2, [False] * 2),
        ([0, 1], [[0, 0, 6, 6]] * 2, [False]),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(ids, boxes, flips):
    with pytest.raises(ValueError, match="ids, boxes and flips must be"):
        run(augment, random_images(3, 6, 6), ids, boxes, flips)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": (0.2, 0.0, 0.2)}, "std=0.0: must be finite and above 0"),
        ({"std": (0.2, -0.1, 0.2)}, "std=-0.1: must be finite and above 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean=nan: must be finite"),
        ({"mean": (0.5, 0.5)}, "mean must have 3 values, one per channel, not 2"),
        ({"std": torch.ones(4)}, "std must have 3 values, one per channel, not 4"),
        ({"size": (0, 6)}, "size=0: must be an integer of at least 1"),
        ({"dtype": torch.uint8}, "dtype=torch.uint8: must be a floating-point type"),
        ({"flips": torch.zeros(1, dtype=torch.uint8)}, r"bool \[B\], not .*torch.uint8 \[1\]"),
        ({"ids": torch.zeros(1)}, "ids, boxes and flips must be integers"),
    ],
)
def test_numbers_and_types_that_cannot_be_are_named(change, message):
    given = {
        "images": torch.from_numpy(random_images(3, 6, 6)), "ids": torch.zeros(1, dtype=torch.int64),
        "boxes": torch.tensor([[0, 0, 6, 6]]), "flips": torch.tensor([False]), "mean": MEAN, "std": STD,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        augment(**(given | change))


def test_images_of_another_type_are_an_error():
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="images must be uint8"):
        augment(torch.zeros(3, 6, 6, 3), none, none.view(0, 1).expand(0, 4), none.bool(), MEAN, STD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_beside_the_tensors_is_read_or_written(dtype, device):
    """Poisoned bytes are 255 and would show."""
    launcher = pytest.importorskip("fastil.kernels.jit.augment")
    images, mean, std = torch.zeros(3, 9, 7, 3, dtype=torch.uint8), torch.zeros(3), torch.ones(3)
    ids, flips = torch.tensor([2, 0, 0, 2]), torch.tensor([True, False, True, False])
    boxes = torch.tensor([[-3, 5, 9, 7], [8, -6, 9, 7], [-(2**31), 0, 9, 7], [2**31 - 1, 2**31 - 1, 9, 7]])
    inputs = [t.to(device) for t in (images, ids, boxes.int(), flips, mean, std)]
    buffers = [poisoned(t) if t.dtype != torch.bool else t for t in inputs]
    with guarded():
        out = launcher.augment(*buffers, dtype, 9, 7)
    assert (out == 0).all()


def test_the_operator_works_under_fake_tensors_and_follows_its_schema():
    images = torch.from_numpy(random_images(3, 9, 7))
    ids, flips = torch.tensor([2, 0]), torch.tensor([True, False])
    boxes = torch.tensor([[-3, 5, 6, 5], [8, -6, 6, 5]])
    arguments = (images, ids, boxes, flips, torch.tensor(MEAN), torch.tensor(STD), torch.bfloat16, 6, 5)
    torch.library.opcheck(torch.ops.fastil.augment.default, arguments)


@all_forms
def test_an_empty_batch_has_no_images(form):
    none = torch.empty(0, dtype=torch.int64)
    images = torch.from_numpy(random_images(3, 6, 5))
    out = form(images, none, none.view(0, 1).expand(0, 4), none.bool(), MEAN, STD)
    assert out.shape == (0, 3, 6, 5)
