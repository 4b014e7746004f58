"""The files of a run directory: what is read of them, by older versions too, and a line for every kind of damage."""

import json

import pytest

from fastil.errors import UserError
from fastil.evaluation import StepResult
from fastil.reporting.run_files import ProtocolFile, Results, read_metrics, read_protocol, read_results, read_timings

STEP = {"step": 0, "classes_seen": 2, "top1": 75.5, "top1_base": 75.5, "top1_old": None, "top1_new": 75.5, "top5": None}
LATER = {"step": 1, "classes_seen": 3, "top1": 50, "top1_base": 40.0, "top1_old": 40.0, "top1_new": 60.0, "top5": None}
SPLIT = {"sha256": "a" * 64, "images": 30, "identity": "pixels:1"}
LINE = {"step": 1, "phase": "train", "epoch": 1, "epochs": 2, "lr": 0.1, "loss": 0.5, "train_top1": 90.0, "images": 20}
CONTENT = {
    "results.json": {
        "recipe": "digits", "method": "il_baseline", "loss": "balanced", "seed": 3, "steps": [STEP, LATER],
        "average_incremental_accuracy": 62.75, "final_top1": 50.0,
    },
    "protocol.json": {
        "class_order": [2, 0, 1], "class_names": ["a", "b", "c"], "class_list_hash": "123", "steps": [[2, 0], [1]],
        "dataset": {"name": "digits", "train": SPLIT, "val": SPLIT}, "effective": [{"step": 0, "lr": 0.1, "odd": None}],
    },
    "metrics.jsonl": LINE,
    "timings.json": {
        "steps": {"0": {"train": 1.5, "images_per_second": None}}, "versions": {"python": "3.11"},
        "machine": {"cores": 2},
    },
}  # fmt: skip
READ = {
    "results.json": read_results, "protocol.json": read_protocol, "metrics.jsonl": read_metrics,
    "timings.json": read_timings,
}  # fmt: skip


DROP = object()


def written(folder, name, **changes):
    """The file with other values, by the place of each: steps__0__top1=3; DROP leaves the key out."""
    content = json.loads(json.dumps(CONTENT[name]))
    for place, value in changes.items():
        *path, last = place.split("__")
        at = content
        for part in path:
            at = at[int(part) if isinstance(at, list) else part]
        if value is DROP:
            del at[last]
        else:
            at[int(last) if isinstance(at, list) else last] = value
    (folder / name).write_text(json.dumps(content) + "\n")


