"""What a table makes of its run directories, written by hand: no training."""

import csv
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastil import recipe_file
from fastil.data import published
from fastil.errors import UserError
from fastil.reporting.runs import Run
from fastil.reproduce import table_figures, table_text, tables
from fastil.reproduce.worklist import WorkList

CONTENT = {
    "scales": {
        "paper": {"recipes": {5: "digits"}, "seeds": 3},
        "cpu": {"recipes": {5: "digits"}, "seeds": 2, "note": "This is not the paper's data set."},
        "short": {
            "like": "paper",
            "overrides": {"epochs": 9},
            "folder": "short",
            "theirs": "40 epochs",
            "note": "9 epochs, not 40.",
        },
    },
    "rows": {
        "softmax": {"loss": "softmax"},
        "balanced": {"loss": "balanced"},
        "alpha_0.5": {"loss": "balanced", "alpha": 0.5},
        "meta": {"loss": "meta_balanced"},
    },
    "tables": {
        "bars": {
            "title": "bars",
            "entries": [
                {"row": "softmax", "steps": 5, "label": "plain", "average": 43.8},
                {"row": "balanced", "steps": 5, "label": "ours", "against": "softmax", "average": 62.22},
            ],
        },
        "curves": {
            "title": "curves",
            "over": "alpha",
            "entries": [
                {"row": "alpha_0.5", "steps": 5, "label": "alpha 0.5", "average": 63.8, "final": 55.44},
                {"row": "balanced", "steps": 5, "label": "alpha 1.0", "average": 62.22, "final": 54.55},
                {"row": "meta", "steps": 5, "label": "Meta", "average": 64.11, "final": 55.21},
            ],
        },
    },
}


def folder_of(out, row, seed):
    return out / f"digits/{row}-s{seed}"


def make_run(out, row, seed, skill, steps=6, images="a", settings=()):
    """A run on digits, base 5 + 5 x 1, that gets a share of `skill` of its 10 test images per class right."""
    folder = folder_of(out, row, seed)
    for name in ("predictions", "checkpoints"):
        (folder / name).mkdir(parents=True)
    overrides = [f"{key}={value}" for key, value in CONTENT["rows"][row].items()]
    (folder / "recipe.yaml").write_text(recipe_file.load("digits", [*overrides, f"seed={seed}", *settings]).dump())
    random = np.random.default_rng([seed, int(1000 * skill)])
    results = []
    for step in range(steps):
        true = np.repeat(np.arange(5 + step), 10)
        predicted = np.where(random.random(len(true)) < skill, true, (true + 1) % (5 + step))
        np.save(folder / f"predictions/step_{step}.npy", np.stack((true, predicted), axis=1).astype(np.int16))
        hits = 100 * (true == predicted)
        results.append(
            {
                "step": step,
                "classes_seen": 5 + step,
                "top1": hits.mean(),
                "top1_base": hits[true < 5].mean(),
                "top1_old": hits[true < 4 + step].mean() if step else None,
                "top1_new": hits[true >= 4 + step].mean(),
                "top5": None,
            }
        )
    average = float(np.mean([result["top1"] for result in results]))
    content = {
        "recipe": "digits", "method": "", "loss": "", "seed": seed, "steps": results,
        "average_incremental_accuracy": average, "final_top1": results[-1]["top1"],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content))
    protocol = {
        "class_order": list(range(10)),
        "class_names": list("0123456789"),
        "steps": [[0, 1, 2, 3, 4], [5], [6], [7], [8], [9]],
        "dataset": {"name": "digits"} | {split: {"sha256": images, "images": 1} for split in ("train", "val")},
    }
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return content


def written(out, name="bars", scale="cpu"):
    """The text of a table and its lines by label."""
    table = tables.table_of(CONTENT, name, scale)
    text = table_text.write(table, out)
    lines = csv.DictReader((out / f"{name}-{scale}.csv").read_text().splitlines())
    return text, {line["row"]: line for line in lines}


def test_mean_deviation_and_paired_difference(tmp_path):
    plain = [make_run(tmp_path, "softmax", seed, 0.4) for seed in (0, 1, 2)]
    ours = [make_run(tmp_path, "balanced", seed, 0.6) for seed in (0, 1)]
    _, rows = written(tmp_path)
    average = {name: np.array([r["average_incremental_accuracy"] for r in runs]) for name, runs in
               (("plain", plain), ("ours", ours))}  # fmt: skip
    for name, values in average.items():
        assert rows[name]["average incremental"] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
        assert rows[name]["seeds"] == str(len(values))
    gain = (average["ours"] - average["plain"][:2]).mean()  # the third seed has no counterpart
    assert rows["ours"]["difference"] == f"{gain:+.2f}"
    low, high = map(float, rows["ours"]["95 % interval"].split(" to "))
    assert low < gain < high
    finals = np.array([run["steps"][-1]["top1_old"] for run in ours])
    assert rows["ours"]["final old"] == f"{finals.mean():.2f} ± {finals.std(ddof=1):.2f}"
    bases = np.array([run["steps"][0]["top1"] for run in ours])
    assert rows["ours"]["base step"] == f"{bases.mean():.2f} ± {bases.std(ddof=1):.2f}"


