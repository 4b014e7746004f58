"""The benches at ImageNet's size: the images they make, and how they measure memory."""

import sys

import numpy as np
import pytest
from PIL import Image

from bench.imagenet_shape import GREY, TEST, TRAIN, make_images
from bench.imagenet_size import measured
from fastil.data.published import table


def test_every_class_of_imagenet_gets_images_of_its_own(tmp_path):
    random = np.random.default_rng(0)
    for i, size in enumerate([(31, 47), (40, 33)]):
        path = tmp_path / f"photos/class{i}/{i}.JPEG"
        path.parent.mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    make_images(tmp_path / "photos", tmp_path / "images")
    names = set(table()["imagenet"].class_names)
    found = {split: sorted((tmp_path / "images" / split).rglob("*.JPEG")) for split in ("train", "val")}
    for split, count in (("train", TRAIN), ("val", TEST)):
        assert len(found[split]) == 1000 * count
        assert {path.parent.name for path in found[split]} == names
    contents = {name: set() for name in names}
    for path in found["train"]:
        contents[path.parent.name].add(path.read_bytes())
    assert all(len(different) > 1 for different in contents.values())
    modes = [Image.open(path).mode for path in found["train"]]
    assert modes.count("L") == len(modes) / GREY
    assert set(modes) == {"L", "RGB"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_work_is_its_peak_and_each_work_begins_without_the_memory_of_others():
    def holds(mebibytes):
        return lambda: np.ones((mebibytes, 2**20), dtype=np.uint8).sum()

    for mebibytes in (96, 8, 48):
        assert mebibytes <= measured(holds(mebibytes))[2] < mebibytes + 8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_work_that_fails_ends_the_bench():
    with pytest.raises(SystemExit, match="failed"):
        measured(lambda: 1 / 0)
