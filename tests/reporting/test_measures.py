"""Measures of what was forgotten, against their definitions written out image by image, and where reports show them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from fastil.errors import UserError
from fastil.reporting.measures import measures_of
from fastil.reporting.report import write_report
from fastil.reporting.runs import Run

AVALANCHE = Path(__file__).with_name("avalanche_forgetting.json")
RUNS = sorted((Path(__file__).parents[2] / "docs/runs/short").iterdir())


def by_hand(predictions, seen):
    """The definitions, with every accuracy counted by looking at one image after the other."""
    starts = [0, *seen[:-1]]

    def accuracy(step, classes):
        hits = [int(p) == int(t) for t, p in predictions[step] if int(t) in classes]
        return 100 * hits.count(True) / len(hits)

    groups = [range(a, b) for a, b in zip(starts, seen, strict=True)]
    a = [[accuracy(k, groups[j]) for j in range(k + 1)] for k in range(len(seen))]
    forgetting, transfer, non_base = [None], [None], [None]
    for k in range(1, len(seen)):
        best = [max(a[before][j] for before in range(j, k)) for j in range(k)]
        forgetting.append(sum(best[j] - a[k][j] for j in range(k)) / k)
        transfer.append(sum(a[k][j] - a[j][j] for j in range(k)) / k)
        non_base.append(accuracy(k, range(seen[0], seen[k])))
    return a, [sum(row) / len(row) for row in a], forgetting, transfer, non_base


def compare(measures, predictions, seen):
    for found, wanted in zip(measures.dump().values(), by_hand(predictions, seen), strict=True):
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-12))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
@settings(deadline=None, database=None, derandomize=True, max_examples=60)
def test_measures_are_what_their_definitions_say(sizes, seed):
    random, seen = np.random.default_rng(seed), np.cumsum(sizes).tolist()
    predictions = []
    for classes in seen:
        true = np.repeat(np.arange(classes), random.integers(1, 6, classes))
        right = random.random(len(true)) < 0.6
        predicted = np.where(right, true, random.integers(0, classes, len(true)))
        predictions.append(random.permutation(np.stack((true, predicted), 1)).astype(np.int16))
    compare(measures_of(predictions, seen), predictions, seen)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_run_from_before_there_were_measures_has_them(path):
    run = Run(path)
    seen = [step.classes_seen for step in run.results.steps]
    compare(run.measures, [np.load(path / f"predictions/step_{k}.npy") for k in range(len(seen))], seen)
    for measured, step in zip(run.measures.groups, run.results.steps, strict=True):
        assert measured[0] == pytest.approx(step.top1_base)
        assert measured[-1] == pytest.approx(step.top1_new)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_backward_transfer_is_the_forgetting_that_avalanche_computes(path):
    """Avalanche counts from the accuracy right after a group was learned, so its forgetting is backward transfer with
    the other sign. What its class returned for these predictions is in the file."""
    theirs = json.loads(AVALANCHE.read_text())["forgetting"]
    if path.name not in theirs:
        pytest.skip("Avalanche's class was not run on this one")
    for k, (of_groups, ours) in enumerate(zip(theirs[path.name], Run(path).measures.backward_transfer, strict=True)):
        assert sorted(of_groups, key=int) == [str(j) for j in range(k)]
        if k:
            assert ours == pytest.approx(-100 * sum(of_groups.values()) / k, abs=1e-9)


def test_forgetting_counts_from_the_best_and_transfer_from_the_first():
    """Two groups of one class of four images: 2 right, then 4, then 1 of group 0; group 1 has 3, then 3."""
    hits = [(2,), (4, 3), (1, 3, 0)]
    predictions = [
        np.array([(j, j if i < right else (j + 1) % 9) for j, right in enumerate(step) for i in range(4)])
        for step in hits
    ]
    measures = measures_of(predictions, [1, 2, 3])
    assert measures.groups == [[50.0], [100.0, 75.0], [25.0, 75.0, 0.0]]
    assert measures.forgetting == [None, -50.0, (75.0 + 0.0) / 2]
    assert measures.backward_transfer == [None, 50.0, (-25.0 + 0.0) / 2]
    assert measures.non_base == [None, 75.0, 37.5]


def test_a_group_without_an_image_is_damage(tmp_path):
    shutil.copytree(RUNS[0], tmp_path / "run")
    path = tmp_path / "run/predictions/step_1.npy"
    pairs = np.load(path)
    pairs[pairs[:, 0] >= 50, 0] = pairs[pairs[:, 0] >= 50, 1] = 0
    np.save(path, pairs)
    right = 100 * float((pairs[:, 0] == pairs[:, 1]).mean())
    results = json.loads((tmp_path / "run/results.json").read_text())
    results["steps"][1]["top1"] = right
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="step 1: no image of the classes of step 1"):
        _ = Run(tmp_path / "run").measures


def test_a_report_shows_them_and_says_where_they_cannot_be_had(tmp_path):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    shutil.copytree(RUNS[0], whole)
    shutil.copytree(RUNS[1], damaged)
    (damaged / "predictions/step_2.npy").write_bytes(b"no array")
    text, complete = write_report([whole, damaged], None, False)
    assert complete
    table = text.split("What was kept and forgotten")[1].split("\n\n")[1].splitlines()
    assert len(table) == 3
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    measures = Run(whole).measures
    wanted = (measures.average_over_groups, measures.non_base, measures.forgetting, measures.backward_transfer)
    assert cells[1:] == [f"{values[-1]:.2f}" for values in wanted]
    assert f"measures of {damaged}/predictions/step_2.npy: damaged" in text
    with pytest.raises(UserError, match="step_2"):
        _ = Run(damaged).measures


def test_the_confusion_of_a_run_that_kept_its_predictions_only(tmp_path):
    run = Run(RUNS[0])
    matrix = run.confusion(1)
    assert matrix.sum() == 6000
    assert np.diag(matrix).sum() / 60 == pytest.approx(run.curve[1])
    pairs = np.load(RUNS[0] / "predictions/step_1.npy")
    for true, predicted in ((3, 3), (3, 7), (59, 0)):
        assert matrix[true, predicted] == ((pairs == (true, predicted)).all(axis=1)).sum()


def test_a_run_writes_them_and_a_resume_writes_what_is_missing(tmp_path, fastil):
    path = tmp_path / "run"
    assert fastil("run", "digits", *TINY, "--out", path).returncode == 0
    written = (path / "measures.json").read_bytes()
    assert json.loads(written) == Run(path).measures.dump()
    (path / "measures.json").unlink()
    assert fastil("run", path, "--resume").returncode == 0
    assert (path / "measures.json").read_bytes() == written
