"""Runs on files that are streamed: dataset=imagenet, its transforms and its loaders."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import assert_user_error, encoded

from fastil.data import DataConfig, load_dataset
from fastil.data.formats.beton import Beton
from fastil.data.loaders.choose import check_resident
from fastil.data.loaders.streaming import Streaming
from fastil.errors import UserError
from fastil.recipe_file import load, read_effective
from fastil.reporting.run_files import read_protocol
from fastil.reporting.runs import Run
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter
from fastil.training import run_loaders
from fastil.training.experiment import Experiment
from fastil.training.messages import of_epoch
from fastil.training.run_directory import RunDirectory
from fastil.training.trainer import EpochRecord

pytestmark = pytest.mark.usefixtures("without_figures")

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200)]
SETTINGS = [
    "size=32", "order=alphabetical", "base_classes=4", "increment=1", "exemplars_per_class=4", "model=resnet8",
    "epochs=6", "batch_size=16", "lr=0.05", "device=cpu", "compile=false",
    "precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Six colours, images of many sizes."""
    folder, random = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for label, colour in enumerate(COLOURS):
            for i in range(count):
                height, width = random.integers(30, 80, 2)
                pixels = np.array(colour) + random.normal(0, 25, (height, width, 3))
                path = folder / f"in/{split}/{label}/{i:02d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(pixels.clip(0, 255).astype(np.uint8), quality=90))
    convert(folder / "in", folder / "x.beton", options_of(workers=1), Reporter())
    return folder / "x.beton"


def run(file, out, *settings):
    experiment = Experiment(load("imagenet_balanced_5", [f"data={file}", *SETTINGS, *settings]), out, resume=False)
    experiment.run()
    experiment.close()
    return json.loads((out / "results.json").read_text())


def test_a_streamed_run_learns_and_is_the_same_again(file, tmp_path):
    first, second = (run(file, tmp_path / name, "loader=threads") for name in ("one", "two"))
    assert first == second
    assert first["steps"][0]["top1"] > 90
    assert first["average_incremental_accuracy"] > 60
    exemplars = [json.loads((tmp_path / name / "memory/step_2.json").read_text()) for name in ("one", "two")]
    assert exemplars[0] == exemplars[1]
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("one", "two")]
    assert lines[0] == lines[1]
    for step in json.loads((tmp_path / "one/timings.json").read_text())["steps"].values():
        assert 0 <= step["waiting_for_data"] <= step["train"]
        assert 0 <= step["loader_idle"] <= step["train"]
    described = json.loads((tmp_path / "one/protocol.json").read_text())["dataset"]
    with Beton(file) as beton:
        expected = {"sha256": beton.manifest.sha256, "images": len(beton), "identity": beton.identity.text}
        expected["bytes"] = sum(p.stat().st_size for p in file.parent.glob("in/train/*/*"))
        expected["counts"] = [len([*file.parent.glob(f"in/train/{label}/*")]) for label in range(len(COLOURS))]
        assert described["train"] == expected


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["method=mnemonics", "head=cosine", "last_relu=false", "mnemonics_epochs=1"],
        ["correction=balanced_finetuning", "finetune_epochs=2"],
    ],
)
def test_a_resident_memory_changes_nothing_but_what_is_read(file, tmp_path, monkeypatch, settings):
    read, stored = [], Streaming.stored

    def spy(loader, i):
        if loader.transform.resized:
            read.append(i)
        return stored(loader, i)

    monkeypatch.setattr(Streaming, "stored", spy)
    seen = {}
    for memory in ("streamed", "resident"):
        read.clear()
        settings_of_all = ["loader=threads", "epochs=2", *settings]
        seen[memory] = run(file, tmp_path / memory, f"memory={memory}", *settings_of_all), np.array(read)
    assert seen["streamed"][0] == seen["resident"][0]
    exemplars = json.loads((tmp_path / "resident/memory/step_0.json").read_text())
    for i in np.concatenate([*exemplars.values()]).tolist():
        reads = {memory: int((ids == i).sum()) for memory, (_, ids) in seen.items()}
        if not settings:  # two epochs of the base step, then once to be kept, or in two epochs of each of two steps
            assert reads == {"streamed": 6, "resident": 3}
        elif "method=mnemonics" not in settings:  # whose exemplars are an overlay
            assert reads["resident"] < reads["streamed"]


