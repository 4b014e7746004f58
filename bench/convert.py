"""Conversion to .beton: `fastil convert`, which keeps the bytes of JPEGs, against FFCV's DatasetWriter.

python -m bench.convert [--rounds N] [--images N] [--data FOLDER or TAR]

Claim: at least 2.5 times FFCV's images per second with every JPEG decoded for a check, 10 times without (--no-check),
and no less than FFCV where it re-encodes at quality 90 like FFCV (--mode reencode). Two workers each. fastil's time
has the audit, the start of its workers, checksums, fsync and reading the file back in it, so it wants some thousand
images; FFCV's is the writer alone, which syncs nothing. Neither has the start of Python and imports in it.

Each contestant gets the memory of a file of the same size, which is removed as the clock starts. A virtual machine may
give memory that has been free for some seconds back to its host, and the next to write would pay for fetching it.

The images: RGB JPEGs of ImageNet, repeated under different names. Memory: the peak of the process and, WORKERS times,
of the largest one it started; pages that a fork shares (FFCV's workers) count in each. Files go to the folder for
temporary ones (TMPDIR), which should lie on a disk.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from bench.convert_contestants import CONTESTANTS, SCRAP, WORKERS
from bench.harness import ratio, save, show, spread, take_turns

DATA = Path(__file__).parents[1] / "../shared/data/imagenet-sample-200.tar"
GOALS = {"fastil": 2.5, "fastil --no-check": 10.0, "fastil --mode reencode": 1.0}  # times FFCV
PATIENCE = 1800  # seconds; FFCV's writer waits forever for a worker that has failed


def encoded_images(data: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield class, name and content of every RGB JPEG in a folder or a tar."""
    if data.is_dir():
        files = ((path.parent.name, path.name, path.read_bytes()) for path in sorted(data.rglob("*")) if path.is_file())
        yield from (one for one in files if is_rgb_jpeg(one[2]))
        return
    with tarfile.open(data) as tar:
        for member in tar:
            file = tar.extractfile(member)
            content = b"" if file is None else file.read()
            if is_rgb_jpeg(content):
                path = Path(member.name)
                yield path.parent.name, path.name, content


def is_rgb_jpeg(content: bytes) -> bool:
    """Return whether the bytes are an RGB JPEG."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format == "JPEG" and image.mode == "RGB"
    except OSError:
        return False


def spread_out(data: Path, folder: Path, images: int) -> tuple[int, int, int]:
    """Write train/CLASS/NAME, each image as often as needed. Returns the images, the distinct ones, and the bytes of
    all."""
    originals: list[Path] = []
    for class_name, name, content in encoded_images(data):
        path = folder / "train" / class_name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        originals.append(path)
        if len(originals) == images:
            break
    if not originals:
        return 0, 0, 0
    copies = -(-images // len(originals))
    for path in originals:
        for number in range(1, copies):
            os.link(path, path.with_name(f"{number}-{path.name}"))
    total = sum(path.stat().st_size for path in originals)
    return copies * len(originals), len(originals), copies * total


def turn(name: str, folder: Path, images: int, megabytes: int, peaks: dict[str, dict[str, float]]) -> float:
    """Return the images per second of one contestant in a fresh process."""
    out = folder / "out.beton"
    with open(folder / SCRAP, "wb") as file:
        for _ in range(megabytes + 64):
            file.write(bytes(1 << 20))
    command = [sys.executable, "-m", "bench.convert_contestants", name, str(folder / "images"), str(out)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        output, errors = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the workers, too
        raise
    if child.returncode:
        raise SystemExit(f"{name}: {errors}")
    for path in folder.glob("out.*"):
        path.unlink()
    found = json.loads(output.splitlines()[-1])
    if found["images"] != images:
        raise SystemExit(f"{name} has written {found['images']} of {images} images")
    before = peaks.setdefault(name, {"process": 0.0, "worker": 0.0})
    for part in before:
        before[part] = max(before[part], found[part])
    return images / float(found["seconds"])


def read_arguments(doc: str | None, *, rounds: int, images: int) -> argparse.Namespace:
    """Return the arguments of a bench on ImageNet's JPEGs; end the process if there are none."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else "")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--images", type=int, default=images, help="at least so many")
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    if not arguments.data.exists():
        print(f"no images at {arguments.data}: give --data a folder or a tar of JPEGs", file=sys.stderr)
        raise SystemExit(2)
    return arguments


def main() -> None:
    """Run the bench and write its result file."""
    arguments = read_arguments(__doc__, rounds=5, images=20_000)
    if find_spec("ffcv") is None:
        print("FFCV is not installed: make .venv/ffcv", file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, different, size = spread_out(arguments.data, folder / "images", arguments.images)
        if not images:
            print(f"{arguments.data}: no RGB JPEG in it; give --data a folder or a tar of them", file=sys.stderr)
            raise SystemExit(2)
        print(f"images per second; {images} JPEGs, {different} different ones, {size / 1e6:,.0f} MB")
        peaks: dict[str, dict[str, float]] = {}
        figures = take_turns(
            {name: partial(turn, name, folder, images, size >> 20, peaks) for name in CONTESTANTS}, arguments.rounds
        )
    for name, values in figures.items():
        show(name, spread(values), "images/s")
    ratios = {name: ratio(figures, name, "FFCV") for name in GOALS}
    for name, values_over in ratios.items():
        show(f"{name} / FFCV", values_over, f"goal {GOALS[name]:g}")
    for peak in peaks.values():
        peak["sum"] = peak["process"] + WORKERS * peak["worker"]
    for name, peak in peaks.items():
        print(f"{name:<46}{peak['sum']:10.0f} MiB  ({peak['process']:.0f} + {WORKERS} x {peak['worker']:.0f})")
    content = {
        "rounds": arguments.rounds, "images": images, "different": different, "megabytes": size / 1e6,
        "workers": WORKERS, "versions": {name: version(name) for name in ("ffcv", "pillow", "opencv-python")},
        "images_per_second": {name: spread(values) for name, values in figures.items()},
        "over_ffcv": ratios, "goals": GOALS, "peak_mib": peaks,
    }  # fmt: skip
    print(f"written to {save('convert', torch.device('cpu'), content)}")


if __name__ == "__main__":
    main()
