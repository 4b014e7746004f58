"""Crops, flips and normalisation against a loop over pixels and against PIL, bit for bit in float32."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastil.kernels import augment
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


def run(images, ids, boxes, flips, mean=MEAN, std=STD, **keys):
    return augment(
        torch.from_numpy(images),
        torch.tensor(ids),
        torch.tensor(boxes, dtype=keys.pop("box_dtype", torch.int32)),
        torch.tensor(flips),
        mean,
        std,
        **keys,
    )


@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.integers(1, 6), st.integers(1, 7),
    st.integers(0, 2**32 - 1), st.data(),
)  # fmt: skip
@settings(deadline=None, database=None, derandomize=True, max_examples=60)
def test_every_pixel_is_where_the_box_and_the_flip_put_it(count, height, width, out_height, out_width, seed, data):
    images = random_images(count, height, width, seed)
    batch = data.draw(st.integers(1, 3))
    ids = data.draw(st.lists(st.integers(0, count - 1), min_size=batch, max_size=batch))
    offsets = st.tuples(st.integers(-9, 9), st.integers(-9, 9))
    boxes = [(*data.draw(offsets), out_height, out_width) for _ in ids]
    flips = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    out = run(images, ids, boxes, flips, size=(out_height, out_width))
    assert out.dtype == torch.float32
    np.testing.assert_array_equal(out.numpy(), pixel_by_pixel(images, ids, boxes, flips, (out_height, out_width)))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 31)])
def test_a_training_plan_is_cut_as_pil_cuts_it(height, width):
    images = random_images(20, height, width)
    plan = training_plan(np.arange(20), Key(0, 0), Transform(height, width, 4, True, MEAN, STD), 8)
    out = augment(*(torch.from_numpy(a) for a in (images, plan.ids, plan.boxes, plan.flips)), MEAN, STD)
    np.testing.assert_array_equal(out.numpy(), by_pil(images, plan.ids, plan.boxes.tolist(), plan.flips))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (3, 5), (-2, 1), (7, -3), (9, 11)])
def test_a_size_smaller_or_larger_than_the_images_is_cut_as_pil_cuts_it(top, left, flip):
    images = random_images(3, 12, 14)
    for size in ((5, 4), (12, 14), (17, 20)):
        boxes = [(top, left, *size)] * 2
        out = run(images, [2, 0], boxes, [flip, not flip], size=size)
        assert out.shape == (2, 3, *size)
        np.testing.assert_array_equal(out.numpy(), by_pil(images, [2, 0], boxes, [flip, not flip]))


@pytest.mark.parametrize("offset", [-(2**31), -10_000, -8, 8, 10_000, 2**31 - 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_box_that_misses_the_image_is_black_before_normalisation(offset, axis):
    images = np.full((2, 8, 8, 3), 255, dtype=np.uint8)
    box = [0, 0, 8, 8]
    box[axis] = offset
    out = run(images, [0, 1], [box, box], [False, True]).numpy()
    for channel in range(3):
        assert (out[:, channel] == normalised(0, channel)).all()


def test_every_value_of_a_pixel_is_normalised_bit_for_bit():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    out = run(images, [0], [[0, 0, 16, 16]], [False]).numpy()
    for value in range(256):
        for channel in range(3):
            assert out[0, channel, value // 16, value % 16] == normalised(value, channel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    images = random_images(4, 9, 7)
    arguments = ([3, 1, 1], [[-2, 3, 9, 7], [1, -1, 9, 7], [0, 0, 9, 7]], [True, False, True])
    out = run(images, *arguments, dtype=dtype)
    assert out.dtype == dtype
    assert torch.equal(out, torch.from_numpy(pixel_by_pixel(images, *arguments, (9, 7))).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [None, (5, 3)])
def test_the_batch_is_laid_out_channels_last(dtype, size):
    height, width = size or (9, 7)
    out = run(random_images(4, 9, 7), [0, 3], [[0, 0, height, width]] * 2, [False, True], dtype=dtype, size=size)
    assert out.shape == (2, 3, height, width)
    assert out.stride() == (height * width * 3, 1, width * 3, 3)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_and_std_may_be_lists_or_tensors(dtype):
    images = random_images(3, 6, 6)
    arguments = ([0, 2], [[-1, 1, 6, 6], [0, 0, 6, 6]], [True, False])
    lists = run(images, *arguments, list(MEAN), list(STD))
    tensors = run(images, *arguments, torch.tensor(MEAN, dtype=dtype), torch.tensor(STD, dtype=dtype))
    assert torch.equal(lists, tensors)


def test_boxes_of_any_integer_type_are_the_same():
    images = random_images(2, 6, 6)
    arguments = ([0, 1], [[-1, 1, 6, 6], [2, -3, 6, 6]], [True, False])
    assert torch.equal(run(images, *arguments), run(images, *arguments, box_dtype=torch.int64))


def test_the_data_set_is_not_changed():
    images = random_images(3, 6, 6)
    before = images.copy()
    run(images, [0, 1, 1], [[3, 3, 6, 6], [-9, 0, 6, 6], [0, 0, 6, 6]], [True, False, True])
    np.testing.assert_array_equal(images, before)


def test_an_id_the_data_set_lacks_is_an_error():
    with pytest.raises(IndexError):
        run(random_images(3, 6, 6), [3], [[0, 0, 6, 6]], [False])


def test_an_empty_batch_has_no_images():
    none = torch.empty(0, dtype=torch.int64)
    images = torch.from_numpy(random_images(3, 6, 5))
    out = augment(images, none, none.view(0, 1).expand(0, 4), none.bool(), MEAN, STD)
    assert out.shape == (0, 3, 6, 5)
