"""Methods from outside: in a file, in a module, installed; and that no run directory makes its code run."""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, assert_user_error

from fastil.errors import UserError
from fastil.methods import METHODS, LossConfig, Method, MethodConfig, StepContext, find, installed, register
from fastil.models import ModelConfig, build_network
from fastil.recipe_file import load, read_effective
from fastil.training.base_step import base_identity

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

    def loss_weights(self, context):
        share = self.config.mine_share if context.num_old else 0.0
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
    settings = tmp_path / "run/recipe.yaml"
    (tmp_path / "evil.yaml").write_text("method: mine.py:Mine\nloss: softmax\n")
    settings.write_text(settings.read_text().replace("recipe: digits", "recipe: evil.yaml"))
    assert fastil("report", "run").returncode == 0
    settings.write_text(settings.read_text().replace("recipe: evil.yaml", "recipe: digits"))
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
        ("mine.py:dataclass", ["not a subclass"]), ("nowhere.module:Mine", ["no module nowhere.module"]),
        ("broken.py:Mine", ["broken.py, line 2", "ZeroDivisionError"]), ("lucri", ["did you mean lucir?"]),
        ("json:JSONDecoder", ["not a subclass"]), ("clash.py:Mine", ["key lr is taken"]),
        ("head.py:Mine", ["key recipe is taken"]), ("typo.py:Mine", ["typo.py, line 1"]),
        ("exit.py:Mine", ["SystemExit"]),
        ("plain.py:Mine", ["not a dataclass"]), ("path.py:Mine", ["cannot be written as YAML"]),
    ],
)  # fmt: skip
def test_what_is_no_method_is_one_line(method, words, tmp_path, mine, monkeypatch):
    (tmp_path / "broken.py").write_text("x = 1\n1 / 0\n")
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "clash.py").write_text(text.replace("mine_share: float", "lr: float"))
    (tmp_path / "head.py").write_text(text.replace("mine_share: float", "recipe: float"))
    (tmp_path / "path.py").write_text(text.replace("mine_share: float = 0.5", "mine_share: Path = Path()"))
    (tmp_path / "plain.py").write_text(text.replace("@dataclass(frozen=True)\n", ""))
    (tmp_path / "typo.py").write_text("class Mine(:\n")
    (tmp_path / "exit.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load("digits", [f"method={method}", "loss=softmax"])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def entries(monkeypatch, load):
    entry = SimpleNamespace(name="installed", load=load)
    monkeypatch.setattr("fastil.methods.registry.entry_points", lambda group: [entry])


def test_an_installed_method_is_found_by_its_entry_point(monkeypatch):
    class Installed(Method):
        def loss_weights(self, context):
            return 1.0, 0.0

    entries(monkeypatch, lambda: Installed)
    assert installed("installed") is Installed is find("installed")
    assert METHODS["installed"] is Installed


def test_an_installed_method_that_is_broken_is_one_line_and_keeps_no_run_from_being_read(monkeypatch, tmp_path):
    def broken():
        raise ImportError("libmissing.so")

    path = tmp_path / "recipe.yaml"
    text = load("digits", ["loss=softmax"]).in_precision("fp32").dump()
    path.write_text(text.replace("method: il_baseline", "method: installed"))
    for given, words in ((broken, "libmissing.so"), (lambda: dict, "not a subclass")):
        entries(monkeypatch, given)
        with pytest.raises(UserError, match=f"method=installed: .*{words}"):
            find("installed")
        assert read_effective(path).method.method == "installed"
    assert installed("of_a_script_of_somebody") is None


def test_keys_of_a_method_that_is_not_loaded_tell_its_runs_apart(tmp_path, mine):
    """Also the keys of other methods that it may read."""
    recipes = []
    for temperature in (2.0, 4.0):
        path = tmp_path / f"{temperature}.yaml"
        text = load("digits", ["loss=softmax", f"temperature={temperature}"]).in_precision("fp32").dump()
        path.write_text(text.replace("method: il_baseline", "method: mine.py:Mine") + "meta_rate: 3\n")
        recipes.append(read_effective(path))
    one, other = (recipe.identity() for recipe in recipes)
    assert [key for key in one if one[key] != other[key]] == ["temperature"]
    assert one["meta_rate"] == 3
    with pytest.raises(UserError, match="is not loaded"):
        _ = recipes[0].procedure


def test_a_method_that_inherits_keys_has_them(monkeypatch, tmp_path):
    (tmp_path / "child.py").write_text("from fastil.methods.bic import BiC\nclass Child(BiC):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    recipe = load("digits", ["method=child.py:Child", "loss=softmax", "bic_lr=0.2"])
    assert recipe.procedure.__name__ == "Child"
    assert recipe.reader("bic_lr") is None
    assert load("digits", ["method=fastil.methods.lucir:Lucir", "head=cosine"]).procedure is METHODS["lucir"]
    assert METHODS["lucir"].name == "lucir"


def test_two_files_of_one_name_are_two_methods(monkeypatch, tmp_path, mine):
    for folder, share in (("a", "0.5"), ("b", "0.9")):
        (tmp_path / folder).mkdir()
        text = "from __future__ import annotations\n" + (tmp_path / "mine.py").read_text().replace("0.5", share)
        (tmp_path / folder / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    shares = [load("digits", [f"method={f}/mine.py:Mine", "loss=softmax"]).keys()["mine_share"] for f in "aba"]
    assert shares == [0.5, 0.9, 0.5]


def test_a_base_step_is_shared_only_where_a_method_says_what_trains_it(monkeypatch, tmp_path, mine):
    monkeypatch.chdir(tmp_path)
    settings = [mine[0], "loss=softmax"]
    ours, theirs = (base_identity(load("digits", [*settings, f"mine_share={s}"])) for s in (0.5, 0.6))
    assert ours != theirs
    assert ours != base_identity(load("digits", ["loss=softmax"]))
    shared = load("digits", settings)
    shared.procedure.base_training = "cross-entropy"
    assert base_identity(shared) == base_identity(load("digits", ["loss=softmax"]))


def test_register_takes_a_name_once():
    class Mine(Method):
        name = "of_my_own"

        def loss_weights(self, context):
            return 1.0, 0.0

    assert register(Mine) is Mine is register(Mine)
    assert load("digits", ["method=of_my_own"]).procedure is Mine
    with pytest.raises(UserError, match="method=of_my_own: is"):
        register(type("Other", (Method,), {"name": "of_my_own", "loss_weights": Mine.loss_weights}))


def test_wa_gives_new_rows_the_mean_length_of_the_old_ones():
    network = build_network(ModelConfig("resnet8"), 10, 0)
    network.head.weight.data.copy_(torch.randn(network.head.weight.shape, generator=torch.Generator().manual_seed(0)))
    before = network.head.weight.detach().double().numpy()
    method = METHODS["wa"](MethodConfig("wa"), LossConfig("softmax"), 16, torch.device("cpu"))
    method.begin_step(StepContext(1, 6, 9, np.array([20] * 6 + [500] * 3 + [0] * 7)))
    assert method.loss_weights(method.context) == pytest.approx((1 / 3, 2 / 3 / 4))
    method.after_training(network, None, np.empty(0, dtype=np.int64), torch.empty(0))
    after = network.head.weight.detach().double().numpy()
    length = np.sqrt((before**2).sum(1))
    expected = before.copy()
    expected[6:9] *= length[:6].mean() / length[6:9].mean()
    np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_a_module_in_the_current_folder_is_found_by_the_script_too(tmp_path, mine, monkeypatch):
    """`python -m` looks there by itself, an installed script does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    assert load("digits", ["method=mine:Mine", "loss=softmax"]).procedure.__module__ == "mine"
    del sys.modules["mine"]
