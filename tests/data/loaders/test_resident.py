"""The resident loader against numpy: pad with black, crop, mirror, normalise."""

import gc
import weakref

import numpy as np
import pytest
import torch

from fastil.data import Split, make_loader
from fastil.errors import UserError
from fastil.plan import EpochPlan, Key, Transform, sequential_plan, training_plan

HEIGHT, WIDTH, COUNT, BORDER = 6, 9, 23, 12
TRANSFORM = Transform(HEIGHT, WIDTH, pad=3, flip=True, mean=(0.5071, 0.4866, 0.4409), std=(0.2009, 0.1984, 0.2023))
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.fixture
def split():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8)
    images[0].flat[: HEIGHT * WIDTH * 3] = np.arange(HEIGHT * WIDTH * 3)  # many different values
    images[1].flat[:] = np.arange(HEIGHT * WIDTH * 3) + 94  # to 255
    return Split(images, random.integers(0, 5, COUNT))


def reference(image, box, flip, transform):
    """float32 [3, H, W]."""
    top, left, height, width = (int(side) for side in box)
    padded = np.pad(image, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)))
    crop = padded[BORDER + top : BORDER + top + height, BORDER + left : BORDER + left + width]
    if flip:
        crop = crop[:, ::-1]
    mean, std = np.float32(transform.mean), np.float32(transform.std)
    return ((crop.astype(np.float32) / np.float32(255) - mean) / std).transpose(2, 0, 1)


def check(batch, ids, boxes, flips, split, transform):
    assert batch.ids.tolist() == list(ids)
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == split.labels[ids].tolist()
    expected = np.stack(
        [reference(split.images[i], *rest, transform) for i, *rest in zip(ids, boxes, flips, strict=True)]
    )
    assert batch.images.dtype == torch.float32
    found = np.ascontiguousarray(batch.images.cpu().numpy())
    np.testing.assert_array_equal(found.view(np.int32), expected.astype(np.float32).copy().view(np.int32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "resident"])
def test_training_batches_equal_numpy_bit_for_bit_in_the_order_of_the_plan(split, backend, device):
    plan = training_plan(np.arange(COUNT), Key(7, 1), TRANSFORM, batch_size=11)
    assert plan.flips.any()
    assert not plan.flips.all()
    assert plan.boxes[:, :2].min() < 0 < plan.boxes[:, :2].max()
    batches = list(make_loader(split, backend, TRANSFORM, device).batches(plan))
    assert [len(batch.ids) for batch in batches] == [11, 12]  # the rest of one joins the batch before it
    start = 0
    for batch in batches:
        part = slice(start, start + len(batch.ids))
        check(batch, plan.ids[part], plan.boxes[part], plan.flips[part], split, TRANSFORM)
        start = part.stop


@pytest.mark.parametrize("device", DEVICES)
def test_test_time_batches_are_the_whole_images_in_the_order_given(split, device):
    ids = np.array([5, 5, 22, 0, 1])
    plan = sequential_plan(ids, TRANSFORM, batch_size=3)
    batches = list(make_loader(split, "auto", TRANSFORM, device).batches(plan))
    assert [len(batch.ids) for batch in batches] == [3, 2]
    whole = [(0, 0, HEIGHT, WIDTH)] * 3
    check(batches[0], ids[:3], whole, [False] * 3, split, TRANSFORM)
    check(batches[1], ids[3:], whole[:2], [False] * 2, split, TRANSFORM)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "corner", [(0, 0), (-HEIGHT, 0), (0, WIDTH), (-2, -3), (3, 4), (-1, 2), (2, -1), (HEIGHT + 2, WIDTH + 2), (-9, -11)]
)
def test_outside_the_image_is_black_before_normalisation(split, corner, flip):
    box = np.array([[*corner, HEIGHT, WIDTH]], dtype=np.int32)
    plan = EpochPlan(np.array([4]), box, np.array([flip]), batch_size=2)
    (batch,) = make_loader(split, "auto", TRANSFORM, "cpu").batches(plan)
    check(batch, [4], box, [flip], split, TRANSFORM)