def test_a_resident_memory_is_held_again_after_a_resume(file, tmp_path, monkeypatch):
    whole = run(file, tmp_path / "whole", "memory=resident", "epochs=2")
    recipe = load("imagenet_balanced_5", [f"data={file}", *SETTINGS, "memory=resident", "epochs=2"])
    stopped = Experiment(recipe, tmp_path / "run", resume=False)
    train = stopped.train

    def stop_in_the_last_step(plan, *arguments):
        if plan.step == 2:
            raise KeyboardInterrupt
        return train(plan, *arguments)

    monkeypatch.setattr(stopped, "train", stop_in_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    stopped.close()
    resumed = Experiment(recipe, tmp_path / "run", resume=True)
    held, fit = [], resumed.trainer.fit

    def look(*arguments):
        held.append(resumed.loaders.train.held.ids.tolist())
        fit(*arguments)

    monkeypatch.setattr(resumed.trainer, "fit", look)
    resumed.run()
    exemplars = json.loads((tmp_path / "run/memory/step_1.json").read_text())
    assert held == [sorted(np.concatenate([*exemplars.values()]).tolist())]
    resumed.close()
    assert json.loads((tmp_path / "run/results.json").read_text()) == whole


def test_a_resident_memory_that_cannot_be_is_refused_before_anything_is_trained(fastil, file):
    process = fastil("run", "digits", "memory=resident")
    assert_user_error(process, "memory=resident", "in memory already", "leave it out")
    process = fastil("plan", "imagenet_balanced_5", *SETTINGS, "memory=resident", "--data", file)
    assert "about 0.0 GiB decoded on cpu" in process.stdout
    with Beton(file) as beton:
        check_resident(beton, 1000, "threads", torch.device("cpu"))
        with pytest.raises(UserError, match=r"memory=resident: 6,000,000,000 exemplars .* GiB, .* or leave it out"):
            check_resident(beton, 6 * 10**9, "threads", torch.device("cpu"))


def test_the_reference_loader_trains_the_same_to_a_rounding(file, tmp_path):
    """Frames differ by 2 of 255 at most."""
    weights = []
    for name in ("threads", "reference"):
        run(file, tmp_path / name, f"loader={name}", "epochs=1", "base_classes=6", "increment=0")
        state = torch.load(tmp_path / name / "checkpoints/step_0.pt", weights_only=True)
        weights.append(torch.cat([value.flatten().double() for value in state.values()]))
    assert torch.linalg.norm(weights[0] - weights[1]) < 0.02 * torch.linalg.norm(weights[1])


def test_a_run_tells_every_loader_that_has_read_its_images_over_resumes(file, tmp_path):
    """loader=auto may take another one on another machine."""
    short = ["epochs=1", "base_classes=6", "increment=0"]
    out = tmp_path / "run"
    run(file, out, *short)
    before = read_protocol(out)
    assert before.dataset.read_by == ["threads"]
    assert "loader=" not in read_effective(out / "recipe.yaml").fidelity
    recipe = load("imagenet_balanced_5", [f"data={file}", *SETTINGS, *short])
    elsewhere = before.model_copy(update={"dataset": before.dataset.model_copy(update={"read_by": ["dali"]})})
    for now in (elsewhere, before):  # there, and back again
        directory = RunDirectory(out, resume=True)
        state = directory.read(directory.last, torch.device("cpu"))
        with directory.held():
            directory.begin(recipe, directory.check(recipe, now), state)
        assert read_protocol(out).dataset.read_by == ["dali", "threads"]
        assert "loader=dali" in read_effective(out / "recipe.yaml").fidelity
    counts = np.bincount(Beton(file).labels).tolist()
    assert read_protocol(out).dataset.train.counts == counts


def test_auto_is_settled_once_and_a_resume_keeps_it(file, tmp_path, monkeypatch):
    """Whatever another machine would choose; only who asks for another one gets it, and is told."""
    settings = [f"data={file}", *SETTINGS, "epochs=1", "base_classes=4", "increment=2"]
    out, said = tmp_path / "run", []
    monkeypatch.setattr(run_loaders, "choose", lambda *a: ("reference", "it has been measured"))
    stopped = Experiment(load("imagenet_balanced_5", settings), out, resume=False)
    monkeypatch.setattr(stopped.progress, "say", said.append)
    train = stopped.train
    monkeypatch.setattr(stopped, "train", lambda plan, at: stop() if plan.step else train(plan, at))

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    stopped.close()
    assert "loader reference: it has been measured" in said[0]
    assert read_effective(out / "recipe.yaml").data.loader == "reference"
    monkeypatch.setattr(run_loaders, "choose", None)
    for recipe in (load("imagenet_balanced_5", settings), load(str(out))):
        resumed = Experiment(recipe, out, resume=True)
        assert (resumed.loaders.train.name, resumed.loaders.why) == ("reference", "as before the stop")
        resumed.close()
    other = Experiment(load("imagenet_balanced_5", [*settings, "loader=threads"]), out, resume=True)
    monkeypatch.setattr(other.progress, "say", said.append)
    other.run()
    other.close()
    assert any("loader: reference before the stop and threads from here on" in line for line in said)
    assert read_effective(out / "recipe.yaml").data.loader == "threads"
    assert read_protocol(out).dataset.read_by == ["reference", "threads"]


def test_a_finished_run_classifies_image_files_as_it_saw_them(file, tmp_path):
    """The stored bytes of the test images, out of the file and as files of their own."""
    run(file, tmp_path / "run", "epochs=2")
    finished, paths = Run(tmp_path / "run"), []
    with Beton(file.with_suffix(".val.beton")) as val:
        for i in range(len(val)):
            paths.append(tmp_path / f"{i}.jpg")
            paths[-1].write_bytes(val.encoded(i))
        names = [val.class_names[label] for label in val.labels]
    network = finished.network()
    assert (network.transform.height, network.transform.resize) == (32, 37)
    found = [next(iter(probabilities)) for probabilities in finished.predict(paths)]
    true, predicted = np.load(tmp_path / "run/predictions/step_2.npy").T
    assert [network.class_names[position] for position in true] == names
    assert [network.class_names[position] for position in predicted] == found


def test_what_a_run_prints_names_the_loader(fastil, file):
    settings = [setting for setting in SETTINGS if not setting.startswith("epochs")] + ["epochs=1"]
    process = fastil("run", "imagenet_balanced_5", *settings, "--data", file, "--out", "out")
    assert process.returncode == 0, process.stderr
    assert "loader threads: on a CPU the fastest" in process.stdout
    line = r"img/s, data \d+%$"
    assert len(re.findall(line, process.stdout, re.MULTILINE)) == 3  # an epoch of each step


@pytest.mark.parametrize(
    ("seconds", "waited", "idle", "streamed", "line"),
    [
        (10.0, 0.5, 0.62, True, ", data 5% (network-bound, loader 62% idle)"),
        (10.0, 3.0, 0.0, True, ", data 30% (loader-bound, loader 0% idle)"),
        (10.0, 3.0, None, True, ", data 30% (loader-bound)"),
        (4.0, 3.0, 0.1, True, ", data 75%"), (10.0, 3.0, None, False, ""),
    ],
)  # fmt: skip
def test_who_waits_for_whom(seconds, waited, idle, streamed, line):
    record = EpochRecord(0, "train", 1, 1, 0.1, 1.0, 50.0, 100, seconds, waited, idle, {})
    assert of_epoch(record, streamed).endswith(f" {100 / seconds:.0f} img/s{line}")


def test_pad_has_no_meaning_for_streamed_images_and_is_refused(fastil, file):
    process = fastil("run", "imagenet_balanced_5", *SETTINGS, "pad=4", "--data", file)
    assert_user_error(process, "pad=4", "random resized crops", "pad=0")


def test_a_source_that_is_no_file_or_has_no_validation_images_is_one_line(fastil, file, tmp_path):
    assert_user_error(fastil("run", "imagenet_balanced_5", "--data", tmp_path), "fastil convert SOURCE imagenet.beton")
    alone = tmp_path / "alone.beton"
    alone.write_bytes(file.read_bytes())
    assert_user_error(fastil("run", "imagenet_balanced_5", "--data", alone), "alone.val.beton: no such file", "--val")
    assert_user_error(
        fastil("plan", "imagenet_balanced_5", "--data", "none.beton"), "none.beton: no such file", "--data"
    )
    same = load_dataset(DataConfig("imagenet", str(alone), val="same"))
    assert len(same.val.labels) == len(same.train.labels)
    assert same.notes == ("validation images are the training images: a smoke test, not a result",)


def test_an_unknown_loader_is_refused_by_whatever_reads_the_recipe(fastil, file):
    for command in ("run", "plan"):
        process = fastil(command, "imagenet_balanced_5", *SETTINGS, "loader=dalli", "--data", file)
        assert_user_error(process, "loader=dalli: unknown; use one of auto, resident, threads")
