"""Where a published number may stand, and small real runs on one data set in four containers."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import yaml
from conftest import SHARED

from fastil import cli
from fastil.data import published
from fastil.data.formats import in_memory
from fastil.data.formats.detect import open_source
from fastil.data.formats.identity import Identity
from fastil.data.formats.records import canonical
from fastil.evaluation import StepResult
from fastil.recipe_file import load, read_effective
from fastil.reporting import report
from fastil.reporting.fidelity import labelled, opening
from fastil.reporting.rows import rows
from fastil.reporting.run_files import ProtocolFile, Results
from fastil.reporting.runs import Run
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

CIFAR100 = SHARED / "cifar100-png.tar"


def protocol(dataset="cifar100", **other):
    """The protocol of a run on the images published under this name."""
    expected = published.table()[dataset]
    splits = {
        split: {"sha256": "", "images": part.images, "identity": part.identity} | other.get(split, {})
        for split, part in (("train", expected.train), ("val", expected.val))
    }
    names = other.get("class_names", expected.class_names)
    dataset = {"name": dataset, "read_by": other.get("read_by", [])} | splits
    trained = {key: other[key] for key in ("bn", "ranks") if key in other}
    return ProtocolFile(class_order=[], class_names=names, steps=[[]], dataset=dataset, **trained)


# Which recipe a run directory shows


@pytest.mark.parametrize(
    "overrides",
    [[], ["seed=3"], ["device=cpu", "compile=false"], ["precision=bf16"], ["loader=resident"], ["on_corrupt=skip"]],
)
def test_an_unchanged_recipe_on_the_published_images_keeps_its_number(overrides):
    shown = labelled(load("cifar100_balanced_5", overrides), protocol())
    assert (shown.published, shown.fidelity) == (62.22, load("cifar100_balanced_5").fidelity)


@pytest.mark.parametrize(
    ("overrides", "described", "changes"),
    [
        (["model=resnet8", "epochs=6"], {}, ["epochs=6", "model=resnet8"]),
        (["loss=softmax"], {}, ["loss=softmax"]),
        (["schedule=cosine"], {}, ["schedule=cosine"]),  # the milestones are not read any more, which says nothing new
        (["method=lucir", "head=cosine", "last_relu=false"], {}, ["head=cosine", "last_relu=false", "method=lucir"]),
        (["flip=false", "milestones=[0.5]"], {}, ["flip=false", "milestones=[0.5]"]),
        ([], {"train": {"identity": "pixels:0"}}, ["other data"]),
        ([], {"val": {"identity": "pixels:0"}}, ["other data"]),
        ([], {"class_names": [f"class {i}" for i in range(100)]}, ["other data"]),
        ([], {"train": {"identity": None}}, ["unidentified data"]),  # a run from before identities
        (["epochs=6", "verify=false"], {"train": {"identity": "pixels:0"}}, ["epochs=6", "other data"]),
    ],
)
def test_anything_else_is_labelled_with_what_was_modified(overrides, described, changes):
    shown = labelled(load("cifar100_balanced_5", overrides), protocol(**described))
    assert shown.published is None
    head, _, listed = shown.fidelity.partition(": ")
    assert (head, listed.split(", ")) == ("modified", changes)


def test_no_edited_file_lets_a_number_slip_through(tmp_path):
    changed = load("cifar100_balanced_5", ["epochs=6"])
    assert "published: 62.22" in changed.dump()  # as older versions wrote it for every run
    (tmp_path / "recipe.yaml").write_text(changed.dump())
    assert labelled(read_effective(tmp_path / "recipe.yaml"), protocol()).published is None
    (tmp_path / "recipe.yaml").write_text(load("cifar100_balanced_5").dump().replace("62.22", "99.9"))
    assert labelled(read_effective(tmp_path / "recipe.yaml"), protocol()).published == 62.22
    (tmp_path / "mine.yaml").write_text("base: cifar100_balanced_5\npublished: 99.9\n")
    shown = labelled(load(str(tmp_path / "mine.yaml")), protocol())
    assert shown.published is None
    assert shown.fidelity.startswith("modified: ")


def run_of(steps, seed):
    """A run of the published recipe on the published images, with so many of six steps finished."""
    run = Run.__new__(Run)
    run.recipe = labelled(load("cifar100_balanced_5"), protocol())
    run.protocol = protocol().model_copy(update={"steps": [[0]] * 6})
    results = [StepResult(k, 10, 60.0, 60.0, None if k == 0 else 60.0, 60.0, None, None) for k in range(steps)]
    run.results = Results(
        recipe="", method="", loss="balanced", seed=seed, steps=results, average_incremental_accuracy=60.0,
        final_top1=60.0,
    )  # fmt: skip
    return run


@pytest.mark.parametrize("steps", [(6, 6), (6, 4), (1,)])
def test_the_average_of_fewer_steps_has_no_number_beside_it(steps):
    header, ((*cells,),) = rows({"label": [run_of(count, seed) for seed, count in enumerate(steps)]})
    assert cells[header.index("paper")] == ("62.22" if set(steps) == {6} else "")


# The sizes of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, less what tar adds: a header of 512 bytes and half a
# block of padding per image; for training images also an archive per class, which ends with up to 10 KiB of zeros.
TRAIN_BYTES = 147_897_477_120 - 1_281_167 * 768 - 1000 * 5_600
VAL_BYTES = 6_744_924_160 - 50_000 * 768
WNIDS = list(published.table()["imagenet"].class_names)
COUNTS = [1300] * 900 + [1111] * 99 + [1281167 - 900 * 1300 - 99 * 1111]  # in all as many as ImageNet has


def streamed(names, *splits):
    """A data set of files of which checksums alone are known."""
    parts = []
    for split in splits:
        counts = tuple(split["counts"] or COUNTS)
        kind = (split["identity"] or "").partition(":")[0]
        parts.append(SimpleNamespace(identity=Identity(kind, (), counts, ("",) * len(counts)) if kind else None))
    return SimpleNamespace(name="x", class_names=names, train=parts[0], val=parts[1], proven=False)


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True), ({"identity": "changed:1"}, False), ({"identity": None}, False), ({"identity": "pixels:1"}, False),
        ({"counts": [*COUNTS[:-1], COUNTS[-1] - 1]}, False),
        ({"counts": [*COUNTS[:-2], COUNTS[-2] + COUNTS[-1] - 100, 100]}, False),  # as many in all
        ({"counts": None}, False),
        ({"names": [f"class{i:04d}" for i in range(1000)]}, False),
        ({"names": [f"n{i:08d}" for i in range(1000)]}, False),  # look like wnids
        ({"names": [*WNIDS[:-1], "n99999999"]}, False), ({"names": [*WNIDS[1:], WNIDS[0]]}, False),
        ({"bytes": TRAIN_BYTES // 3}, False),  # as of copies with a short side of 256 pixels
        ({"bytes": 0}, False), ({"read_by": ["threads"]}, True), ({"read_by": ["ffcv", "threads"]}, False),
        ({"read_by": ["dali"]}, False),
    ],
)  # fmt: skip
def test_imagenet_is_known_by_wnids_counts_and_untouched_files(change, known):
    names, read_by = change.get("names", WNIDS), change.get("read_by", [])
    train = {"identity": "stored:1", "bytes": TRAIN_BYTES, "counts": COUNTS} | change
    val = {"identity": "stored:2", "bytes": VAL_BYTES, "counts": [50] * 1000}
    shown = labelled(
        load("imagenet_balanced_5"), protocol("imagenet", train=train, val=val, class_names=names, read_by=read_by)
    )
    assert shown.published == (66.45 if known else None)
    changed = [f"loader={name}" for name in read_by if name != "threads"]
    line = opening(
        load("imagenet_balanced_5"),
        streamed(names, train, val),
        protocol("imagenet", train=train, val=val, class_names=names),
    )[0]
    assert line.startswith(
        "images: the published ImageNet" if known or read_by else ("OTHER DATA", "UNIDENTIFIED DATA")
    )
    assert known or shown.fidelity == f"modified: {', '.join(changed or ['other data'])}" or change["identity"] is None


# What is said before anything is trained


def opened(name, overrides=(), of="cifar100", images=None, **described):
    """The opening lines of a run of a recipe. images: counts of the classes of train, where pixels are at hand."""
    expected = published.table()[of]

    def split(part, counts):
        return SimpleNamespace(identity=Identity("pixels", expected.shape, counts, part.classes or ("",) * len(counts)))

    train, val = (split(part, part.counts or ()) for part in (expected.train, expected.val))
    if images is not None:
        train = split(expected.train, images)
    dataset = SimpleNamespace(name=of, class_names=list(expected.class_names), train=train, val=val, proven=False)
    return opening(load(name, list(overrides)), dataset, protocol(of, **described))


def test_the_opening_says_what_the_images_are_and_what_was_modified():
    number = "published: average incremental accuracy 62.22"
    known = "images: the published CIFAR-100 (verified by content)"
    another = "; the paper's number is of another experiment"
    assert opened("cifar100_balanced_5") == [known, number]
    assert opened("cifar100_balanced_5", ["verify=false"]) == [known, number]
    assert opened("cifar100_balanced_5", ["epochs=6"]) == [known, f"modified: epochs=6{another}"]
    less = opened("cifar100_balanced_5", images=(499, *[500] * 99), train={"identity": "pixels:0"})
    assert less == [
        "OTHER DATA: not CIFAR-100 as published: train has 1 image less of class apple (499 instead of 500)",
        f"modified: other data{another}",
    ]
    assert opened("digits", of="digits") == ["images: the published scikit-learn's digits (verified by content)"]
    assert opened("folder") == []
    assert opened("folder", ["size=48"]) == ["modified: size=48"]
    assert opening(load("cifar100_balanced_5"), None, None) == [number]
    assert opening(load("cifar100_balanced_5", ["epochs=6"]), None, None) == [f"modified: epochs=6{another}"]


@pytest.mark.parametrize(
    ("bn", "ranks", "changed"),
    [("local", 1, ""), ("local", 4, ""), ("local", 8, "bn=local of 16 images"), ("sync", 8, ""), (None, 1, "")],
)
def test_batch_statistics_of_few_images_are_a_modification(bn, ranks, changed):
    """The label of a run of batches of 128."""
    wanted = "published: average incremental accuracy 62.22"
    if changed:
        wanted = f"modified: {changed}; the paper's number is of another experiment"
    assert opened("cifar100_balanced_5", bn=bn, ranks=ranks)[1] == wanted


def test_cifar10_is_known_by_the_sums_of_its_files_or_by_its_counts(tmp_path):
    """No recipe of it has a published number."""
    (tmp_path / "mine.yaml").write_text("base: cifar100_balanced_5\ndataset: cifar10\n")
    first, _ = opened(
        str(tmp_path / "mine.yaml"), of="cifar10", train={"identity": "pixels:1"}, val={"identity": "pixels:2"}
    )
    assert first.startswith("images: classes and counts are those of CIFAR-10; its pixels are not compared")


# Real runs


SETTINGS = ["verify=false", "model=resnet8", "epochs=1", "base_classes=8", "increment=2", "order=alphabetical",
            "batch_size=32", "exemplars_per_class=5", "compile=false", "device=cpu",
            "precision=fp32"]  # fmt: skip
LABEL = ("modified: base_classes=8, batch_size=32, epochs=1, exemplars_per_class=5, increment=2, model=resnet8, "
         "order=alphabetical, other data")  # fmt: skip
CLASSES, PER_CLASS = 10, {"train": 20, "val": 10}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A part of CIFAR-100 as a folder; its images by split, class and name."""
    if not CIFAR100.exists():
        pytest.skip("no ../shared/data/cifar100-png.tar next to the repository")
    root = tmp_path_factory.mktemp("images") / "folder"
    source = open_source(CIFAR100)
    for split, to in (("train", "train"), ("val", "test")):
        records = getattr(source, split)
        for label in range(CLASSES):
            home = root / to / source.class_names[label]
            home.mkdir(parents=True)
            for i in np.flatnonzero(records.labels == label)[: PER_CLASS[split]]:
                (home / records.name(i).rpartition("/")[2]).write_bytes(records.content(i))
    return root