def on_cifar100(folder):
    """Make it a run on the published images."""
    expected = published.table()["cifar100"]
    protocol = json.loads((folder / "protocol.json").read_text()) | {"class_names": expected.class_names}
    for split in ("train", "val"):
        protocol["dataset"][split]["identity"] = getattr(expected, split).identity
    (folder / "protocol.json").write_text(json.dumps(protocol))


def test_no_distance_to_the_paper_stands_beside_other_images(tmp_path):
    make_run(tmp_path, "balanced", 0, 0.6)
    make_run(tmp_path, "softmax", 0, 0.6)
    on_cifar100(folder_of(tmp_path, "balanced", 0))
    text, rows = written(tmp_path, scale="paper")
    assert rows["ours"]["minus published"] != "-"
    assert rows["plain"]["minus published"] == "-"
    assert "not known to be CIFAR-100" in text
    assert "published average (CIFAR-100) |" in text
    assert rows["ours"]["published average (CIFAR-100)"] == "62.22"
    assert (rows["ours"]["fidelity"], rows["plain"]["fidelity"]) == ("unchanged", "modified: other data")


def test_the_distance_to_the_paper_stands_at_its_own_scale_only(tmp_path):
    averages = [make_run(tmp_path, "balanced", seed, 0.6)["average_incremental_accuracy"] for seed in (0, 1)]
    for seed in (0, 1):
        on_cifar100(folder_of(tmp_path, "balanced", seed))
    text, rows = written(tmp_path, scale="paper")
    assert rows["ours"]["minus published"] == f"{np.mean(averages) - 62.22:+.2f}"
    assert rows["plain"]["minus published"] == "-"
    assert (rows["ours"]["fidelity"], rows["plain"]["fidelity"]) == ("unchanged", "-")
    assert "not the paper's data set" not in text
    text, rows = written(tmp_path, scale="cpu")
    assert "minus published" not in rows["ours"]
    assert rows["ours"]["published average"] == "62.22"
    assert rows["ours"]["fidelity"] == "modified: another protocol and schedule"
    assert "not the paper's data set" in text


def test_a_scale_with_a_folder_of_its_own_has_its_own_runs_and_no_distance_to_the_paper(tmp_path):
    """Rows of the same name and seed in one --out: each table counts those of its scale."""
    full = make_run(tmp_path, "balanced", 0, 0.6)["average_incremental_accuracy"]
    fewer = make_run(tmp_path / "short", "balanced", 0, 0.4, settings=["epochs=9"])["average_incremental_accuracy"]
    make_run(tmp_path / "short", "balanced", 1, 0.5)  # not this scale's settings
    for out in (tmp_path, tmp_path / "short"):
        on_cifar100(folder_of(out, "balanced", 0))
    for scale, average in (("paper", full), ("short", fewer)):
        text, rows = written(tmp_path, scale=scale)
        assert (rows["ours"]["seeds"], rows["ours"]["average incremental"]) == ("1", f"{average:.2f}")
        of_what = " (40 epochs)" if scale == "short" else ""
        assert rows["ours"][f"published average{of_what}"] == "62.22"
        assert rows["ours"]["fidelity"] == ("modified: epochs=9" if scale == "short" else "unchanged")
        assert ("minus published" in rows["ours"]) == (scale == "paper")
        assert ('Scale "short": 9 epochs, not 40.' in text) == (scale == "short")


def test_only_rows_that_were_asked_for_or_have_runs_stand_in_a_table(tmp_path):
    make_run(tmp_path, "balanced", 0, 0.6)
    table = tables.table_of(CONTENT, "curves", "cpu")
    text = table_text.write(table, tmp_path, tables.only(table, ["meta"]))
    lines = list(csv.DictReader((tmp_path / "curves-cpu.csv").read_text().splitlines()))
    assert [(line["row"], line["seeds"]) for line in lines] == [("alpha 1.0", "1"), ("Meta", "-")]
    assert "Not asked for, and without a finished run: alpha 0.5 (5 steps)." in text
    assert '"-" under seeds: no finished run yet.' in text
    assert "Not asked for" not in written(tmp_path, "curves")[0]


