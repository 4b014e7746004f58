"""The HTML page: whole in one file, every string escaped, what it shows is what the runs hold."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from fastil.errors import UserError
from fastil.experiment import Experiment
from fastil.recipe import load
from fastil.report import alpha_paths, geometric_mean, read_run, write_report

SETTINGS = [*TINY, "base_classes=6", "increment=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, settings in {
        "balanced-s0": ["loss=balanced"],
        "balanced-s1": ["loss=balanced", "seed=1"],
        "meta-s0": ["loss=meta_balanced", "meta_every=1", "meta_lr=30", "meta_alpha=per_class"],
    }.items():
        Experiment(load("digits", [*SETTINGS, *settings]), root / name, resume=False).run()
    return root


class Reader(HTMLParser):
    """Tags, texts and links of a page; fails on tags that do not match."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open, self.texts, self.links, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(paths, out):
    write_report(paths, out, True)
    text = (out / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return text, reader


def test_the_page_needs_no_other_file(runs, tmp_path):
    text, reader = page_of(sorted(runs.iterdir()), tmp_path / "report")
    assert reader.links
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert "script" not in reader.tags
    assert not re.search(r"@import|url\(", text)


def test_it_shows_what_the_runs_hold(runs, tmp_path):
    text, reader = page_of(sorted(runs.iterdir()), tmp_path / "report")
    results = [json.loads((runs / f"balanced-s{seed}/results.json").read_text()) for seed in (0, 1)]
    mean = np.mean([result["average_incremental_accuracy"] for result in results])
    assert f"{mean:.2f} ± " in text
    for step in range(3):
        top1 = np.mean([result["steps"][step]["top1"] for result in results])
        assert any(f": {top1:.2f}" in words and f"at {6 + 2 * step} classes" in words for words in reader.texts)
    assert "Alpha" in reader.texts
    assert any("class list" in words for words in reader.texts)
    assert any("meta_every: 1" in words for words in reader.texts)  # the effective recipe
    assert any(words.startswith("step 2: 10 classes") for words in reader.texts)


def test_confusion_matrices_have_a_pixel_per_cell(runs, tmp_path):
    _, reader = page_of([runs / "balanced-s0"], tmp_path / "report")
    images = [Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) for link in reader.links]
    assert {(6, 6), (8, 8), (10, 10)} <= {image.size for image in images}
    matrix = np.load(runs / "balanced-s0/confusion/step_2.npy")
    last = next(image for image in images if image.size == (10, 10))
    brightness = np.asarray(last.convert("L"), dtype=int)  # viridis rises in lightness
    order = np.argsort(matrix.ravel(), kind="stable")
    assert (np.diff(brightness.ravel()[order]) >= -1).all()


def test_no_alpha_no_section(runs, tmp_path):
    _, reader = page_of([runs / "balanced-s0"], tmp_path / "report")
    assert "Alpha" not in reader.texts


def test_alpha_of_every_class_becomes_its_geometric_mean(runs):
    lines = [json.loads(line) for line in (runs / "meta-s0/metrics.jsonl").read_text().splitlines()]
    wanted = [(line["step"], np.prod(line["alpha"]) ** (1 / len(line["alpha"]))) for line in lines if line["step"] > 0]
    found = alpha_paths(read_run(runs / "meta-s0"))
    assert [step for step, alphas in found.items() for _ in alphas] == [step for step, _ in wanted]
    means = np.concatenate([geometric_mean(alphas) for alphas in found.values()])
    np.testing.assert_allclose(means, [alpha for _, alpha in wanted])


def test_names_are_data_and_not_markup(runs, tmp_path):
    run = tmp_path / "balanced-s0"
    shutil.copytree(runs / "balanced-s0", run)
    protocol = json.loads((run / "protocol.json").read_text())
    protocol["class_names"][0] = "<script>alert(1)</script>"
    protocol["dataset"]["name"] = "<b>&"
    (run / "protocol.json").write_text(json.dumps(protocol))
    text, reader = page_of([run], tmp_path / "report")
    assert "script" not in reader.tags
    assert "b" not in reader.tags
    assert "&lt;script&gt;" in text


def test_missing_timings_are_left_out_and_damaged_metrics_named(runs, tmp_path):
    run = tmp_path / "meta-s0"
    shutil.copytree(runs / "meta-s0", run)
    (run / "timings.json").write_text("{")
    _, reader = page_of([run], tmp_path / "report")
    assert any("class list" in words for words in reader.texts)
    (run / "metrics.jsonl").write_text('{"step": 1, "alpha": "much"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged"):
        write_report([run], tmp_path / "report", True)
