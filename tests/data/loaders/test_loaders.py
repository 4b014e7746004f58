"""The loaders that stream, against Pillow and against one another: the same plan, the same batches."""

import gc
import io
import itertools
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import encoded
from PIL import Image

from fastil import kernels
from fastil.data import Split, make_loader
from fastil.data.formats import beton as beton_format
from fastil.data.formats.beton import Beton
from fastil.data.loaders import choose as choose_module
from fastil.data.loaders.choose import check_resident, choose, installed, read_rate, sample
from fastil.data.loaders.threads import TOGETHER, Threads
from fastil.errors import UserError
from fastil.plan import Key, Transform, sequential_plan, training_plan
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

SIDE, COUNT = 32, 29
STATS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RESIZED = Transform(SIDE, SIDE, 0, True, **STATS, resized=True)
CENTRAL = Transform(SIDE, SIDE - 4, 0, False, **STATS, resize=37)
PADDED = Transform(40, 40, 4, True, **STATS)
FFCV = pytest.param("ffcv", marks=pytest.mark.skipif(not installed("ffcv"), reason="FFCV is not installed"))
DALI = pytest.param("dali", marks=pytest.mark.skipif(not installed("nvidia.dali"), reason="DALI is not installed"))
BACKENDS = ["reference", "threads", FFCV, DALI]
# Largest and mean difference from Pillow's frames, of 255. FFCV's fast inverse transform and INTER_AREA, which does not
# smooth where one side grows, differ most at sharp edges.
BOUNDS = {"reference": (0, 0.0), "threads": (2, 0.1), "dali": (16, 0.6), "ffcv": (255, 4.0)}