def as_tar(images, root):
    return shutil.make_archive(str(root / "x"), "tar", images)


def as_beton(images, root):
    convert(images, root / "x.beton", options_of(workers=1), Reporter())
    return root / "x.beton"


def as_parquet(images, root):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = sorted(path.name for path in (images / "train").iterdir())
    for split in ("train", "test"):
        files = sorted(images.glob(f"{split}/*/*"))
        np.random.default_rng(0).shuffle(files)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        content = pa.array([{"bytes": path.read_bytes(), "path": path.name} for path in files], kind)
        labels = pa.array([names.index(path.parent.name) for path in files], pa.int64())
        features = {"info": {"features": {"fine_label": {"names": names}}}}
        table = pa.table({"img": content, "fine_label": labels})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), root / f"{split}.parquet")
    return root


def run(data, out):
    with mock.patch("fastil.reporting.figures.draw_run"):  # figures take as long as the training
        cli.run("cifar100_balanced_5", list(SETTINGS), data=str(data), out=out)
    return out


@pytest.fixture(scope="module")
def first(images, tmp_path_factory):
    """A run directory, next to which lies what was printed."""
    out = tmp_path_factory.mktemp("first") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(images, out)
    out.with_name("printed").write_text(printed.getvalue())
    return out


def test_a_run_says_before_it_trains_what_it_is_labelled_with_and_why(first):
    lines = first.with_name("printed").read_text().splitlines()
    before = lines[: next(i for i, line in enumerate(lines) if line.startswith("step "))]
    assert [
        line for line in before if line.startswith("OTHER DATA: not CIFAR-100 as published: it has 10 classes inst")
    ]
    assert f"{LABEL}; the paper's number is of another experiment" in before


