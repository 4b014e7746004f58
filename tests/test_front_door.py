"""What `import fastil` gives, and how light it is."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import environment

import fastil
from fastil.data.formats.beton import Beton
from fastil.data.loaders.choose import make_loader
from fastil.methods import Method, register
from fastil.reporting.runs import Run
from fastil.training.start import run


def test_the_names_are_those_of_their_homes():
    assert (fastil.Beton, fastil.make_loader, fastil.Method, fastil.register) == (Beton, make_loader, Method, register)
    assert (fastil.run, fastil.Run) == (run, Run)
    assert all(hasattr(fastil, name) for name in fastil.__all__)
    assert fastil.__version__ == version("fastil")
    with pytest.raises(AttributeError, match="no attribute nothing"):
        fastil.nothing  # noqa: B018


def test_importing_it_loads_neither_torch_nor_numpy():
    code = "import fastil, sys; print(fastil.__version__, [m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.split(" ", 1)[1].strip() == "[]", done.stderr


@pytest.mark.parametrize("module", ["fastil", "fastil.cli"])
def test_the_command_says_its_version(forks, tmp_path, module):
    done = forks.run(["-m", module, "--version"], tmp_path, environment())
    assert (done.returncode, done.stdout) == (0, f"fastil {version('fastil')}\n")


NAMES = {  # public, by module
    "protocol": "class_order imagenet_subset Protocol", "memory": "herd", "plan": "EpochPlan",
    "losses": "log_prior balanced_cross_entropy distillation separated_cross_entropy less_forget margin_ranking "
    "pod_spatial pod_flat nca",
    "kernels": "incremental_loss incremental_loss_grad herd augment BalancedSoftmaxLoss IncrementalLoss",
    "data": "Beton make_loader",
}  # fmt: skip


def test_every_public_name_is_there_after_import_fastil_alone_and_is_listed():
    """In a process that has imported nothing else of fastil."""
    code = f"""
import fastil
listed = dir(fastil)
for module, names in {NAMES}.items():
    for name in names.split():
        getattr(getattr(fastil, module), name)
assert set(fastil.__all__) <= set(listed)
assert all(hasattr(fastil, name) for name in fastil.__all__)
assert set(fastil.data.__all__) <= set(dir(fastil.data))
assert fastil.data.Beton is fastil.Beton
assert not hasattr(fastil, "__main__")
assert not hasattr(fastil, "nothing")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_takes_the_base_step_of_another_run(tmp_path, monkeypatch):
    """The run is the same, byte for byte, as one that trains its base step itself; a mistake names the argument."""
    monkeypatch.setattr("fastil.training.run_directory.figures.draw_run", lambda path: None)
    settings = {
        "epochs": 1, "base_epochs": 2, "batch_size": 64, "classes": 4, "base_classes": 2, "increment": 1,
        "model": "resnet8", "loss": "softmax", "precision": "fp32",
    }  # fmt: skip
    first = fastil.run("digits", out=tmp_path / "first", **settings)
    later = settings | {"loss": "separated", "exemplars_per_class": 3}
    alone, shared = (
        fastil.run("digits", out=tmp_path / name, base=base, **later)
        for name, base in (("alone", None), ("shared", str(first.path)))
    )
    assert shared.results == alone.results != first.results
    for name in ("results.json", "metrics.jsonl", "memory/step_2.json", "predictions/step_2.npy"):
        assert (shared.path / name).read_bytes() == (alone.path / name).read_bytes()
    assert json.loads((shared.path / "timings.json").read_text())["base_step_of"] == str(first.path)
    with pytest.raises(fastil.UserError, match=r"^base .*first: its base step is another one \(epochs of"):
        fastil.run("digits", out=tmp_path / "longer", base=first.path, **later | {"base_epochs": 3})
    with pytest.raises(fastil.UserError, match=r"^(?!.*--base).*nowhere"):
        fastil.run("digits", out=tmp_path / "none", base=tmp_path / "nowhere", **later)
    assert not (tmp_path / "longer").exists()
    assert not (tmp_path / "none").exists()
