"""The stages of bench.first_contact, each in a process of its own: python -m bench.stages NAME

Without a GPU a stage imports what it needs, says "no CUDA device" and ends with NO_DEVICE. FASTIL_DEVICE=cpu has it run
on the CPU, on small sizes. Figures go to the folder FASTIL_RESULTS.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.first_contact import CARRIED, NO_DEVICE, SKIPPED
from bench.wheels import ROOT, scratch, shown

OUT = Path(os.environ.get("FASTIL_RESULTS", ROOT / "build/first_contact"))
KERNEL_TESTS = ["tests/kernels"]
TRAINER_TESTS = ["tests/methods/test_methods_on_gpu.py", "tests/data/loaders/test_loaders_on_gpu.py"]
LAUNCHES = ["tests/kernels/test_sanitized.py", "tests/kernels/test_registration.py"]  # a launch of each kernel


def run(*command: str, env: dict[str, str] | None = None) -> None:
    """Run a command; what ends it ends this process."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}))
    if done.returncode:
        raise SystemExit(1)  # its own number could be one of ours


def python(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run this Python; what ends it ends this process."""
    run(sys.executable, *arguments, env=env)


def pytest(name: str, tests: list[str], workers: int) -> None:
    """Run tests; each is in the log as soon as it has ended, for a stage may run out of time."""
    python(
        "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", "-n", str(workers),
        f"--junitxml={OUT / name}.xml", *tests, env={"OMP_NUM_THREADS": "1", "FASTIL_FEW": "1"},
    )  # fmt: skip


def collect(tests: list[str]) -> None:
    """Import the tests."""
    python("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *tests)


def machine(small: bool) -> None:
    """Say what is there."""
    from fastil.doctor import diagnose

    print(diagnose())
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"])


def kernel_tests(small: bool) -> None:
    """Run tests/kernels; small: a launch of each kernel in Triton's interpreter."""
    import numpy as np
    import triton

    if small and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        print("the interpreter of Triton 3.6 needs numpy before 2.4; a GPU does without it")
        raise SystemExit(SKIPPED)
    pytest("kernel_tests", LAUNCHES if small else KERNEL_TESTS, 2 if small else 8)


def trainer_tests(small: bool) -> None:
    """Run the tests of whole runs and of loaders on the device."""
    pytest("trainer_tests", TRAINER_TESTS, 2 if small else 8)


def step(small: bool) -> None:
    """Time the training step; the networks are compiled, which takes most of the time."""
    python(
        "-m",
        "bench.train_step",
        *(["--rounds", "1", "--steps", "1", "--precision", "fp32"] if small else ["--rounds", "3"]),
    )


def streaming(small: bool) -> None:
    """Time the loaders on photos that are made here."""
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), 24 if small else 96)
        images = "128" if small else "3000"
        for name in ("loaders", "streamed"):
            python("-m", f"bench.{name}", "--rounds", "1" if small else "2", "--images", images, "--data", folder)


def cifar100(small: bool) -> None:
    """Train a short row of CIFAR-100 where it was carried, of digits where not."""
    out, folder = OUT / "run", scratch(OUT) / "cifar100"
    if CARRIED.is_dir() and any(CARRIED.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)  # of what was carried before
        python("-m", "bench.carry", "unpack", str(CARRIED), str(folder))
    if folder.is_dir():
        first_classes = next(folder.glob("*.yaml"), None)  # a recipe, and a tar of its name
        # Otherwise a file that is a data set, or a folder of those that are published.
        files = [*sorted(folder.glob("*.beton")), *sorted(folder.glob("*.tar"))]
        files = [file for file in files if not file.name.endswith(".val.beton")]
        data = first_classes.with_suffix(".tar") if first_classes else next(iter(files), folder)
        epochs = ["base_epochs=1", "epochs=1"] if small else ["base_epochs=40", "epochs=20"]
        recipe = [str(first_classes or "cifar100_balanced_5"), *epochs, "--data", str(data)]
    else:
        print(
            "CIFAR-100 is not here, so this is digits. To carry it: python -m bench.carry pack "
            f"data/cifar-100-python/* {shown(CARRIED)}"
        )
        recipe = ["digits", *(["epochs=2", "base_epochs=2"] if small else [])]
    python("-m", "fastil", "run", *recipe, "--out", str(out))
    python("-m", "fastil", "report", str(out))
    results, timings = (json.loads((out / f"{name}.json").read_text()) for name in ("results", "timings"))
    average, final = results["average_incremental_accuracy"], results["final_top1"]
    rate = [*timings["steps"].values()][-1]["images_per_second"]
    name = Path(recipe[0]).stem
    print(f"{name}: average incremental {average:.2f}, final {final:.2f}, {rate:,.0f} img/s in its last step")


def sanitizer(small: bool) -> None:
    """Run a launch of each kernel under compute-sanitizer."""
    if small or not shutil.which("compute-sanitizer"):
        print("compute-sanitizer needs a GPU" if small else "compute-sanitizer is not installed")
        raise SystemExit(SKIPPED)
    run(
        "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-m", "pytest", "-vv",
        "-p", "no:cacheprovider", "tests/kernels/test_sanitized.py", "-m", "sanitize",
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip


def kernel_times(small: bool) -> None:
    """Time the incremental loss against its peers on three shapes, then the other kernels against their plain forms."""
    if small:
        print("nothing to time without a GPU; python -m bench.kernels counts launches and bytes there")
        raise SystemExit(SKIPPED)
    loss = "--kernel incremental_loss --shape 128x104x100 --shape 128x1000 --shape 1024x1000 --dtype bf16 --rounds 10"
    others = "--kernel augment --kernel crop_resize --kernel herd --kernel pod_spatial --kernel less_forget"
    others += " --kernel cosine_head --kernel alpha_hypergradient --kernel step"
    others += " --dtype bf16 --dtype fp64 --dtype uint8 --peer eager --rounds 10"
    try:
        python("-m", "bench.kernels", *loss.split())
    finally:
        python("-m", "bench.kernels", *others.split(), env={"FASTIL_RESULTS": str(OUT / "other_kernels")})


def make_photos(folder: Path, count: int) -> None:
    """Write JPEGs of ImageNet's size and bytes per pixel, in 8 classes."""
    from fastil.doctor import photo

    for i in range(count):
        path = folder / f"class{i % 8}/{i:03d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(375, 500, seed=i))


# What each stage needs: modules to import, or tests to collect.
STAGES: dict[str, tuple[Callable[[bool], None], list[str]]] = {
    "machine": (machine, ["fastil.doctor", "fastil.cli"]),
    "kernel_tests": (kernel_tests, KERNEL_TESTS),
    "trainer_tests": (trainer_tests, TRAINER_TESTS),
    "step": (step, ["bench.train_step"]),
    "streaming": (streaming, ["bench.loaders", "bench.streamed"]),
    "cifar100": (cifar100, ["fastil.training.start"]),
    "sanitizer": (sanitizer, LAUNCHES[:1]),
    "kernel_times": (kernel_times, ["bench.kernels"]),
}


def main() -> None:
    """Run one stage."""
    work, needs = STAGES[sys.argv[1]]
    small = os.environ.get("FASTIL_DEVICE") == "cpu"
    import torch

    if not small and not torch.cuda.is_available():
        if needs[0].startswith("tests/"):
            collect(needs)
        else:
            for module in needs:
                importlib.import_module(module)
            if sys.argv[1] == "machine":
                work(small)
        print("no CUDA device")
        raise SystemExit(NO_DEVICE)
    work(small)


if __name__ == "__main__":
    main()
