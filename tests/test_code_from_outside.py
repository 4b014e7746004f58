"""Code from outside: which names are read, what is said when it fails, when it is read again, and its hash."""

import os
import sys
from functools import partial

import pytest

from fastil import outside
from fastil.errors import UserError
from fastil.models import find_factory
from fastil.recipe_file import load

NET = """
from torch import nn

DEPTH = 2

class Net(nn.Module):
    feature_dim = 3

    def forward(self, images):
        return images.mean((2, 3)) * DEPTH

def backbone():
    return Net()
"""


def hash_of(text, tmp_path, name="backbone"):
    (tmp_path / "net.py").write_text(text)
    return outside.source_hash(outside.attribute(f"model={tmp_path}/net.py:{name}"))


@pytest.mark.parametrize(
    "model", [":", "net.py:", ".rel:x", "net.py:a.b", "a b:c", "net:", ":net", "net.py:1", "a..b:c", "net.py:x:"]
)
def test_a_name_that_is_none_says_how_to_write_it(model):
    with pytest.raises(UserError, match=r"write model=module:NAME or model=path/to/file.py:NAME"):
        load("digits", [f"model={model!r}"])


def test_what_cannot_be_called_is_no_backbone(tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\n")
    with pytest.raises(UserError, match="no function or class that returns a backbone"):
        load("digits", [f"model={tmp_path}/net.py:nn"])


def test_the_place_is_the_last_one_in_the_users_code_and_its_traceback_is_kept(tmp_path):
    (tmp_path / "net.py").write_text("import torch\n\ndef backbone():\n    return torch.nn.Conv2d(1, 2, 3, groups=5)\n")
    with pytest.raises(UserError, match=r"net\.py, line 4: ValueError: ") as error:
        load("digits", [f"model={tmp_path}/net.py:backbone"]).build_network(10, 0)
    assert isinstance(error.value.__cause__, ValueError)
    (tmp_path / "other.py").write_text("class Net:\n    def __init__(self, width):\n        pass\n")
    with pytest.raises(UserError, match=r"other\.py:Net: TypeError: .*width"):  # raised by the call, not in the file
        load("digits", [f"model={tmp_path}/other.py:Net"]).build_network(10, 0)


def test_a_file_is_told_by_where_it_is_and_what_it_holds(tmp_path, monkeypatch):
    """Not by the relative path that names it, nor by when it was written."""
    depths = []
    for folder, depth in (("a", 2), ("b", 3), ("a", 2), ("a", 4)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "net.py").write_text(NET.replace("DEPTH = 2", f"DEPTH = {depth}"))
        os.utime(tmp_path / folder / "net.py", (1, 1))
        monkeypatch.chdir(tmp_path / folder)
        backbone = load("digits", ["model=net.py:backbone"]).code["net.py:backbone"]
        depths.append(backbone.__globals__["DEPTH"])
    assert depths == [2, 3, 2, 4]
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("DEPTH = 2", "DEPTH = 3", False), ("mean((2, 3))", "amax((2, 3))", False),
        ("return Net()", "return Net( )", False),
        ("feature_dim = 3", "feature_dim = 4", False), ("DEPTH = 2", "DEPTH = 2  # layers\nepochs = 30", True),
        ("def backbone", "def main():\n    print(backbone)\n\ndef backbone", True),
    ],
)  # fmt: skip
def test_the_hash_is_of_what_a_function_names_and_of_nothing_else(old, new, same, tmp_path):
    before = hash_of(NET, tmp_path)
    assert before is not None
    assert (hash_of(NET.replace(old, new), tmp_path) == before) is same


def test_the_hash_knows_the_values_that_a_function_closes_over():
    def make(width):
        def backbone():
            return width

        return backbone

    assert outside.source_hash(make(2)) == outside.source_hash(make(2)) != outside.source_hash(make(3))
    assert outside.source_hash(partial(make, 2)) != outside.source_hash(partial(make, 3))


def test_without_a_source_there_is_no_hash():
    found = {"__name__": "nowhere"}
    exec("def backbone(): pass", found)
    assert outside.source_hash(found["backbone"]) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: 3, r"def backbone\(\): return \.\.\."),
        (partial(dict, "a", width=3), r"def backbone\(\): return dict\('a', width=3\)"),
    ],
)
def test_a_function_without_a_name_of_its_own_is_refused_with_the_one_to_write(given, words):
    with pytest.raises(UserError, match=words):
        find_factory(given)


def test_a_recipe_names_code_from_its_own_folder_as_it_does_its_base(tmp_path, monkeypatch):
    (tmp_path / "sub/deep").mkdir(parents=True)
    (tmp_path / "sub/net.py").write_text(NET)
    (tmp_path / "sub/parent.yaml").write_text("base: digits\nmodel: net.py:backbone\n")
    (tmp_path / "sub/deep/child.yaml").write_text("base: ../parent.yaml\nepochs: 3\n")
    monkeypatch.chdir(tmp_path)
    for name, model in (("sub/parent.yaml", "sub/net.py"), ("sub/deep/child.yaml", "sub/deep/../net.py")):
        recipe = load(name)
        assert recipe.model.model == f"{model}:backbone"
        assert recipe.build_network(10, 0).backbone.feature_dim == 3
    monkeypatch.chdir(tmp_path / "sub")
    assert load("parent.yaml").model.model == "net.py:backbone"


def test_no_module_of_a_file_stays_after_it_failed(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        outside.attribute(f"model={tmp_path}/broken.py:x")
    assert not [name for name in set(sys.modules) - before if "broken" in name]
