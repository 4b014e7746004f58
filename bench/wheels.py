"""Wheels for a GPU machine without a registry: what fastil needs beyond what images with torch bring.

python -m bench.wheels [--python 3.12]      fills build/wheels, on a machine with a registry (make wheels)

For that Python on x86-64 Linux. No torch, Triton or numpy: those of the GPU machine are what is tested there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELS, SITE = ROOT / "build/wheels", ROOT / "build/site"  # downloaded, and unzipped for the path
PYTHON = "3.12"  # what the GPU images of the time have
LIMIT = 60e6  # bytes, so that all can be carried at once
# By module. The second group comes without what it requires, which is torch, numpy and Triton.
WITH_REQUIREMENTS = {"pydantic": "pydantic"}
ALONE = {"simplejpeg": "simplejpeg", "isal": "isal"}
PEERS = {"liger_kernel": "liger-kernel"}  # bench.kernels does without
NEEDED = WITH_REQUIREMENTS | ALONE
# What else `import fastil`, its tests and its benches take from the machine, by module.
EXPECTED = {
    "torch": "torch", "triton": "triton", "numpy": "numpy", "sklearn": "scikit-learn", "matplotlib": "matplotlib",
    "typer": "typer", "tqdm": "tqdm", "yaml": "PyYAML", "PIL": "pillow", "jinja2": "jinja2", "pytest": "pytest",
    "xdist": "pytest-xdist", "hypothesis": "hypothesis",
}  # fmt: skip
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def download(python: str, *arguments: str) -> None:
    """Download wheels for a Python, such as "3.12", into WHEELS. Ends the process if pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(WHEELS)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), *arguments])
    if done.returncode:
        print("make wheels: pip could not download them; is there a registry?", file=sys.stderr)
        raise SystemExit(1)


def unzip() -> None:
    """Unzip every wheel into SITE, which is then one folder for the path."""
    shutil.rmtree(SITE, ignore_errors=True)  # of other versions
    for wheel in sorted(WHEELS.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(SITE)


def wheels_for() -> str | None:
    """Return the Python that the wheels in WHEELS with compiled parts are for, such as "3.12"; None without any."""
    tags = (re.search(r"-cp3(\d+)-cp3", wheel.name) for wheel in sorted(WHEELS.glob("*.whl")))
    return next((f"3.{tag[1]}" for tag in tags if tag), None)


def environment(path: str) -> dict[str, str]:
    """Return the environment of a process with that PYTHONPATH."""
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def missing(path: str) -> list[str]:
    """Return the packages that this Python lacks with that PYTHONPATH, or whose compiled parts it cannot import."""
    code = (
        "import importlib, importlib.util, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        f"        found = importlib.import_module(name) if name in {[*NEEDED]} else importlib.util.find_spec(name)\n"
        "    except ImportError:\n"
        "        found = None\n"
        "    if found is None: print(name)\n"
    )
    modules = EXPECTED | NEEDED
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, env=environment(path), capture_output=True, text=True, check=True)
    return [modules[name] for name in done.stdout.split()]


def main() -> None:
    """Fill the folder and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--python", default=PYTHON, help=f"of the GPU machine, such as {PYTHON}")
    python = parser.parse_args().python
    if not re.fullmatch(r"3\.\d+", python):
        parser.error(f"--python {python}: give a version such as {PYTHON}")
    WHEELS.mkdir(parents=True, exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    download(python, *WITH_REQUIREMENTS.values())
    download(python, "--no-deps", *ALONE.values(), *PEERS.values())
    wheels = sorted(WHEELS.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 1e6:7.2f} MB  in {WHEELS.relative_to(ROOT)}; carry it to the GPU machine and run `make gpu` there")
    if total > LIMIT:
        raise SystemExit(f"more than the {LIMIT / 1e6:.0f} MB that can be carried at once")


if __name__ == "__main__":
    main()