def test_a_table_says_its_precision_and_whether_there_is_a_deviation(tmp_path):
    text, _ = written(tmp_path)
    assert "trained in" not in text
    assert "No run is finished yet." in text
    make_run(tmp_path, "balanced", 0, 0.6, settings=["precision=fp32"])
    text, rows = written(tmp_path)
    assert "All runs were trained in fp32." in (tmp_path / "bars-cpu.md").read_text()
    assert (rows["ours"]["precision"], rows["plain"]["precision"]) == ("fp32", "-")
    assert "Top-1 in percent, one seed each, so no deviation;" in text
    make_run(tmp_path, "balanced", 1, 0.6, settings=["precision=fp32"])
    assert "mean ± standard deviation over seeds" in written(tmp_path)[0]


def test_the_text_says_what_the_interval_is_over(tmp_path):
    text, rows = written(tmp_path)
    assert "bootstrap" not in text  # nothing has run
    assert rows["plain"]["published average"] == "43.80"
    make_run(tmp_path, "softmax", 0, 0.4)
    make_run(tmp_path, "balanced", 0, 0.6)
    text, _ = written(tmp_path)
    assert "interval over test images." in text
    assert "one seed only test images are drawn" in text
    make_run(tmp_path, "softmax", 1, 0.4)
    make_run(tmp_path, "balanced", 1, 0.6)
    text, _ = written(tmp_path)
    assert "interval over seeds and test images." in text
    assert "one seed only" not in text


@pytest.mark.parametrize(
    "other", [{"settings": ["epochs=3"]}, {"steps": 4}], ids=["other settings", "not all of its steps"]
)
def test_only_finished_runs_with_the_settings_of_the_row_are_counted(tmp_path, other):
    make_run(tmp_path, "softmax", 0, 0.4)
    make_run(tmp_path, "softmax", 1, 0.4, **other)
    (tmp_path / "digits/softmax-s2.log").touch()
    (tmp_path / "digits/softmax-spare").mkdir()
    _, rows = written(tmp_path)
    assert rows["plain"]["seeds"] == "1"