@pytest.mark.parametrize("size", [(4, 5), (8, 12)])
def test_the_output_may_be_smaller_or_larger_than_the_images(split, size):
    transform = Transform(*size, pad=0, flip=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    boxes = np.array([[1, 2, *size], [-1, -2, *size]], dtype=np.int32)
    flips = np.array([True, False])
    plan = EpochPlan(np.array([3, 8]), boxes, flips, 2)
    (batch,) = make_loader(split, "auto", transform, "cpu").batches(plan)
    assert batch.images.shape == (2, 3, *size)
    check(batch, [3, 8], boxes, flips, split, transform)


def test_images_are_laid_out_channels_last(split):
    plan = training_plan(np.arange(8), Key(0, 0), TRANSFORM, batch_size=8)
    (batch,) = make_loader(split, "auto", TRANSFORM, "cpu").batches(plan)
    assert batch.images.shape == (8, 3, HEIGHT, WIDTH)
    assert batch.images.stride() == (HEIGHT * WIDTH * 3, 1, WIDTH * 3, 3)


@pytest.mark.parametrize("first", range(7))
def test_first_leaves_out_batches_and_changes_none(split, first):
    plan = training_plan(np.arange(COUNT), Key(1, 0), TRANSFORM, batch_size=5)
    loader = make_loader(split, "auto", TRANSFORM, "cpu")
    everything, rest = list(loader.batches(plan)), list(loader.batches(plan, first=first))
    assert len(everything) == 5
    assert len(rest) == max(0, 5 - first)
    for batch, expected in zip(rest, everything[first:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], expected[:3], strict=True))


def test_the_next_plan_may_name_any_other_ids(split):
    loader = make_loader(split, "auto", TRANSFORM, "cpu")
    for step, ids in enumerate((np.arange(6), np.arange(10, COUNT), np.array([22, 3, 3]))):
        plan = training_plan(ids, Key(0, step), TRANSFORM, batch_size=64)
        (batch,) = loader.batches(plan)
        assert sorted(batch.ids.tolist()) == sorted(ids.tolist())
        check(batch, plan.ids, plan.boxes, plan.flips, split, TRANSFORM)


def test_the_images_of_the_split_are_left_as_they_were(split):
    before = split.images.copy()
    plan = training_plan(np.arange(COUNT), Key(0, 0), TRANSFORM, batch_size=8)
    for batch in make_loader(split, "auto", TRANSFORM, "cpu").batches(plan):
        batch.images.zero_()
    np.testing.assert_array_equal(split.images, before)


def test_close_frees_the_images_and_a_closed_loader_says_so(split):
    loader = make_loader(split, "auto", TRANSFORM, "cpu")
    images = weakref.ref(loader.images)
    plan = sequential_plan(np.arange(3), TRANSFORM, 2)
    list(loader.batches(plan))
    loader.close()
    gc.collect()
    assert images() is None
    with pytest.raises(ValueError, match="closed"):
        next(iter(loader.batches(plan)))


@pytest.mark.parametrize("backend", ["ffcv-2", "Resident", ""])
def test_an_unknown_backend_is_the_users_mistake(split, backend):
    with pytest.raises(UserError, match=f"loader={backend}: .*resident"):
        make_loader(split, backend, TRANSFORM, "cpu")


@pytest.mark.parametrize("shape_and_type", [((4, 6, 9), np.uint8), ((4, 6, 9, 3), np.float32)])
def test_images_of_another_form_are_refused(shape_and_type):
    split = Split(np.zeros(*shape_and_type), np.zeros(4, dtype=np.int64))
    with pytest.raises(ValueError, match="uint8"):
        make_loader(split, "auto", TRANSFORM, "cpu")


def test_ranks_read_their_part_of_every_batch(split):
    loader = make_loader(split, "resident", TRANSFORM, "cpu")
    plan = training_plan(np.arange(COUNT), Key(7, 1), TRANSFORM, batch_size=8)  # 23: the last has 7, too few for 4
    of_ranks = [list(loader.batches(plan.of_rank(rank, 4))) for rank in range(4)]
    for batch, *shares in zip(loader.batches(plan), *of_ranks, strict=True):
        found = {int(i): image for share in shares for i, image in zip(share.ids, share.images, strict=True)}
        assert set(found) == set(batch.ids.tolist())
        assert all(torch.equal(found[int(i)], image) for i, image in zip(batch.ids, batch.images, strict=True))
