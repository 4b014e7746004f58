"""Which machine a comparison of precisions is said to have run on."""

import json

import pytest

from bench.precision import machine_of

THERE = {"device": "CPU (1 threads)", "processor": "a processor", "cores": 2}


@pytest.mark.parametrize("other", [None, {"machine": THERE | {"processor": "another"}}, {"versions": {"torch": "2"}}])
def test_it_is_that_of_the_runs_and_one_alone(tmp_path, other):
    of = {"steps": {"0": {"train": 1.0}}, "versions": {"torch": "1"}, "machine": THERE}
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        (folder / "timings.json").write_text(json.dumps(of | (other or {}) if folder.name == "c" else of))
    if other is None:
        assert machine_of(folders) == THERE | {"torch": "1"}
    else:
        with pytest.raises(SystemExit, match="train all in another --out"):
            machine_of(folders)
