"""What `import fastil` gives, and how light it is."""

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
