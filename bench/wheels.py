"""Wheels of what `make gpu` needs and the Python of a GPU machine may lack.

python -m bench.wheels [--all] [--python 3.12]      fills build/wheels, where there is a package registry (make wheels)

For that Python on x86-64 Linux: what is rarely there, with --all everything except torch, Triton and numpy. Those are
the GPU machine's own, as they are what is tested there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from bench.carry import PART

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "build/wheels"
PYTHON = "3.12"  # what the GPU images of the time have
# Packages by a module of each.
OWN = {"torch": "torch", "triton": "triton", "numpy": "numpy"}  # of the GPU machine
USUAL = {
    "sklearn": "scikit-learn", "matplotlib.figure": "matplotlib", "typer": "typer", "tqdm": "tqdm", "yaml": "PyYAML",
    "PIL.Image": "pillow", "jinja2": "jinja2", "pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis",
}  # fmt: skip
RARE = {"pydantic": "pydantic", "simplejpeg": "simplejpeg", "isal": "isal"}
PEERS = {"liger_kernel": "liger-kernel"}  # bench.kernels does without
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


def scratch(out: Path) -> Path:
    """Return the folder for what is unzipped: build, or where the checkout cannot be written to that of the results."""
    build = ROOT / "build"
    try:
        build.mkdir(exist_ok=True)
    except OSError:
        return out
    return build if os.access(build, os.W_OK) else out


def unzip(wheels: list[Path], site: Path) -> None:
    """Unzip wheels into one folder for the path. Raises ValueError that names every damaged one."""
    shutil.rmtree(site, ignore_errors=True)  # of other versions
    damaged = []
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError):
            damaged.append(f"{shown(wheel)}: damaged; carry it again")
    if damaged:
        raise ValueError("\n".join(damaged))


def shown(path: Path) -> Path:
    """Return a path as it is seen from the checkout."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def complete(site: Path) -> str:
    """Unzip into `site` what this Python lacks, as far as it was carried. Returns the PYTHONPATH of the stages. Raises
    ValueError for what is damaged, or lacks still."""
    path = str(ROOT)
    names = missing(path)
    # Of a machine that lacks only a peer nothing else is replaced, whatever the other wheels are.
    pattern = "*.whl" if set(names) - {*PEERS.values()} else "liger_kernel-*.whl"
    wheels = sorted(WHEELS.glob(pattern)) if names else []
    if wheels:
        unzip(wheels, site)
        path = f"{site}{os.pathsep}{ROOT}"
        names = missing(path)
    problem = lacking(names)
    if problem is not None:
        raise ValueError(problem)
    return path


def lacking(names: list[str]) -> str | None:
    """Return in lines what to do about the packages that this Python lacks; None where it needs none of them."""
    needed = [name for name in names if name not in PEERS.values()]
    if not needed:
        return None
    lines = [f"this Python ({sys.executable}) lacks {', '.join(needed)}"]
    own = [name for name in needed if name in OWN.values()]
    if own:
        lines.append(f"{', '.join(own)}: cannot be carried; use a python3 that has them (make gpu PYTHON=...)")
    if len(own) < len(needed):
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if wheels_for() not in (None, here):
            lines.append(f"the wheels in {shown(WHEELS)} are for Python {wheels_for()}")
        words = ["--all"] if {*needed} & {*USUAL.values()} else []
        words += [] if here == PYTHON else [f"--python {here}"]
        command = f'make wheels ARGS="{" ".join(words)}"' if words else "make wheels"
        lines.append(f"`{command}` on a machine with a package registry fills {shown(WHEELS)}: carry that here")
    return "\n".join(lines)


def wheels_for() -> str | None:
    """Return the Python that the wheels in WHEELS with compiled parts are for, such as "3.12"; None without any."""
    tags = (re.search(r"-cp3(\d+)-cp3", wheel.name) for wheel in sorted(WHEELS.glob("*.whl")))
    return next((f"3.{tag[1]}" for tag in tags if tag), None)


def environment(path: str) -> dict[str, str]:
    """Return the environment of a process with that PYTHONPATH."""
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def missing(path: str) -> list[str]:
    """Return the packages that this Python lacks with that PYTHONPATH, or cannot import."""
    code = (
        "import importlib, importlib.util, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        f"        found = importlib.util.find_spec(name) if name in {[*OWN]} else importlib.import_module(name)\n"
        "    except Exception:\n"  # such as compiled parts for another Python or another numpy
        "        found = None\n"
        "    if found is None: print(name)\n"
    )
    modules = OWN | USUAL | RARE | PEERS
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, env=environment(path), capture_output=True, text=True, check=True)
    return [modules[name] for name in done.stdout.split()]


def main() -> None:
    """Fill the folder and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--all", action="store_true", help="for a Python with torch, Triton and numpy alone")
    parser.add_argument("--python", default=PYTHON, help=f"of the GPU machine, such as {PYTHON}")
    arguments = parser.parse_args()
    python = arguments.python
    if not re.fullmatch(r"3\.\d+", python):
        parser.error(f"--python {python}: give a version such as {PYTHON}")
    WHEELS.mkdir(parents=True, exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    download(python, *RARE.values(), *(USUAL.values() if arguments.all else ()))
    download(python, "--no-deps", *PEERS.values())  # they require torch and Triton
    for numpy in WHEELS.glob("numpy-*.whl"):  # that others require
        numpy.unlink()
    wheels = sorted(WHEELS.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 1e6:7.2f} MB  in {shown(WHEELS)}; carry it to the GPU machine and run `make gpu` there")
    large = [wheel.name for wheel in wheels if wheel.stat().st_size > PART]
    if large:
        raise SystemExit(f"larger than the {PART / 2**20:.0f} MiB that can be carried at once: {', '.join(large)}")


if __name__ == "__main__":
    main()