def photo(height, width, seed):
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 32
    waves = [np.sin(x * a + y * b + c) for a, b, c in random.uniform(-2, 2, (3, 3))]
    pixels = 128 + 60 * np.stack(waves, axis=-1) + random.normal(0, 2, (height, width, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def sizes_of(kind):
    random = np.random.default_rng(1)
    return [(40, 40)] * COUNT if kind == "equal" else [tuple(random.integers(33, 90, 2)) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A .beton by mode and kind of sizes."""
    made = {}
    for kind in ("equal", "different"):
        folder = tmp_path_factory.mktemp(kind)
        for i, size in enumerate(sizes_of(kind)):
            path = folder / f"in/train/class{i % 3}/{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(photo(*size, i), quality=90))
        for mode in ("jpeg", "raw"):
            options = options_of(mode=mode, workers=1)
            convert(folder / "in", folder / f"{mode}.beton", options, Reporter())
            made[mode, kind] = folder / f"{mode}.beton"
    return made


@pytest.fixture
def opened(files):
    """Loaders that are closed after the test, by mode, kind and backend."""
    loaders = []

    def open_loader(mode, kind, backend, transform):
        loaders.append(make_loader(Beton(files[mode, kind]), backend, transform, "cpu"))
        return loaders[-1]

    yield open_loader
    for loader in loaders:
        loader.close()


def frames_of(loader, plan, first=0):
    return torch.cat([frames.clone() for frames in loader.pixels(plan, first)]).numpy()


# Order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [2, 7, 14, 28, 100])
def test_batches_are_those_of_the_plan_over_epochs_and_after_a_resume(opened, backend, batch_size):
    loader = opened("jpeg", "different", backend, RESIZED)
    labels = loader.labels.numpy()
    ids = np.concatenate([np.arange(COUNT), [3, 3, 5, 0]])  # some are visited more often
    for epoch in range(3):
        plan = training_plan(ids, Key(1, 0, "train", epoch), RESIZED, batch_size, loader.sizes)
        parts = list(plan.batches())
        for first in (0, len(parts) // 2, len(parts)):
            batches = list(loader.batches(plan, first))
            assert [batch.ids.tolist() for batch in batches] == [plan.ids[part].tolist() for part in parts[first:]]
            assert [batch.labels.tolist() for batch in batches] == [
                labels[plan.ids[part]].tolist() for part in parts[first:]
            ]
            assert all(batch.images.shape == (len(batch.ids), 3, SIDE, SIDE) for batch in batches)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_what_ranks_read_are_the_parts_of_the_whole_batch_by_batch(opened, backend, ranks):
    loader = opened("jpeg", "different", backend, RESIZED)
    for epoch in range(3):
        plan = training_plan(np.arange(COUNT), Key(2, 1, "train", epoch), RESIZED, 5, loader.sizes)  # the last has 4
        for first in (0, 3):
            of_ranks = [list(loader.batches(plan.of_rank(rank, ranks), first)) for rank in range(ranks)]
            for batch, *shares in zip(loader.batches(plan, first), *of_ranks, strict=True):
                for rank, share in enumerate(shares):
                    part = slice(None) if len(batch.ids) < 2 * ranks else slice(rank, None, ranks)
                    assert share.ids.tolist() == batch.ids[part].tolist()
                    assert share.labels.tolist() == batch.labels[part].tolist()
                    assert torch.equal(share.images, batch.images[part])


# Pixels


def by_hand(image, box, transform):
    """A frame by Pillow's crop and resize, step by step."""
    top, left, height, width = (int(side) for side in box)
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    if transform.resize is not None:
        short = min(part.size)
        part = part.resize([int(transform.resize * side / short) for side in part.size], Image.Resampling.BILINEAR)
        left, top = round((part.width - transform.width) / 2), round((part.height - transform.height) / 2)
        part = part.crop((left, top, left + transform.width, top + transform.height))
    elif part.size != (transform.width, transform.height):
        part = part.resize((transform.width, transform.height), Image.Resampling.BILINEAR)
    return np.asarray(part)


def plans(loader):
    transform = loader.transform
    if transform.resize is None:
        return training_plan(np.arange(COUNT), Key(3, 0), transform, 8, loader.sizes)
    return sequential_plan(np.arange(COUNT), transform, 8, sizes=loader.sizes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mode", "kind", "transform"),
    [
        ("raw", "equal", PADDED), ("jpeg", "equal", PADDED), ("raw", "different", RESIZED),
        ("jpeg", "different", RESIZED), ("raw", "different", CENTRAL), ("jpeg", "different", CENTRAL),
    ],
)  # fmt: skip
def test_frames_are_pillows_within_the_bounds(opened, files, backend, mode, kind, transform):
    loader = opened(mode, kind, backend, transform)
    plan = plans(loader)
    with Beton(files[mode, kind]) as beton:
        expected = np.stack(
            [by_hand(beton.image(int(i)), box, transform) for i, box in zip(plan.ids, plan.boxes, strict=True)]
        )
    difference = np.abs(frames_of(loader, plan).astype(np.int64) - expected)
    largest, mean = BOUNDS[backend]
    exact = transform is PADDED and (mode == "raw" or backend != "ffcv")  # neither resized nor decoded another way
    assert difference.max() <= (0 if exact else largest)
    assert difference.mean() <= (0 if exact else mean)


@pytest.mark.parametrize("backend", ["reference", "threads"])
def test_batches_are_mirrored_and_normalised_frames(opened, backend):
    loader = opened("jpeg", "different", backend, RESIZED)
    plan = training_plan(np.arange(COUNT), Key(4, 0), RESIZED, 8, loader.sizes)
    assert plan.flips.any()
    frames = frames_of(loader, plan).astype(np.float64)
    frames[plan.flips] = frames[plan.flips, :, ::-1]
    expected = (frames / 255 - np.array(STATS["mean"])) / np.array(STATS["std"])
    found = torch.cat([batch.images for batch in loader.batches(plan)])
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_in_memory_is_streamed_as_a_file_is(backend):
    images = np.stack([photo(40, 40, i) for i in range(9)])
    split = Split(images, np.arange(9) % 2)
    plan = training_plan(np.arange(9), Key(5, 0), PADDED, 4)
    expected = [batch.images for batch in make_loader(split, "resident", PADDED, "cpu").batches(plan)]
    loader = make_loader(split, backend, PADDED, "cpu")
    for found, wanted in zip(loader.batches(plan), expected, strict=True):
        assert torch.equal(found.images, wanted)
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["jpeg", "raw"])
def test_an_overlay_is_what_is_seen_of_its_images(opened, backend, mode):
    loader = opened(mode, "different", backend, RESIZED)
    new = photo(SIDE, SIDE, 99)
    loader.overlay(torch.tensor([4, 7]), torch.from_numpy(np.stack([new, 255 - new])))
    assert loader.sizes[[4, 7]].tolist() == [[SIDE, SIDE]] * 2
    plan = sequential_plan(np.arange(COUNT), RESIZED, 6, sizes=loader.sizes)
    found = frames_of(loader, plan)
    np.testing.assert_array_equal(found[4], new)
    np.testing.assert_array_equal(found[7], 255 - new)
    assert np.abs(found[5].astype(int) - new).mean() > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overlay_of_frames_stays_as_it_is(opened, backend):
    """Learned exemplars are frames; where others are resized and cut, they are not."""
    loader = opened("jpeg", "different", backend, CENTRAL)
    ids = np.array([3, 8])
    before = loader.whole(ids)
    pixels = (before * loader.std[:, None, None] + loader.mean[:, None, None]) * 255
    pixels = pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    given = pixels.clone()
    loader.overlay(torch.from_numpy(ids), given)
    given.zero_()  # it is a copy that is shown
    assert torch.equal(loader.whole(ids), before)
    mixed = frames_of(loader, sequential_plan(np.arange(COUNT), CENTRAL, 6, sizes=loader.sizes))
    np.testing.assert_array_equal(mixed[ids], pixels.numpy())


# Images that are held on the device


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
@pytest.mark.parametrize("transform", [RESIZED, CENTRAL])
@pytest.mark.parametrize("backend", ["reference", "threads", FFCV])
def test_held_images_look_as_before_and_are_not_read(opened, backend, mode, transform, monkeypatch):
    check_held(opened(mode, "different", backend, transform), 0, monkeypatch)


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
@pytest.mark.parametrize("transform", [RESIZED, CENTRAL])
@pytest.mark.parametrize("backend", ["reference", "threads", DALI])
def test_so_they_do_where_they_are_made_frames_apart_from_the_rest(opened, backend, mode, transform, monkeypatch):
    """As on a GPU, and always by DALI; they are what `threads` would make of them, which resizes bytes, to within 1."""
    loader = opened(mode, "different", backend, transform)
    loader.reads_held = False
    bounds = {"threads": 1, "reference": BOUNDS["threads"][0], "dali": BOUNDS["dali"][0]}
    check_held(loader, bounds[backend], monkeypatch)


def check_held(loader, largest, monkeypatch):
    plan = plans(loader)
    before = frames_of(loader, plan)
    batches = [batch.tolist() for batch in (plan.ids[part] for part in plan.batches())]
    held = [*batches[1], *batches[0][::2], batches[2][-1]]  # a batch whole, a batch in part, a batch but for its last
    loader.keep(np.array(held))
    stored = loader.stored

    def only_others(i):
        assert i not in held
        return stored(i)

    monkeypatch.setattr(loader, "stored", only_others)
    difference = np.abs(frames_of(loader, plan).astype(np.int64) - before)
    same = np.isin(plan.ids, held, invert=True)
    assert difference[same].max() == 0
    assert difference.max() <= largest
    again = frames_of(loader, plan, first=1)
    np.testing.assert_array_equal(again, frames_of(loader, plan)[list(plan.batches())[1].start :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_more_is_held_than_was_asked_for(opened, backend, monkeypatch):
    loader = opened("jpeg", "different", backend, RESIZED)
    decoded, decode = [], loader.decoded
    monkeypatch.setattr(loader, "decoded", lambda i: decoded.append(i) or decode(i))
    new = photo(SIDE, SIDE, 99)
    loader.overlay(torch.tensor([4]), torch.from_numpy(new[None]))
    for ids, read in (([1, 2, 4], [1, 2]), ([2, 3], [3]), ([], [])):
        decoded.clear()
        loader.keep(np.array(ids, dtype=np.int64))
        assert sorted(decoded) == read
        assert loader.held.ids.tolist() == sorted({*ids, 4})  # an overlay stays: its pixels are nowhere else
    np.testing.assert_array_equal(loader.held.image(4, loader.sizes[4]).numpy(), new)


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_held_images_must_not_be_made_otherwise_than_the_rest(files, backend):
    with Beton(files["jpeg", "different"]) as beton:
        check_resident(beton, 10, backend, torch.device("cpu"))
        with pytest.raises(UserError, match=rf"memory=resident: .* loader={backend} .* use loader=threads"):
            check_resident(beton, 10, backend, torch.device("cuda"))


@pytest.mark.parametrize("transform", [RESIZED, CENTRAL])
def test_the_frames_of_a_batch_are_made_by_one_launch(opened, transform, monkeypatch):
    """On a GPU, where they are many: overlays and exemplars of all sizes together, and none in batches without any."""
    loader = opened("jpeg", "different", "threads", transform)
    plan = plans(loader)
    batches = [plan.ids[part] for part in plan.batches()]
    loader.keep(np.concatenate(batches[1:]))
    ids = torch.from_numpy(batches[1][:2])
    loader.overlay(ids, torch.stack([torch.from_numpy(photo(transform.height, transform.width, 9))] * 2))
    plan = plans(loader)  # boxes of replaced images are others
    read = frames_of(loader, plan)
    loader.reads_held = False
    launches, launch = [], kernels.crop_resize
    monkeypatch.setattr(kernels, "crop_resize", lambda *a: launches.append(len(a[1])) or launch(*a))
    made = frames_of(loader, plan)
    held = np.isin(plan.ids, loader.held.ids)
    assert launches == [held[part].sum() for part in plan.batches() if held[part].any()]
    assert np.abs(made.astype(int) - read).max() <= 1
    if transform is CENTRAL:  # overlays are shown as they are
        np.testing.assert_array_equal(made[np.isin(plan.ids, ids)], read[np.isin(plan.ids, ids)])


def test_an_overlay_of_what_is_held_takes_its_place(opened):
    loader = opened("jpeg", "different", "threads", PADDED)
    loader.keep(np.array([2, 4, 9]))
    before = {i: loader.held.image(i, loader.sizes[i]).clone() for i in (2, 9)}
    for turn in range(2):
        new = torch.from_numpy(np.stack([photo(SIDE + turn, SIDE, 90 + turn)] * 2))
        loader.overlay(torch.tensor([7, 4]), new)
        assert loader.held.ids.tolist() == [2, 4, 7, 9]
        assert loader.held.pixels.numel() == sum(3 * int(loader.sizes[i].prod()) for i in (2, 4, 7, 9))
        for i, wanted in {**before, 4: new[1], 7: new[0]}.items():
            assert torch.equal(loader.held.image(i, loader.sizes[i]), wanted)


# What can go wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_does_not_decode_is_named_at_once_and_the_loader_goes_on(files, tmp_path, backend):
    content = bytearray(files["jpeg", "different"].read_bytes())
    with Beton(files["jpeg", "different"]) as beton:
        start, length = int(beton.starts[11]), int(beton.lengths[11])
    content[start : start + length] = bytes(length)
    path = tmp_path / "x.beton"
    path.write_bytes(content)
    loader = make_loader(Beton(path), backend, RESIZED, "cpu")
    plan = training_plan(np.arange(COUNT), Key(6, 0), RESIZED, 4, loader.sizes)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"x\.beton: sample 11 does not decode"):
        list(loader.batches(plan))
    assert time.monotonic() - began < 5
    others = training_plan(np.setdiff1d(np.arange(COUNT), 11), Key(6, 0), RESIZED, 4, loader.sizes)
    assert sum(len(batch.ids) for batch in loader.batches(others)) == COUNT - 1
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(40, 80), (80, 40), (20, 20), (90, 90)])
def test_an_image_of_another_size_than_its_row_is_named(files, tmp_path, backend, size):
    with Beton(files["jpeg", "different"]) as beton:
        contents = [beton.encoded(i) for i in range(COUNT)]
        entries = np.zeros(COUNT, beton_format.ENTRY)
        entries["height"], entries["width"], entries["label"] = *beton.sizes.T, beton.labels
    entries["height"][11], entries["width"][11] = size
    page = beton_format.PAGE
    position = beton_format.data_start(COUNT, page)
    with open(tmp_path / "x.beton", "w+b") as file:
        for i, content in enumerate(contents):
            entries["ptr"][i], entries["size"][i] = position, len(content)
            file.seek(position)
            file.write(content)
            position += len(content)
        front = beton_format.front(entries, beton_format.JPEG, page, beton_format.data_start(COUNT, page))
        beton_format.write_tables(file, entries, front, page)
        beton_format.write_header(file, front)
    loader = make_loader(Beton(tmp_path / "x.beton"), backend, RESIZED, "cpu")
    plan = training_plan(np.arange(COUNT), Key(6, 0), RESIZED, 4, loader.sizes)
    with pytest.raises(UserError, match=rf"sample 11 has \d+x\d+ pixels, its row says {size[0]}x{size[1]}"):
        list(loader.batches(plan))
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_that_is_fetched_ahead_of_an_early_end_is_nobodys(files, tmp_path, backend):
    content = bytearray(files["jpeg", "different"].read_bytes())
    with Beton(files["jpeg", "different"]) as beton:
        start, length = int(beton.starts[11]), int(beton.lengths[11])
    content[start + length // 2 : start + length] = bytes(length - length // 2)
    (tmp_path / "x.beton").write_bytes(content)
    loader = make_loader(Beton(tmp_path / "x.beton"), backend, RESIZED, "cpu")
    plan = sequential_plan(np.arange(COUNT), RESIZED, 6, sizes=loader.sizes)  # 11 is in the second batch
    for _ in range(3):
        batches = loader.batches(plan)
        next(batches)
        batches.close()
    loader.close()


def native_threads():
    """Without those that are just ending, which a join does not wait for."""
    counts = []
    for _ in range(10):
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.02)
    return min(counts)


def resident_kilobytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_ids_and_early_ends_leave_no_thread_no_file_and_no_memory(opened, backend):
    loader = opened("jpeg", "different", backend, RESIZED)
    random, held = np.random.default_rng(0), []
    for turn in range(60):
        ids = random.choice(COUNT, 7 + turn % 20, replace=False)
        plan = training_plan(ids, Key(7, turn), RESIZED, 6, loader.sizes)
        batches = loader.batches(plan)
        assert next(batches).ids.tolist() == plan.ids[next(plan.batches())].tolist()
        batches.close()
        if turn >= 10:
            held.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), resident_kilobytes()))
    first, last = np.array(held[:5]).max(axis=0), np.array(held[-5:]).min(axis=0)
    assert last[0] <= first[0]
    assert last[1] <= first[1]
    assert last[2] < first[2] + 20_000


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_loader_has_no_threads_and_says_so(files, backend):
    before = None
    gc.disable()
    try:
        for turn in range(6):
            with Beton(files["jpeg", "different"]) as beton:  # which no view may outlive
                loader = make_loader(beton, backend, RESIZED, "cpu")
                plan = training_plan(np.arange(COUNT), Key(8, 0), RESIZED, 6, loader.sizes)
                batches = loader.batches(plan)
                next(batches)
                batches.close()
                loader.close()
                with pytest.raises(ValueError, match="closed"):
                    next(iter(loader.batches(plan)))
            if turn == 2:
                before = native_threads()
        assert native_threads() <= before
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_plans_may_be_read_in_turns(opened, backend):
    """As Meta does, whose held-out images come between those of training."""
    loader = opened("jpeg", "different", backend, RESIZED)
    one, two = (training_plan(np.arange(COUNT), Key(9, step), RESIZED, 4, loader.sizes) for step in (0, 1))
    expected = [list(loader.batches(plan)) for plan in (one, two)]
    for _ in range(2):
        for pair in zip(*(loader.batches(plan) for plan in (one, two)), *expected, strict=True):
            assert torch.equal(pair[0].images, pair[2].images)
            assert torch.equal(pair[1].images, pair[3].images)


