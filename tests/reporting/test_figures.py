"""Figures: nothing in them is hidden or printed over something else, and names in them are text."""

import dataclasses
import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from test_report import SEEN, make_run

from fastil.reporting import figures
from fastil.reporting.drawing import as_svg, legend_below, new_figure, save_figure, settings, spaced
from fastil.reporting.heatmaps import Confusion, draw_confusion, draw_counts, draw_triangle
from fastil.reporting.report import shortened
from fastil.reporting.runs import Run, group_runs


def apart(boxes):
    """Whether none of these overlaps another one."""
    return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def boxes_of(labels):
    return [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, laid out."""
    found = []

    def save(figure, path, then=""):
        save_figure(figure, path)
        figure.draw_without_rendering()
        found.append(figure)

    monkeypatch.setattr(figures, "save_figure", save)
    return found


def test_an_accuracy_figure_hides_nothing(tmp_path, drawn):
    """Two data sets, a curve of many steps, reference lines, a published number and a label that was cut."""
    many = ["epochs=3", "base_epochs=4", "lr=0.01", "momentum=0.8", "exemplars_per_class=9", "temperature=3", "pad=2"]
    settings_of = {
        "plain": ["loss=softmax"],
        "many": many,
        "joint": ["method=joint"],
        "finetune": ["method=finetune", "loss=softmax", "exemplars_per_class=0"],
    }
    runs = [Run(make_run(tmp_path / name, 50.0, *given)) for name, given in settings_of.items()]
    runs.append(Run(make_run(tmp_path / "elsewhere", 90.0, images="beef0011")))
    runs[0].recipe = dataclasses.replace(runs[0].recipe, published=61.25)
    groups, cut = shortened(group_runs(runs))
    figures.draw_accuracy(groups, tmp_path / "accuracy.png", notes=cut)
    (figure,) = drawn
    panels = figure.axes
    assert len(panels) == 2
    assert {axis.get_ylim() for axis in panels} == {(0, 100)}
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *boxes_of(figure.texts), *(axis.get_tightbbox() for axis in panels)]
    assert apart(boxes)
    said = [words.get_text().replace("\n", " ") for words in legend.get_texts()]
    for label in groups:
        assert sum(words.startswith(f"{label} (") for words in said) == 1, (label, said)
    assert sum("reference line" in words for words in said) == 2
    assert sum("paper's average" in words and "61.2" in words for words in said) == 1
    assert len(said) == len(groups) + 1
    drawn_lines = [line for axis in panels for line in axis.get_lines()]
    assert len(drawn_lines) == len(said)
    levels = [line.get_ydata()[0] for line in drawn_lines if line.get_linestyle() == "-."]
    assert levels == [61.25]
    (mark,) = (label.rpartition(" ")[2] for label in groups if label.endswith("]"))
    assert any(note.get_text().startswith(f"{mark} il_baseline, balanced, ") for note in figure.texts)


def test_ticks_of_many_steps_are_apart(tmp_path, drawn):
    run = make_run(tmp_path / "run", 50.0)
    steps = [[*range(50)], *([50 + 2 * k, 51 + 2 * k] for k in range(25))]
    protocol = json.loads((run / "protocol.json").read_text())
    protocol |= {"class_order": [*range(100)], "class_names": [f"c{c}" for c in range(100)], "steps": steps}
    (run / "protocol.json").write_text(json.dumps(protocol))
    results = json.loads((run / "results.json").read_text())
    of_step = results["steps"][1]
    results["steps"] = [of_step | {"step": k, "classes_seen": 50 + 2 * k} for k in range(26)]
    (run / "results.json").write_text(json.dumps(results))
    figures.draw_accuracy(group_runs([Run(run)]), tmp_path / "accuracy.png")
    labels = drawn[0].axes[0].get_xticklabels()
    assert apart(boxes_of(labels))
    assert labels[-1].get_text() == "100"
    assert len(labels) > 4


def test_spaced_values_are_apart_and_end_with_the_last():
    for values in ([5], [5, 6], SEEN, range(50, 101, 2), [0, 1, 2, 3, 50, 51, 100]):
        span = values[-1] - values[0]
        kept = spaced(list(values), span)
        assert kept[-1] == values[-1]
        assert set(kept) <= set(values)
        assert min(np.diff(kept), default=span) >= 0.98 * span / 8


@pytest.mark.parametrize("classes", [4, 20, 100])
def test_a_confusion_matrix_names_its_classes_where_they_fit(classes):
    names = [f"a rather long name of class {c}" for c in range(classes)]
    matrix = np.random.default_rng(0).integers(0, 150, (classes, classes)).astype(float)
    half = classes // 2
    with settings():
        figure, (axis,) = new_figure(1, height=4.2)
        confusion = Confusion(matrix, [half, half + 1, classes], names, "")
        draw_confusion(axis, confusion, 150)
        draw_counts(figure, [confusion], 150, ax=axis)
        figure.draw_without_rendering()
    assert (axis.get_xlabel(), axis.get_ylabel()) != ("", "")
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert apart(boxes_of(labels))
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert (len(shown) == classes and shown[0].startswith("a rather")) == (classes <= 20)
    between = {line.get_xdata()[0] for line in axis.get_lines() if line.get_xdata()[0] == line.get_xdata()[1]}
    assert between == {half - 0.5, half + 0.5}
    bar = figure.axes[1]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0", "1", "10", "100"]
    (image,) = axis.get_images()
    ends = np.log1p(150)
    np.testing.assert_allclose(image.norm([0, 1, 10, 100, 150]), np.log1p([0, 1, 10, 100, 150]) / ends)


@pytest.mark.parametrize("classes", [100, 401, 1000])
def test_one_cell_of_a_large_matrix_is_in_the_picture(classes):
    """Drawn as it is, most cells of 1,000 x 1,000 fell between two pixels."""
    random = np.random.default_rng(classes)
    for _ in range(4):
        row, column = random.integers(classes // 20, classes - classes // 20, 2)
        matrix = np.zeros((classes, classes))
        matrix[row, column] = 100
        with settings():
            figure, (axis,) = new_figure(1, height=4.2)
            draw_confusion(axis, Confusion(matrix, [classes], None, ""), 100)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        inside = axis.get_window_extent()
        red = np.asarray(canvas.buffer_rgba())[::-1, :, 0]
        y, x = np.nonzero(red[int(inside.y0) + 3 : int(inside.y1) - 2, int(inside.x0) + 3 : int(inside.x1) - 2] < 128)
        assert len(x) > 0
        assert abs(x.mean() + 3 - (column + 0.5) / classes * inside.width) < 4
        assert abs(inside.height - y.mean() - 3 - (row + 0.5) / classes * inside.height) < 4


def test_the_triangle_has_the_numbers_of_its_cells():
    rows = [[99.4], [12.5, 87.6], [0.0, 51.0, 100.0]]
    with settings():
        figure, (axis,) = new_figure(1)
        image = draw_triangle(axis, rows)
        figure.draw_without_rendering()
    assert {(words.get_position(), words.get_text()) for words in axis.texts} == {
        ((group, step), f"{value:.0f}") for step, row in enumerate(rows) for group, value in enumerate(row)
    }
    for words in axis.texts:  # and can be read
        group, step = words.get_position()
        background = np.mean(image.cmap(image.norm(rows[step][group]))[:3])
        assert abs(background - np.mean(to_rgb(words.get_color()))) > 0.4


HOSTILE = [
    "</text></svg><script>alert(1)</script>",
    "$\\frac{1$ ]]> -->",
    "\ud83d\x00\x1b[2J\uffff\ufffe",
    "&lt;\u202e\n\u4e2d",
]


def test_names_in_a_figure_are_text(tmp_path, recwarn):
    with settings():
        figure, (axis,) = new_figure(1)
        draw_confusion(axis, Confusion(np.ones((4, 4)), [4], HOSTILE, ""), 1)
        axis.set_title(HOSTILE[0])
        lines = axis.plot([0, 1], [0, 1], "o", gid="line")
        legend_below(figure, dict.fromkeys(HOSTILE, lines[0]), notes=HOSTILE)
        save_figure(figure, tmp_path / "figure.png")
        written = as_svg(figure, "x", '"><script>', {"line": [HOSTILE[0], HOSTILE[2]]})
    root = ElementTree.fromstring(written)
    tags = "svg g defs path use text title image clipPath rect"
    assert {element.tag for element in root.iter()} <= {*tags.split()}
    texts = [element.text for element in root.iter("text")]
    assert HOSTILE[0] in texts
    assert HOSTILE[1][:13] in {name[:13] for name in texts}
    assert root.get("aria-label") == '"><script>'
    assert next(root.iter("title")).text == HOSTILE[0]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
