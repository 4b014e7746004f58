"""Shared by the tests: the commands as a user runs them, and a small image folder."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import NO_FIGURES, Forks
from PIL import Image

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.resolve() / "../shared/data"  # real images, where there are some
FEW = bool(os.environ.get("FASTIL_FEW"))  # a GPU at hand for minutes: few drawn examples, each compiles kernels
SOAK = bool(os.environ.get("FASTIL_SOAK"))  # `make soak`: full counts
# Files of minutes, which begin first, so that the processes of the suite end together.
SLOWEST = (
    "test_runs", "test_reproduce", "test_sweep", "test_parts", "test_crash_safety", "test_kill", "test_fuzz",
    "test_trainer", "test_cli", "test_herd", "test_pod_spatial", "test_convert", "test_incremental_loss", "test_html",
)  # fmt: skip
# Seconds instead of minutes; the digits recipe otherwise. precision: the same arithmetic on every processor.
TINY = ["epochs=2", "base_epochs=2", "batch_size=64", "precision=fp32"]


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def environment():
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # After the checkout what was put there for all: an older Triton, or packages that are not installed (bench.wheels).
    path = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def device():
    """Where the Triton kernels are launched on: a GPU, or the CPU tensors that the interpreter works on."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def gpu():
    """Where whole runs are tested that a CPU tests elsewhere: a GPU. FASTIL_DEVICE=cpu runs these on the CPU."""
    if os.environ.get("FASTIL_DEVICE") == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(scope="session")
def forks():
    processes = Forks(environment())
    yield processes
    processes.close()


@pytest.fixture
def figures():
    """Whether runs that `fastil` and `start` begin draw figures. A file whose tests look at them says True."""
    return False


@pytest.fixture
def fastil(forks, figures, tmp_path):
    """Run `fastil ...` in an empty folder; returns the finished process."""

    def run(*arguments, preexec_fn=None):
        command = ["-m", "fastil.cli", *map(str, arguments)]
        if preexec_fn is None:
            return forks.run(command, tmp_path, environment() | ({} if figures else {NO_FIGURES: "1"}))
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment(), capture_output=True, text=True,
            preexec_fn=preexec_fn,
        )  # fmt: skip

    return run


@pytest.fixture
def start(forks, figures, tmp_path, tmp_path_factory):
    """Start `fastil ...` without waiting for it."""
    processes = []

    def begin(*arguments):
        output = tmp_path_factory.mktemp("output") / "text"
        output.touch()
        variables = environment() | ({} if figures else {NO_FIGURES: "1"})
        processes.append(forks.start(["-m", "fastil.cli", *arguments], tmp_path, variables, output))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def forked_runs(forks):
    """What `fastil reproduce` starts in this process is a fork: runs without the seconds that imports take."""

    def popen(command, stdout, stderr, env, start_new_session):
        return forks.start(command[1:], Path.cwd(), env | {NO_FIGURES: "1"}, stdout.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastil.reproduce.scheduler.subprocess", SimpleNamespace(Popen=popen))
        yield


@pytest.fixture(scope="module")
def without_figures():
    """Runs in this process draw none, which takes them a quarter of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastil.reporting.figures.draw_run", lambda folder: None)
        yield


def encoded(image, kind="JPEG", **options):
    """A file of an image, or of uint8 pixels."""
    file = io.BytesIO()
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def make_folder(root, classes=4, train=6, val=3, size=12):
    """A folder data set of noise around one colour per class."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (size, size, 3)) + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def assert_user_error(process, *words):
    """Exit 2, nothing but one clear line on stderr, with all the words in it."""
    assert process.returncode == 2, process.stderr + process.stdout
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