def test_a_loader_that_cannot_be_had_says_what_to_do(files, monkeypatch):
    beton = Beton(files["jpeg", "equal"])
    with pytest.raises(UserError, match="loader=turbo: unknown; use one of auto, resident, threads"):
        make_loader(beton, "turbo", RESIZED, "cpu")
    with pytest.raises(UserError, match=r"loader=resident: a \.beton is streamed"):
        make_loader(beton, "resident", RESIZED, "cpu")
    monkeypatch.setattr("fastil.data.loaders.choose.installed", lambda module: False)
    with pytest.raises(UserError, match="DALI is not installed; pip install"):
        make_loader(beton, "dali", RESIZED, "cpu")


def test_the_pool_resizes_by_one_thread_each_and_leaves_the_others_alone(files):
    """In a process of its own, whose main thread has not asked for its number yet."""
    code = f"""
import numpy, torch
from fastil.data import make_loader
from fastil.data.formats.beton import Beton
from fastil.plan import Transform, sequential_plan
transform = Transform(32, 32, 0, False, (0.5,) * 3, (0.5,) * 3, resized=True)
loader = make_loader(Beton({str(files["jpeg", "different"])!r}), "threads", transform, "cpu")
list(loader.pixels(sequential_plan(numpy.arange({COUNT}), transform, 8, sizes=loader.sizes)))
print(loader.pool.submit(torch.get_num_threads).result(), torch.get_num_threads())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    alone, process = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        for code in ("import torch; print(torch.get_num_threads())", code)
    )
    assert process.stdout.split() == ["1", *alone.stdout.split()], process.stderr


def test_the_work_of_the_pool_is_a_mean_over_its_threads(files, monkeypatch):
    """Each task looks at its clock when it begins and when it ends, a quarter of a second apart."""
    clock = iter(np.arange(0, 10_000, 0.25).tolist())
    loader = Threads(Beton(files["jpeg", "different"]), RESIZED, torch.device("cpu"), workers=1)
    loader.workers = 4  # one works, so that nobody else looks at the clock in between
    monkeypatch.setattr("fastil.data.loaders.threads.time.perf_counter", lambda: next(clock))
    for epoch in range(3):
        list(loader.pixels(training_plan(np.arange(COUNT), Key(6, epoch), RESIZED, 10, loader.sizes)))
        tasks = sum(-(-size // TOGETHER) for size in (10, 10, 9))
        assert loader.worked == (epoch + 1) * tasks * 0.25 / 4
    loader.close()
    assert make_loader(Split(np.zeros((2, 40, 40, 3), np.uint8), np.zeros(2)), "auto", PADDED, "cpu").worked is None


def test_what_is_decoded_is_what_the_bytes_say(opened, files):
    """Accurate to the bit, whatever the sizes."""
    loader = opened("jpeg", "different", "threads", RESIZED)
    with Beton(files["jpeg", "different"]) as beton:
        for i in range(COUNT):
            expected = np.asarray(Image.open(io.BytesIO(beton.encoded(i))))
            np.testing.assert_array_equal(loader.decode(i, beton.view(i)).reshape(expected.shape), expected)


# Which loader


@pytest.mark.parametrize(
    ("device", "mode", "read", "dali", "name", "why"),
    [
        ("cpu", "jpeg", 10.0, True, "threads", "on a CPU"),
        (
            "cuda",
            "jpeg",
            900.0,
            True,
            "dali",
            "3 cores read about 900 images/s, and the GPU trains on about 1,000: it dec",
        ),
        ("cuda", "jpeg", 900.0, False, "threads", "about 900 .* 1,000: .* pip install nvidia-dali-cuda130"),
        ("cuda", "jpeg", 1000.0, True, "threads", "3 cores read about 1,000 images/s, .* trains on about 1,000$"),
        ("cuda", "raw", 10.0, True, "threads", "pixels are stored"),
        ("cuda", "mixed test images", 10.0, True, "threads", "pixels are stored"),
        ("cuda", "jpeg, exemplars held", 10.0, True, "threads", "exemplars are held decoded"),
    ],
)
def test_auto_goes_by_what_the_cores_read_and_what_the_gpu_trains_on(
    files, monkeypatch, device, mode, read, dali, name, why
):
    timed = []
    monkeypatch.setattr("fastil.machine.cores", lambda: 3)
    monkeypatch.setattr(choose_module, "installed", lambda module: dali)
    monkeypatch.setattr(choose_module, "read_rate", lambda jpegs, size: timed.append((len(jpegs), size)) or read)
    mode, held = mode.removesuffix(", exemplars held"), mode.endswith("held")
    kinds = ("jpeg", "raw") if mode == "mixed test images" else (mode, mode)
    train, val = (Beton(files[kind, "different"]) for kind in kinds)
    chosen, reason = choose(train, val, torch.device(device), (40, 50), lambda: timed.append("step") or 1000.0, held)
    assert chosen == name
    assert re.search(why, reason)
    assert timed == ([(COUNT, (40, 50)), "step"] if "about" in reason else [])  # only where that decides


@pytest.mark.parametrize("damaged", [0, 3])
def test_what_cores_read_is_what_one_reads_in_its_own_time(files, monkeypatch, damaged):
    """Each look at its clock is half a second after the last. Damage is the loader's to tell."""
    decoded, decode, clock = [], simplejpeg.decode_jpeg, itertools.count(0, 0.5)
    monkeypatch.setattr("fastil.machine.cores", lambda: 3)
    monkeypatch.setattr(choose_module.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda jpeg: decoded.append((torch.get_num_threads(), len(jpeg))) or decode(jpeg)
    )
    threads = torch.get_num_threads()
    with Beton(files["jpeg", "different"]) as beton:
        jpegs = [*sample(beton)[:10], *[b"none"] * damaged]
        assert read_rate(jpegs, (32, 32)) == 3 * len(jpegs) / 0.5
        assert decoded == [(1, len(jpeg)) for jpeg in jpegs] * 3
        assert torch.get_num_threads() == threads
        jpegs.clear()


def test_a_loader_for_a_loop_of_ones_own_needs_no_measurement(files, monkeypatch):
    monkeypatch.setattr(choose_module, "read_rate", None)
    assert make_loader(Beton(files["jpeg", "different"]), "auto", RESIZED, "cpu").name == "threads"
    assert make_loader(Split(np.zeros((2, 40, 40, 3), np.uint8), np.zeros(2)), "auto", PADDED, "cpu").name == "resident"
