"""Inputs that failed when they were tried: each folder of ../shared/cases, through what its README says.

Two ways in that must agree are compared with each other; what is refused must name its fix.
"""

import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED

from fastil import losses
from fastil.data import Beton, DataConfig, load_dataset
from fastil.data.formats.detect import open_source
from fastil.errors import UserError
from fastil.kernels import incremental_loss
from fastil.recipe_file import load
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter
from fastil.training import estimate
from fastil.training.speed import Rates, Speeds

CASES = SHARED.parent / "cases"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Plans do not time the network."""
    monkeypatch.setattr(estimate, "speeds", lambda *_: Speeds(Rates(1.0, 1.0)))


def case(name):
    """The folder of a case. Skips, visibly, where there is none."""
    if not CASES.is_dir():
        pytest.skip("no ../shared/cases next to the repository")
    return CASES / name


def plan(recipe, *settings, data=None):
    return estimate.plan_text(load(recipe, settings, data=None if data is None else str(data)))


def converted(source, out, dry_run=False, **options):
    convert(source, out, options_of(workers=1, **options), Reporter(), dry_run)
    return out


def classes_of_steps(text):
    return re.findall(r"step \d+ adds  (.*)", text)


def base_zero(folder, tmp_path):
    with pytest.raises(UserError, match="from scratch is base_classes=1 increment=1"):
        plan("digits", "base_classes=0", "increment=1")
    assert len(classes_of_steps(plan("digits", "base_classes=1", "increment=1"))) == 10


def class_order_by_kind(folder, tmp_path):
    settings = ["size=16", f"order={list(range(12))}".replace(" ", ""), "base_classes=6", "increment=3"]
    names = [str(number) for number in range(12)]
    for kind in ("numeric-folder", "wds"):
        with Beton(converted(folder / kind, tmp_path / f"{kind}.beton")) as beton:
            assert beton.class_names == names
        for data in (folder / kind, tmp_path / f"{kind}.beton"):
            assert classes_of_steps(plan("folder", *settings, data=data)) == [
                "0, 1, 2, 3, 4, 5",
                "6, 7, 8",
                "9, 10, 11",
            ]


def convert_vs_run_readers(folder, tmp_path):
    """An image of 100 megapixels was refused by the one and read by the other."""
    config = DataConfig(dataset="folder", data=str(folder / "data"), size=16)
    with pytest.raises(UserError, match=r"big\.png .*max_pixels=") as of_run:
        load_dataset(config)
    with pytest.raises(UserError, match=r"big\.png .*max_pixels=") as of_convert:
        converted(folder / "data", tmp_path / "x.beton")
    assert str(of_run.value).count("/cat/") == str(of_convert.value).count("/cat/") == 1
    dataset = load_dataset(replace(config, on_corrupt="skip"))
    with Beton(converted(folder / "data", tmp_path / "x.beton", on_corrupt="skip")) as beton:
        assert len(beton) == len(dataset.train.labels) == 10
    said = []
    reporter = Reporter()
    reporter.say = lambda text, *_, **__: said.append(text)
    images = tmp_path / "float/train"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        (images / name / "f32.tif").symlink_to(folder / "float/f32.tif")
    convert(tmp_path / "float", tmp_path / "y.beton", options_of(workers=1), reporter, True)
    assert any("f32.tif" in text for text in said)


def exif_folder_vs_beton(folder, tmp_path):
    paths = folder / "data", converted(folder / "data", tmp_path / "x.beton")
    one, other = (load_dataset(DataConfig(dataset="folder", data=str(path), size=16)) for path in paths)
    difference = one.train.images.astype(int) - other.train.images
    assert np.abs(difference).max() <= 24  # a JPEG that was turned is encoded once more
    red = one.train.images[0, :, :, 0].astype(int)
    assert red[1, 8] > 150 > red[14, 8]  # on top


def flat_val(folder, tmp_path):
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv"):
        converted(folder / "flatval", tmp_path / "x.beton")
    source = open_source(folder / "kaggle")
    solution = (folder / "kaggle/LOC_val_solution.csv").read_text()
    assert source.class_names == ["n01440764", "n01443537"]
    for i in range(len(source.val)):
        name, wnid = Path(source.val.name(i)).stem, source.class_names[source.val.labels[i]]
        assert f"{name},{wnid} " in solution


def kernel_silent_no_gradient(folder, tmp_path):
    alpha = torch.tensor(1.0, requires_grad=True)
    logits, target = torch.randn(8, 4, requires_grad=True), torch.randint(0, 4, (8,))
    prior = losses.log_prior(torch.tensor([20.0, 20, 500, 500]), 2, alpha)
    with pytest.raises(RuntimeError, match="no derivative in log_prior, which requires a gradient"):
        incremental_loss(logits, target, prior, num_old=2, num_seen=4, ce_weight=1.0, kd_weight=0.0, temperature=2.0)


def order_by_name_message(folder, tmp_path):
    data = case("exif-folder-vs-beton") / "data"
    text = plan("folder", "order=[dog,cat]", "base_classes=1", "increment=1", data=data)
    assert classes_of_steps(text) == ["dog", "cat"]


def parquet_column_names(folder, tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r"--label-column"):
        converted(folder / "names2", tmp_path / "x.beton")
    for name, options in (
        ("names2", {"label_column": "target"}),
        ("names", {"image_column": "jpg", "label_column": "cls"}),
        ("str", {}),
    ):
        with Beton(converted(folder / name, tmp_path / f"{name}.beton", **options)) as beton:
            assert len(beton.class_names) >= 2


def subset_of_subset(folder, tmp_path):
    """Its 100 classes are no subset of ImageNet's: what is refused names the fix, which works."""
    data = converted(folder / "in100", tmp_path / "in100.beton")
    with pytest.raises(UserError, match="set subset=null"):
        plan("subimagenet_balanced_5", data=data)
    assert len(classes_of_steps(plan("subimagenet_balanced_5", "subset=null", data=data))) == 6


def tar_silent_loss(folder, tmp_path):
    with tarfile.open(folder / "lost.tar") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    told = []
    for path in (folder / "lost.tar", tmp_path / "unpacked"):
        try:
            told.append(list(open_source(path).notes))
        except UserError as error:
            told.append(str(error).replace(str(path), "").lstrip(":/ "))
    assert told[0] == told[1]
    assert "left out" in str(told[0])


def uneven_steps(folder, tmp_path):
    with pytest.raises(UserError, match=re.escape("or a list such as [4, 2]")):
        plan("digits", "base_classes=4", "increment=4")
    text = plan("digits", "base_classes=4", "increment=[4,2]")
    assert [len(step.split(", ")) for step in classes_of_steps(text)] == [4, 4, 2]


def wds_meta_member(folder, tmp_path):
    converted(folder / "wds_meta.tar", tmp_path / "x.beton", dry_run=True)
    with Beton(converted(folder / "wds_meta.tar", tmp_path / "x.beton")) as beton:
        assert len(beton) > 0


CHECKS = (
    base_zero, class_order_by_kind, convert_vs_run_readers, exif_folder_vs_beton, flat_val, kernel_silent_no_gradient,
    order_by_name_message, parquet_column_names, subset_of_subset, tar_silent_loss, uneven_steps, wds_meta_member,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_failed_once(check, tmp_path):
    check(case(check.__name__.replace("_", "-")), tmp_path)


def test_every_case_has_a_check():
    case("")
    assert {path.name for path in Path(CASES).iterdir()} == {check.__name__.replace("_", "-") for check in CHECKS}
