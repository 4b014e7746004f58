"""What `fastil report` makes of the runs it is given: labels, runs that are there twice, one seed. No training."""

import json
import shutil

import pytest

from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.reporting.report import LONGEST, write_report

SEEN = (5, 6, 7, 8, 9, 10)


def make_run(folder, top1, *settings, images="8194c2aa"):
    """A finished run on digits, top-1 the same after each step."""
    folder.mkdir(parents=True)
    recipe = load("digits", ["precision=fp32", *settings])
    (folder / "recipe.yaml").write_text(recipe.dump())
    steps = [
        {"step": k, "classes_seen": n, "top1": top1, "top1_base": top1, "top1_old": top1 if k else None,
         "top1_new": top1, "top5": None}
        for k, n in enumerate(SEEN)
    ]  # fmt: skip
    results = {
        "recipe": "digits", "method": "il_baseline", "loss": recipe.loss.loss, "seed": recipe.train.seed,
        "steps": steps, "average_incremental_accuracy": top1, "final_top1": top1,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    protocol = {
        "class_order": list(range(10)), "class_names": list("0123456789"),
        "steps": [[0, 1, 2, 3, 4], [5], [6], [7], [8], [9]],
        "dataset": {"name": "digits"} | {split: {"sha256": images, "images": 1} for split in ("train", "val")},
    }  # fmt: skip
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return folder


def test_a_run_that_is_given_twice_is_used_once(tmp_path):
    run = make_run(tmp_path / "a", 50.0, "loss=softmax")
    once = write_report([run], None, False)[0]
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "link").symlink_to(run)
    text = write_report([run, tmp_path / "link", tmp_path / "copy"], None, False)[0]
    assert text.startswith(once)
    assert f"{tmp_path}/link: given twice, used once" in text
    assert f"{tmp_path}/copy: the same run as {run}, used once" in text


def test_two_runs_of_one_seed_that_came_to_different_results_are_refused(tmp_path):
    runs = [make_run(tmp_path / name, top1, "loss=softmax") for name, top1 in (("a", 50.0), ("b", 60.0))]
    with pytest.raises(UserError, match=r"the same run as .*give one of them"):
        write_report(runs, None, False)


def test_runs_of_other_numbers_of_processes_stand_apart(tmp_path):
    runs = [make_run(tmp_path / name, top1, "loss=softmax") for name, top1 in (("one", 50.0), ("two", 60.0))]
    path = runs[1] / "protocol.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ranks": 2, "ranks_so_far": [1, 2], "bn": "sync"}))
    text = write_report(runs, None, False)[0]
    assert "| il_baseline, softmax, processes=1 " in text, text
    assert "| il_baseline, softmax, processes=1 and 2 " in text, text


def test_a_difference_of_one_seed_has_no_deviation(tmp_path):
    runs = [
        make_run(tmp_path / f"{loss}{seed}", top1 + seed, f"loss={loss}", f"seed={seed}")
        for loss, top1 in (("softmax", 40.0), ("balanced", 60.0))
        for seed in (0, 1)
    ]
    text = write_report(runs[::2], None, False)[0]
    assert (
        "Top-1 in percent over all classes seen; one seed each, so no deviation. All runs were trained in fp32." in text
    )
    assert (
        "il_baseline, balanced minus il_baseline, softmax: +20.00 points with the same seed (one seed, no deviation)"
        in text
    )
    assert "±" not in text
    text = write_report(runs, None, False)[0]
    assert "mean ± standard deviation over seeds" in text
    assert (
        "il_baseline, balanced minus il_baseline, softmax: +20.00 ± 0.00 points on average, paired over seeds" in text
    )


def test_a_long_label_is_cut_and_told_whole_below_the_table(tmp_path):
    many = ["epochs=3", "base_epochs=4", "lr=0.01", "momentum=0.8", "exemplars_per_class=9", "temperature=3", "pad=2"]
    runs = [make_run(tmp_path / "plain", 50.0), make_run(tmp_path / "many", 60.0, *many)]
    text = write_report(runs, None, False)[0]
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert max(len(line.split("|")[1].strip()) for line in table) <= LONGEST + len(", … [1]")
    assert table[-1].split("|")[1].strip().endswith(", … [1]")
    whole = next(line for line in text.splitlines() if line.startswith("[1] il_baseline, balanced, "))
    for setting in ("epochs=3", "base_epochs=4", "lr=0.01", "momentum=0.8", "exemplars_per_class=9", "temperature=3.0"):
        assert setting in whole


def test_the_hash_in_a_label_is_explained(tmp_path):
    runs = [make_run(tmp_path / "a", 50.0), make_run(tmp_path / "b", 60.0, images="beef0011")]
    text = write_report(runs, None, False)[0]
    assert "images=digits (sha256 8194c2)" in text
    assert "first six digits of the sha256 of its training images" in text
    assert "sha256" not in write_report(runs[:1], None, False)[0]


def test_the_heading_names_what_all_runs_changed_and_no_label_says(tmp_path):
    """A table of two epochs looked like one of the recipe."""

    def heading(*runs):
        paths = [make_run(tmp_path / "-".join(settings), 50.0 + i, *settings) for i, settings in enumerate(runs)]
        return write_report(paths, None, False)[0].splitlines()[0]

    assert heading(("loss=softmax",), ("loss=balanced",)).startswith("Recipe digits. Top-1")
    assert "digits with epochs=2. " in heading(("loss=softmax", "epochs=2"), ("loss=balanced", "epochs=2"))
    only_one = heading(("loss=softmax", "epochs=3"), ("loss=balanced", "seed=1"))
    assert only_one.startswith("Recipe digits. Top-1")