def test_damaged_predictions_are_named(tmp_path):
    make_run(tmp_path, "softmax", 0, 0.4)
    make_run(tmp_path, "balanced", 0, 0.6)
    (tmp_path / "digits/balanced-s0/predictions/step_3.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"balanced-s0/predictions/step_3\.npy: damaged"):
        written(tmp_path)


def test_curves_show_every_published_metric_over_the_key(tmp_path):
    ours = {row: [make_run(tmp_path, row, seed, skill) for seed in (0, 1)] for row, skill in
            (("alpha_0.5", 0.5), ("balanced", 0.6), ("meta", 0.7))}  # fmt: skip
    table = tables.table_of(CONTENT, "curves", "cpu")
    found = tables.finished_runs(table, tmp_path)
    axis = Figure().subplots()
    runs = {entry.row: list(found[entry.row, 5].values()) for entry in table.entries}
    table_figures.draw_curves(axis, table.entries, runs, "theirs", "alpha")
    drawn = [tuple(map(tuple, line.get_xydata().round(6).tolist())) for line in axis.get_lines()]
    for key in ("average_incremental_accuracy", "final"):
        mean = {
            row: np.mean([r[key] if key in r else r["steps"][-1]["top1"] for r in results]).round(6)
            for row, results in ours.items()
        }
        assert ((0.5, mean["alpha_0.5"]), (1.0, mean["balanced"])) in drawn
        assert ((2.0, mean["meta"]),) in drawn  # to the right of the largest alpha, under its own name
    assert ((0.5, 63.8), (1.0, 62.22)) in drawn
    assert ((0.5, 55.44), (1.0, 54.55)) in drawn
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.5", "1", "Meta"]
    assert "final, base classes" not in axis.get_legend_handles_labels()[1]  # not published here


def test_runs_on_different_images_never_share_a_table(tmp_path):
    make_run(tmp_path, "softmax", 0, 0.5)
    make_run(tmp_path, "balanced", 0, 0.7, images="b")
    with pytest.raises(UserError, match="different images"):
        written(tmp_path)


def test_runs_of_two_precisions_never_share_a_table(tmp_path):
    make_run(tmp_path, "softmax", 0, 0.5, settings=["precision=bf16"])
    assert written(tmp_path)[1]["plain"]["seeds"] == "1"  # whatever this machine would take itself
    table = tables.table_of(CONTENT, "bars", "cpu")
    assert tables.precision_of(table.entries, tmp_path) == "bf16"
    make_run(tmp_path, "balanced", 0, 0.6, settings=["precision=fp32"])
    with pytest.raises(UserError, match=r"one table cannot hold: bf16 by .* and fp32 by .*; move one"):
        written(tmp_path)


def test_what_is_missing_goes_on_in_the_precision_of_the_whole_table(tmp_path):
    """Whichever rows were chosen: a table that cannot be written must not be trained for."""
    make_run(tmp_path, "softmax", 0, 0.5, settings=["precision=bf16"])
    table = tables.table_of(CONTENT, "bars", "cpu")
    work = WorkList(tables.only(table, ["balanced"]), [0], tmp_path, None, table=table)
    assert [job.entry.row for job in work.missing] == ["balanced"]
    assert all("precision=bf16" in work.command(job) for job in work.missing)
    assert f"as the runs in {tmp_path} have it" in work.why
    chosen = tables.only(table, ["balanced"])
    assert WorkList(chosen, [0], tmp_path, None, table=table, wanted="bf16").precision == "bf16"
    with pytest.raises(UserError, match=r"precision fp32: the runs of this table that are in .* are in bf16"):
        WorkList(table.entries, [0], tmp_path, None, wanted="fp32")


def test_runs_of_other_settings_do_not_decide_the_precision(tmp_path):
    make_run(tmp_path, "softmax", 0, 0.5, settings=["precision=fp32"])
    make_run(tmp_path, "softmax", 1, 0.5, settings=["precision=bf16", "epochs=3"])
    table = tables.table_of(CONTENT, "bars", "cpu")
    assert tables.precision_of(table.entries, tmp_path) == "fp32"
    assert written(tmp_path)[1]["plain"]["seeds"] == "1"


def test_a_scale_of_the_papers_data_says_where_the_images_are_others(tmp_path):
    for scale, warned in (("paper", True), ("short", True), ("cpu", False)):
        table = tables.table_of(CONTENT, "bars", scale)
        assert ("not known to be CIFAR-100" in " ".join(table_text.notes(table, set(), paper_data=False))) == warned


def in_order(folder, order):
    """Make it a run whose classes come in this order."""
    protocol = json.loads((folder / "protocol.json").read_text())
    steps = [order[:5], *([c] for c in order[5:])]
    (folder / "protocol.json").write_text(json.dumps(protocol | {"class_order": order, "steps": steps}))


def test_seeds_with_class_orders_of_their_own_are_paired_by_class(tmp_path):
    """The images of a class, not of a place in the order, are drawn once for all seeds."""
    for seed in (0, 1):
        make_run(tmp_path, "softmax", seed, 0.4)
        make_run(tmp_path, "balanced", seed, 0.6)
    one_order = written(tmp_path)
    assert "All seeds have one class order" in one_order[0]
    for row in ("softmax", "balanced"):
        in_order(folder_of(tmp_path, row, 1), [9, 3, 1, 0, 2, 8, 7, 6, 5, 4])
    text, rows = written(tmp_path)
    assert "Each seed has a class order of its own, the same in every row." in text
    assert rows["ours"]["difference"] == one_order[1]["ours"]["difference"]
    first, other = (Run(folder_of(tmp_path, "balanced", seed)) for seed in (0, 1))
    order = first.protocol.class_order
    for step, found in enumerate(table_text.predictions(other, order)):
        classes = [[other.protocol.class_order[place] for place in pair] for pair in other.predictions(step).tolist()]
        assert [[order[place] for place in pair] for pair in found.tolist()] == classes


def test_rows_whose_classes_come_in_other_steps_are_not_paired(tmp_path):
    """In the first run of a pair, or in the second one only: their test images are others after a step."""
    for seed in (0, 1):
        make_run(tmp_path, "softmax", seed, 0.4)
        make_run(tmp_path, "balanced", seed, 0.6)
    text, rows = written(tmp_path)
    assert rows["ours"]["difference"].startswith("+")
    assert "No difference" not in text
    in_order(folder_of(tmp_path, "balanced", 1), [0, 1, 2, 3, 4, 6, 5, 7, 8, 9])
    text, rows = written(tmp_path)
    assert "difference" not in rows["ours"]
    assert text.count("No difference where classes are others, or come in other steps: ours.") == 1
    assert "bootstrap" not in text


def test_the_numbers_of_a_table_are_also_there_in_full(tmp_path):
    runs = {seed: make_run(tmp_path, "balanced", seed, 0.6) for seed in (0, 3)}
    written(tmp_path)
    plain, ours = json.loads((tmp_path / "bars-cpu.json").read_text())["rows"]
    assert (plain["row"], plain["seeds"], plain["mean"], plain["difference"]) == ("plain", {}, {}, None)
    for seed, run in runs.items():
        values = ours["seeds"][str(seed)]
        assert values["average incremental"] == run["average_incremental_accuracy"]
        assert values["final old"] == run["steps"][-1]["top1_old"]
    finals = [run["final_top1"] for run in runs.values()]
    assert ours["mean"]["final"] == pytest.approx(np.mean(finals))
    assert ours["deviation"]["final"] == pytest.approx(np.std(finals, ddof=1))
