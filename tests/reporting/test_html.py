"""The HTML page: whole in one file, every string escaped, what it shows is what the runs hold."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.reporting.report import write_report
from fastil.reporting.runs import Run, alpha_paths, geometric_mean, group_runs
from fastil.training.experiment import Experiment

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
        self.open, self.texts, self.links, self.tags, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.links += [found for name, value in attributes for found in re.findall(r"url\((.*?)\)", value or "")]
        self.ids += [value for name, value in attributes if name == "id"]

    def images(self):
        """The images that stand in it."""
        pngs = [link.partition(",")[2] for link in self.links if link.startswith("data:image/png;base64,")]
        return [Image.open(io.BytesIO(base64.b64decode(png))) for png in pngs]

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
    inside = [link for link in reader.links if not link.startswith("data:image/png;base64,")]
    assert len(reader.links) > len(inside) > 0
    assert {link[1:] for link in inside} <= {*reader.ids}
    assert {link[0] for link in inside} == {"#"}
    assert len(reader.ids) == len({*reader.ids})  # those of one chart are not those of another
    assert "script" not in reader.tags
    assert not re.search(r"@import|url\((?!#)|https?:", text)


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    pages = [page_of(sorted(runs.iterdir()), tmp_path / name)[0] for name in ("a", "b")]
    assert pages[0] == pages[1]


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


def test_seeds_with_an_order_of_their_own_are_told_apart(runs, tmp_path):
    """The classes of one seed were shown for all."""
    shown = [
        words
        for words in page_of(sorted(runs.glob("balanced*")), tmp_path / "one")[1].texts
        if "Classes of each step" in words
    ]
    assert shown == ["Classes of each step"]
    steps = json.loads((runs / "balanced-s1/protocol.json").read_text())["steps"][::-1]
    steps = [[*steps[0], *steps[1], *steps[2][:2]], steps[2][2:4], steps[2][4:]]
    changes = {"steps": steps, "class_order": [c for step in steps for c in step], "class_list_hash": "another"}
    other = copy_of(runs / "balanced-s1", tmp_path / "balanced-s1", protocol=changes)
    text, reader = page_of([runs / "balanced-s0", other], tmp_path / "two")
    assert "Classes of each step (seed 0)" in reader.texts
    assert "Classes of each step (seed 1)" in reader.texts
    for run in (runs / "balanced-s0", other):
        protocol = json.loads((run / "protocol.json").read_text())
        for number, classes in enumerate(protocol["steps"]):
            assert f"step {number}: {', '.join(map(str, classes))}" in reader.texts
        assert protocol["class_list_hash"] in text


def test_confusion_matrices_have_a_pixel_per_cell(runs, tmp_path):
    _, reader = page_of([runs / "balanced-s0"], tmp_path / "report")
    images = reader.images()
    assert {(6, 6), (8, 8), (10, 10)} <= {image.size for image in images}
    matrix = np.load(runs / "balanced-s0/confusion/step_2.npy")
    last = next(image for image in images if image.size == (10, 10))
    brightness = np.asarray(last.convert("L"), dtype=int)  # which falls with the number of images
    order = np.argsort(matrix.ravel(), kind="stable")
    assert (np.diff(brightness.ravel()[order]) <= 1).all()
    assert brightness.min() < 100 < 240 < brightness.max()


def test_no_alpha_no_section(runs, tmp_path):
    _, reader = page_of([runs / "balanced-s0"], tmp_path / "report")
    assert "Alpha" not in reader.texts


def test_alpha_of_every_class_becomes_its_geometric_mean(runs):
    lines = [json.loads(line) for line in (runs / "meta-s0/metrics.jsonl").read_text().splitlines()]
    wanted = [(line["step"], np.prod(line["alpha"]) ** (1 / len(line["alpha"]))) for line in lines if line["step"] > 0]
    found = alpha_paths(Run(runs / "meta-s0"))
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


def copy_of(run, to, **changes):
    """The run with other values in its JSON files: results={...}, protocol={...}."""
    shutil.copytree(run, to)
    for name, values in changes.items():
        path = to / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


def charts_of(text, name):
    """The charts whose label begins so."""
    return [
        ElementTree.fromstring(svg) for svg in re.findall(rf'(?s)<svg [^>]*aria-label="{name}[^"]*".*?</svg>', text)
    ]


def dots(chart):
    """Places and values of the dots of a chart: the height is read off its own axis, the value from what a dot says."""
    axis, height = {}, None
    for element in chart.iter():
        if element.tag == "use":
            height = float(element.get("y"))
        if element.tag == "text" and "text-anchor: end" in element.get("style"):
            axis[float(element.text)] = height  # a number stands behind its tick
    marks, heights = zip(*sorted(axis.items(), reverse=True), strict=True)
    found = [dot for dot in chart.iter("use") if dot.find("title") is not None]
    return [
        (float(dot.get("x")), float(np.interp(float(dot.get("y")), heights, marks)), dot.find("title").text)
        for dot in found
    ]


def test_dots_lie_where_the_mean_over_seeds_is(runs, tmp_path):
    text, _ = page_of([runs / "balanced-s0", runs / "balanced-s1"], tmp_path / "report")
    charts = charts_of(text, "(?:All classes|Classes of)")
    results = [json.loads((runs / f"balanced-s{seed}/results.json").read_text())["steps"] for seed in (0, 1)]
    for chart, key in zip(charts, ("top1", "top1_old", "top1_new"), strict=True):
        wanted = [np.mean([a[key], b[key]]) for a, b in zip(*results, strict=True) if a[key] is not None]
        found = dots(chart)
        np.testing.assert_allclose([value for _, value, _ in found], wanted, atol=0.1)  # places have one decimal
        assert np.ptp(np.diff([x for x, _, _ in found])) < 0.2 or len(found) < 3  # steps of two classes each


def test_alpha_ends_where_the_last_epoch_of_each_step_left_it(runs, tmp_path):
    text, _ = page_of([runs / "meta-s0"], tmp_path / "report")
    (chart,) = charts_of(text, "alpha of")
    lines = [json.loads(line) for line in (runs / "meta-s0/metrics.jsonl").read_text().splitlines()]
    means = [
        np.prod(line["alpha"]) ** (1 / len(line["alpha"])) for line in lines if line["step"] and line["epoch"] == 2
    ]
    titles = [title for _, _, title in dots(chart)]
    assert titles == [f"seed 0, step {step}, epoch 2: {mean:.3g}" for step, mean in enumerate(means, 1)]
    for step, old in ((1, 6), (2, 8)):
        (thin,) = (group for group in chart.iter("g") if (group.get("id") or "").endswith(f"-thin0-{step}"))
        pieces = [path.get("d") for path in thin.iter("path")]
        assert [(d.count("M"), d.count("L")) for d in pieces] == [(1, 1)] * old  # two epochs


def test_alpha_is_drawn_in_the_run_directory_of_a_run_that_learned_it(runs):
    assert (runs / "meta-s0/figures/alpha.png").read_bytes().startswith(b"\x89PNG")
    assert not (runs / "balanced-s0/figures/alpha.png").exists()


def test_each_group_has_a_button_per_step_and_shows_the_last(runs, tmp_path):
    text, _ = page_of(sorted(runs.iterdir()), tmp_path / "report")
    for group in (0, 1):
        buttons = re.findall(rf'<input type=radio name="m{group}" id="m{group}-(\d)"( checked)?>', text)
        assert buttons == [("0", ""), ("1", ""), ("2", " checked")]


def test_an_unfinished_run_and_one_on_other_images_stand_apart(runs, tmp_path):
    results = json.loads((runs / "balanced-s1/results.json").read_text())
    first = {"steps": results["steps"][:1], "average_incremental_accuracy": results["steps"][0]["top1"]}
    described = json.loads((runs / "balanced-s1/protocol.json").read_text())["dataset"]
    other = {"name": "elsewhere"} | {split: described[split] | {"sha256": "e" * 64} for split in ("train", "val")}
    run = copy_of(runs / "balanced-s1", tmp_path / "other", results=first, protocol={"dataset": other})
    text, reader = page_of([runs / "balanced-s0", run, runs / "balanced-s1"], tmp_path / "report")
    assert [words for words in reader.texts if words.startswith("Data set")] == [
        "Data set digits",
        "Data set elsewhere",
    ]
    assert sum("(unfinished: 1)" in words for words in reader.texts) == 1
    charts = charts_of(text, "(?:All classes|Classes of)")
    assert [len(dots(chart)) for chart in charts] == [3, 2, 3, 1, 0, 1]


def test_a_label_names_the_keys_that_are_not_as_the_recipe_has_them(runs, tmp_path):
    run = copy_of(runs / "balanced-s0", tmp_path / "warm")
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("temperature: 2.0", "temperature: 4.0"))
    found = group_runs([Run(runs / "balanced-s0"), Run(run)])
    assert list(found) == ["il_baseline, balanced", "il_baseline, balanced, temperature=4.0"]


def test_the_protocol_is_shown_with_whatever_keys_it_has(runs, tmp_path):
    steps = [{"step": 0, "odd_one": None, "rate": 0.25, "kept": True}, {"step": 1, "odd_one": "<i>", "many": 12345}]
    run = copy_of(runs / "balanced-s0", tmp_path / "run", protocol={"effective": steps})
    _, reader = page_of([run], tmp_path / "report")
    assert {"odd one", "0.25", "True", "<i>", "12,345"} <= set(reader.texts)
    assert "i" not in reader.tags
    (run / "protocol.json").write_text(json.dumps({**json.loads((run / "protocol.json").read_text()), "effective": []}))
    page_of([run], tmp_path / "report")


def test_a_name_that_is_no_valid_text_keeps_nothing_from_being_written(runs, tmp_path):
    described = json.loads((runs / "balanced-s0/protocol.json").read_text())
    names = ["\udce9t\u00e9", *described["class_names"][1:]]  # as Python names a folder that is not UTF-8
    dataset = described["dataset"] | {"name": "\udce9"}
    run = copy_of(runs / "balanced-s0", tmp_path / "run", protocol={"class_names": names, "dataset": dataset})
    text, _ = page_of([run], tmp_path / "report")
    assert "t\u00e9" in text


def test_a_line_that_is_being_written_is_not_read(runs, tmp_path):
    run = copy_of(runs / "meta-s0", tmp_path / "run")
    whole = alpha_paths(Run(run))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "phase": "train", "alp')
    found = alpha_paths(Run(run))
    assert {step: alphas.tolist() for step, alphas in found.items()} == {s: a.tolist() for s, a in whole.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", b"[]"),
        ("protocol.json", b'{"steps": [[0]]}'),
        ("metrics.jsonl", b"7\n"),
        ("confusion/step_1.npy", b""),
        ("confusion/step_1.npy", b"\x93NUMPY and then nothing"),
        ("recipe.yaml", b"seed: ["),
    ],
)
def test_a_damaged_file_is_named_in_one_line(runs, tmp_path, name, content):
    """Whatever else is damaged in one that is read as typed content: tests/test_run_files.py."""
    run = copy_of(runs / "meta-s0", tmp_path / "run")
    (run / name).write_bytes(content)
    text, complete = write_report([runs / "balanced-s0", run], tmp_path / "report", True)
    (line,) = (line for line in text.splitlines() if "left out" in line)
    assert f"{run / name}: damaged" in line
    assert not complete
    assert f"{run / name}: damaged" in (tmp_path / "report/report.html").read_text()
    with pytest.raises(UserError, match=re.escape(f"{run / name}: damaged")):
        write_report([run], tmp_path / "report", True)


def test_results_and_protocol_of_two_runs_are_named(runs, tmp_path):
    """Each is whole, but a reader takes the classes seen from one and the classes from the other."""
    steps = json.loads((runs / "balanced-s0/protocol.json").read_text())["steps"]
    for number, other in enumerate((steps[:2], [*steps[:2], []], [[*steps[0], *steps[1]], steps[2]])):
        changes = {"steps": other, "class_order": [c for step in other for c in step]}
        run = copy_of(runs / "balanced-s0", tmp_path / str(number), protocol=changes)
        with pytest.raises(UserError, match=r"results\.json has other steps than protocol\.json; let the run go on"):
            Run(run)


def test_a_step_whose_alphas_are_not_of_the_same_classes_is_named(runs, tmp_path):
    run = copy_of(runs / "meta-s0", tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(last | {"alpha": last["alpha"][1:]}), ""]))
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged \(the alphas of step 2 are of other classes\)"):
        alpha_paths(Run(run))


def test_a_run_without_metrics_or_results(runs, tmp_path):
    run = copy_of(runs / "meta-s0", tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert alpha_paths(Run(run)) == {}
    (run / "results.json").unlink()
    with pytest.raises(UserError, match="run: no results yet"):
        Run(run)


@pytest.mark.parametrize("matrix", [np.eye(8, dtype=np.int64), np.eye(10), np.ones(10, dtype=np.int64)])
def test_a_matrix_of_another_size_or_type_is_damage(runs, tmp_path, matrix):
    run = copy_of(runs / "balanced-s0", tmp_path / "run")
    np.save(run / "confusion/step_2.npy", matrix)
    with pytest.raises(UserError, match=r"step_2\.npy"):
        write_report([run], tmp_path / "report", True)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"steps": {"0": 3}}', '{"steps": {}}', '{"steps": {"0": {"train": 1}}}']
)
def test_damaged_timings_say_so_and_leave_the_rest(runs, tmp_path, content):
    run = copy_of(runs / "balanced-s0", tmp_path / "run")
    (run / "timings.json").write_text(content)
    _, reader = page_of([run, runs / "balanced-s1"], tmp_path / "report")
    assert "seed 0: timings.json is missing or damaged" in reader.texts
    assert "1, step 2" in reader.texts
