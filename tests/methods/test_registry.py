"""Methods from outside: in a file, in a module, installed; and that no run directory makes its code run."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import TINY, assert_user_error

from fastil.errors import UserError
from fastil.methods import METHODS, LossConfig, Method, MethodConfig, StepContext, find, register
from fastil.models import ModelConfig, build_network
from fastil.recipe import load

MINE = '''
from dataclasses import dataclass
from pathlib import Path

from fastil.methods import Method

Path({trace!r}).write_text("imported")


@dataclass(frozen=True)
class Config:
    mine_share: float = 0.5


class Mine(Method):
    """Half of the weight is on distillation, however many classes are old."""

    Config = Config

    def weigh(self, context):
        share = self.parts[self.name].mine_share if context.num_old else 0.0
        return 1 - share, share
'''
SETTINGS = ["digits", *TINY, "classes=6", "base_classes=4", "increment=2", "loss=softmax"]


@pytest.fixture(autouse=True)
def forgotten():
    before = set(METHODS)
    yield
    for name in set(METHODS) - before:
        del METHODS[name]


@pytest.fixture
def mine(tmp_path):
    """`method=` of a file that leaves a trace when it is imported, and that trace."""
    trace = tmp_path / "trace"
    (tmp_path / "mine.py").write_text(MINE.format(trace=str(trace)))
    return "method=mine.py:Mine", trace


def test_a_method_in_a_file_is_trained_killed_resumed_and_reported(fastil, start, tmp_path, mine):
    method, trace = mine
    settings = [*SETTINGS, method, "mine_share=0.25"]
    whole = fastil("run", *settings, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert (results["method"], len(results["steps"])) == ("mine.py:Mine", 2)
    assert "mine_share: 0.25" in (tmp_path / "whole/recipe.yaml").read_text()
    other = fastil("run", *SETTINGS, method, "mine_share=0.9", "--out", "other")
    assert other.returncode == 0, other.stderr
    assert (tmp_path / "other/metrics.jsonl").read_text() != (tmp_path / "whole/metrics.jsonl").read_text()
    killed, metrics = start("run", *settings, "--out", "killed"), tmp_path / "killed/metrics.jsonl"
    while killed.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    resumed = fastil("run", *settings, "--out", "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on at step" in resumed.stdout
    for file in ("results.json", "metrics.jsonl", "memory/step_1.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert_user_error(fastil("run", *SETTINGS, method, "--out", "whole", "--resume"), "mine_share was 0.25, now 0.5")
    trace.unlink()
    report = fastil("report", "whole", "other")
    assert report.returncode == 0, report.stderr
    assert "mine_share=0.25" in report.stdout
    assert "mine_share=0.9" in report.stdout
    assert not trace.exists()


def test_code_that_a_run_directory_names_is_not_imported(fastil, tmp_path, mine):
    method, trace = mine
    assert fastil("run", *SETTINGS, method, "--out", "run").returncode == 0
    trace.unlink()
    assert fastil("report", "run").returncode == 0
    plain = fastil("run", *SETTINGS, "--out", "run", "--resume")
    assert_user_error(plain, "method was mine.py:Mine, now il_baseline")
    based = fastil("run", *SETTINGS, "--base", "run", "--out", "based")
    assert_user_error(based, "mine.py:Mine", "not loaded")
    assert not trace.exists()
    assert fastil("run", *SETTINGS, method, "--out", "run", "--resume").returncode == 0
    assert trace.exists()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("nowhere.py:Mine", ["no file nowhere.py"]), ("mine.py:Other", ["has no Other"]),
        ("mine.py:dataclass", ["no subclass"]), ("nowhere.module:Mine", ["no module nowhere.module"]),
        ("broken.py:Mine", ["broken.py, line 2", "ZeroDivisionError"]), ("lucri", ["did you mean lucir?"]),
        ("json:JSONDecoder", ["no subclass"]), ("clash.py:Mine", ["key lr is taken"]),
    ],
)  # fmt: skip
def test_what_is_no_method_is_one_line(method, words, tmp_path, mine, monkeypatch):
    (tmp_path / "broken.py").write_text("x = 1\n1 / 0\n")
    (tmp_path / "clash.py").write_text((tmp_path / "mine.py").read_text().replace("mine_share: float", "lr: float"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load("digits", [f"method={method}", "loss=softmax"])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_an_installed_method_is_found_by_its_entry_point(monkeypatch):
    class Installed(Method):
        pass

    class Entry:
        name = "installed"

        def load(self):
            return Installed

    monkeypatch.setattr("fastil.methods.registry.entry_points", lambda group: [Entry()])
    assert find("installed", by_path=False) is Installed
    assert METHODS["installed"] is Installed


def test_register_takes_a_name_once():
    class Mine(Method):
        name = "of_my_own"

    assert register(Mine) is Mine is register(Mine)
    assert load("digits", ["method=of_my_own"]).procedure is Mine
    with pytest.raises(ValueError, match="method=of_my_own is"):
        register(type("Other", (Method,), {"name": "of_my_own"}))


def test_wa_gives_new_rows_the_mean_length_of_the_old_ones():
    network = build_network(ModelConfig("resnet8"), 10, 0)
    network.head.weight.data.copy_(torch.randn(network.head.weight.shape, generator=torch.Generator().manual_seed(0)))
    before = network.head.weight.detach().double().numpy()
    method = METHODS["wa"](MethodConfig("wa"), LossConfig("softmax"), 16, torch.device("cpu"))
    method.begin_step(StepContext(1, 6, 9, np.array([20] * 6 + [500] * 3 + [0] * 7)))
    assert method.weigh(method.context) == pytest.approx((1 / 3, 2 / 3 / 4))
    method.after_training(network, None, np.empty(0, dtype=np.int64), torch.empty(0))
    after = network.head.weight.detach().double().numpy()
    length = np.sqrt((before**2).sum(1))
    expected = before.copy()
    expected[6:9] *= length[:6].mean() / length[6:9].mean()
    np.testing.assert_allclose(after, expected, rtol=1e-6)