@pytest.mark.parametrize("container", [as_tar, as_beton, as_parquet])
def test_a_run_is_the_same_whatever_its_images_lie_in(images, first, tmp_path, container):
    again = run(container(images, tmp_path), tmp_path / "run")
    assert (again / "results.json").read_bytes() == (first / "results.json").read_bytes()
    a, b = (json.loads((folder / "protocol.json").read_text()) for folder in (first, again))
    assert a == b  # class order, names, counts, both kinds of hashes
    assert (again / "memory/step_1.json").read_bytes() == (first / "memory/step_1.json").read_bytes()
    assert a["dataset"]["train"]["identity"].startswith("pixels:")


def test_the_ids_of_a_run_are_the_rows_of_its_converted_file(images, tmp_path):
    source = open_source(as_beton(images, tmp_path))
    assert canonical(source.train).tolist() == list(range(len(source.train)))
    (decoded, labels), _ = in_memory.read(open_source(images), None, skip_corrupt=False)[0]
    for i in range(0, len(labels), 7):
        np.testing.assert_array_equal(source.train.content(i), decoded[i])
        assert source.train.labels[i] == labels[i]


def test_no_published_number_stands_anywhere_near_a_modified_run(first, tmp_path):
    printed = first.with_name("printed").read_text()
    assert LABEL in printed
    written = yaml.safe_load((first / "recipe.yaml").read_text())
    assert (written["published"], written["fidelity"]) == (None, LABEL)
    text, _ = report.write_report([first], tmp_path / "report", as_html=True)
    assert LABEL in text
    page = (tmp_path / "report/report.html").read_text()
    assert LABEL in page
    for shown in (printed, text, page, (tmp_path / "report/report.md").read_text()):
        assert "62.22" not in shown


def test_a_run_from_before_identities_can_be_read_and_resumed(first, images, tmp_path):
    shutil.copytree(first, tmp_path / "run")
    path = tmp_path / "run/protocol.json"
    described = json.loads(path.read_text())
    for split in ("train", "val"):
        del described["dataset"][split]["identity"]
    path.write_text(json.dumps(described))
    assert "unidentified data" in Run(tmp_path / "run").recipe.fidelity
    cli.run("cifar100_balanced_5", list(SETTINGS), data=str(images), out=tmp_path / "run", resume=True)
    assert (tmp_path / "run/results.json").read_bytes() == (first / "results.json").read_bytes()
    assert json.loads(path.read_text()) == json.loads((first / "protocol.json").read_text())
