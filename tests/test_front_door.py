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


NAMES = """
fastil.protocol.class_order fastil.protocol.imagenet_subset fastil.protocol.Protocol fastil.memory.herd
fastil.losses.log_prior fastil.losses.balanced_cross_entropy fastil.losses.distillation
fastil.losses.separated_cross_entropy fastil.losses.less_forget fastil.losses.margin_ranking fastil.losses.pod_spatial
fastil.losses.pod_flat fastil.losses.nca fastil.kernels.incremental_loss fastil.kernels.incremental_loss_grad
fastil.kernels.herd fastil.kernels.augment fastil.kernels.BalancedSoftmaxLoss fastil.kernels.IncrementalLoss
fastil.run fastil.Run fastil.register fastil.Beton fastil.data.Beton fastil.plan.EpochPlan fastil.data.make_loader
fastil.UserError fastil.Method fastil.make_loader
""".split()


def test_every_public_name_is_there_after_import_fastil_alone_and_is_listed():
    """In a process that has imported nothing else of fastil."""
    code = f"""
import fastil
listed = dir(fastil)
for name in {NAMES}:
    found = fastil
    for part in name.split(".")[1:]:
        found = getattr(found, part)
missing = [n for n in fastil.__all__ if n not in listed] + [n for n in fastil.data.__all__ if n not in dir(fastil.data)]
assert not missing, missing
assert fastil.data.Beton is fastil.Beton
assert not hasattr(fastil, "__main__")
assert not hasattr(fastil, "nothing")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