def complaint(folder, name):
    """The message of the error that reading the file ends in: one line that names the file and what helps."""
    with pytest.raises(UserError) as caught:
        READ[name](folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ")
    assert "\n" not in message
    assert "; " in message
    return message


def test_what_was_written_is_read(tmp_path):
    for name in CONTENT:
        written(tmp_path, name)
    results = read_results(tmp_path)
    assert (results.loss, results.seed, results.final_top1) == ("balanced", 3, 50.0)
    assert results.steps[1] == StepResult(**LATER)
    protocol = read_protocol(tmp_path)
    assert (protocol.steps, protocol.dataset.train.images, protocol.dataset.val.bytes) == ([[2, 0], [1]], 30, None)
    assert protocol.effective == CONTENT["protocol.json"]["effective"]
    (line,) = read_metrics(tmp_path)
    assert line.model_dump(exclude_unset=True) == LINE
    assert read_timings(tmp_path).steps == CONTENT["timings.json"]["steps"]


def test_reading_and_writing_again_changes_no_byte(tmp_path):
    for name, model in (("results.json", Results), ("protocol.json", ProtocolFile)):
        content = CONTENT[name] | ({"steps": [STEP | {"nme_top1": 1 / 3}]} if model is Results else {})
        again = model.model_validate(content).model_dump(exclude_unset=True)
        assert json.dumps(again) == json.dumps(content)
    line = LINE | {"scale": 1.25, "alpha": [0.1, 1e-9], "of a later version": [{"x": 1}]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (again,) = read_metrics(tmp_path)
    assert json.dumps(again.model_dump(exclude_unset=True)) == json.dumps(line)


def test_what_older_versions_lack_and_later_ones_add_is_no_damage(tmp_path):
    older = dict.fromkeys(("dataset__train__identity", "dataset__val__identity", "effective", "class_list_hash"), DROP)
    written(tmp_path, "protocol.json", **older, later=[1], dataset__train__later=None)
    protocol = read_protocol(tmp_path)
    assert (protocol.dataset.train.identity, protocol.effective) == (None, [])
    written(tmp_path, "results.json", later={}, steps__0__later="x")
    assert read_results(tmp_path).steps[0].nme_top1 is None


def test_names_that_are_no_valid_text_are_read(tmp_path):
    written(tmp_path, "protocol.json", class_names=["\udce9", "\n", ""], dataset__name="\udce9")
    assert read_protocol(tmp_path).class_names[0] == "\udce9"


def test_a_half_written_last_line_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(LINE).encode() + b"\n"
    for rest in (b"", b"{", whole[:-1], b"\xff"):
        path.write_bytes(2 * whole + rest)
        assert [line.images for line in read_metrics(tmp_path)] == [20, 20]
    path.write_bytes(b"")
    assert read_metrics(tmp_path) == []


DAMAGES = {
    "empty": b"\n", "cut off": None, "a list": b"[]\n", "a number": b"7\n", "null": b"null\n", "no keys": b"{}\n",
    "text": b"precious\n", "binary": b"\x93NUMPY\x00\xff\n", "zeros": bytes(1000) + b"\n",
    "deep": b"[" * 100_000 + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CONTENT)
def test_damage_of_any_kind_is_named(tmp_path, name, damage):
    written(tmp_path, name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(DAMAGES[damage] or content[: len(content) // 2] + b"\n")
    assert "damaged (" in complaint(tmp_path, name)


@pytest.mark.parametrize("name", CONTENT)
def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path, name):
    assert "missing" in complaint(tmp_path, name)
    (tmp_path / name).mkdir()
    assert "cannot be read (not a file)" in complaint(tmp_path, name)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("results.json", "seed", -1), ("results.json", "seed", 1.5), ("results.json", "seed", True),
        ("results.json", "loss", None), ("results.json", "loss", DROP), ("results.json", "final_top1", DROP),
        ("results.json", "average_incremental_accuracy", NAN), ("results.json", "average_incremental_accuracy", "62"),
        ("results.json", "average_incremental_accuracy", 100.1), ("results.json", "steps", []),
        ("results.json", "steps", {}), ("results.json", "steps__1", 5), ("results.json", "steps__1__top1", None),
        ("results.json", "steps__1__top1", -0.1), ("results.json", "steps__1__top1_old", INF),
        ("results.json", "steps__1__top1_new", "60"), ("results.json", "steps__0__classes_seen", -5),
        ("results.json", "steps__0__classes_seen", "2"), ("results.json", "steps__0__top5", 10**400),
        ("protocol.json", "class_names", "abc"), ("protocol.json", "class_names__1", 5),
        ("protocol.json", "class_order", [0, 1, -2]), ("protocol.json", "steps", []), ("protocol.json", "steps__0", 0),
        ("protocol.json", "steps__0__0", 0.5), ("protocol.json", "steps__0__0", -1), ("protocol.json", "dataset", DROP),
        ("protocol.json", "dataset__name", 3), ("protocol.json", "dataset__size", [8, -8]),
        ("protocol.json", "dataset__val", []),
        ("protocol.json", "dataset__train__sha256", DROP), ("protocol.json", "dataset__train__images", -30),
        ("protocol.json", "dataset__train__identity", 1), ("protocol.json", "dataset__train__bytes", NAN),
        ("protocol.json", "effective", 5), ("protocol.json", "effective__0", {}), ("protocol.json", "effective__0", 3),
        ("protocol.json", "effective__0__lr", NAN), ("protocol.json", "class_list_hash", None),
        ("metrics.jsonl", "step", -1), ("metrics.jsonl", "step", DROP), ("metrics.jsonl", "phase", 1),
        ("metrics.jsonl", "images", "20"), ("metrics.jsonl", "loss", NAN), ("metrics.jsonl", "train_top1", 101),
        ("metrics.jsonl", "alpha", 0), ("metrics.jsonl", "alpha", NAN), ("metrics.jsonl", "alpha", "much"),
        ("metrics.jsonl", "alpha", [1, [2]]), ("metrics.jsonl", "alpha", []), ("metrics.jsonl", "alpha", [1, -INF]),
        ("timings.json", "steps", {}), ("timings.json", "steps__0", {}), ("timings.json", "steps__0__train", NAN),
        ("timings.json", "machine", DROP), ("timings.json", "versions", []),
    ],
)  # fmt: skip
def test_the_field_that_is_wrong_is_named(tmp_path, name, place, value):
    written(tmp_path, name, **{place: value})
    line = "line 1, " if name == "metrics.jsonl" else ""
    assert f"damaged ({line}{place.replace('__', '.')}" in complaint(tmp_path, name)


def test_steps_and_classes_that_do_not_fit_are_named(tmp_path):
    written(tmp_path, "results.json", steps=[LATER])
    assert "damaged (steps: not numbered from 0 on); run again with --resume" in complaint(tmp_path, "results.json")
    written(tmp_path, "protocol.json", steps=[[0, 1], [7]])
    assert "damaged (steps: class 7 has no name in class_names)" in complaint(tmp_path, "protocol.json")


def test_the_line_that_is_damaged_is_numbered(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(2 * (json.dumps(LINE) + "\n") + "\n" + json.dumps(LINE) + "\n")
    assert "damaged (line 3, not JSON)" in complaint(tmp_path, "metrics.jsonl")
