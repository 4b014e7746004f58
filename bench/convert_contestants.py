"""The contestants of bench.convert: each writes a folder of JPEGs as a .beton, in a process of its own.

python -m bench.convert_contestants NAME FOLDER OUT.beton

prints a line of JSON: seconds, and peaks of memory in MiB. Imports are inside the functions, before the clock starts,
so that no contestant carries the libraries of another; fastil's workers import this file again. A file named scrap in
the folder of OUT.beton is removed as the clock starts.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

WORKERS = 2
SCRAP = "scrap"  # a file whose memory the contestant gets
Work = Callable[[], object]


def ffcv(folder: Path, out: Path) -> Work:
    """FFCV's DatasetWriter on Pillow's images, as its documentation writes ImageNet."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from PIL import Image

    files = sorted(folder.glob("train/*/*"))
    labels = {name: label for label, name in enumerate(sorted({file.parent.name for file in files}))}

    class Images:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> tuple[Any, int]:
            return Image.open(files[i]), labels[files[i].parent.name]

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}

    def work() -> None:
        DatasetWriter(str(out), fields, num_workers=WORKERS).from_indexed_dataset(Images())

    return work


def fastil(folder: Path, out: Path, *, mode: str, check: bool) -> Work:
    """`fastil convert`, as the command line calls it."""
    from fastil.tools.convert import convert, options_of
    from fastil.tools.reporting import Reporter

    options = options_of(mode=mode, quality=90, check=check, workers=WORKERS)
    return lambda: convert(folder, out, options, Reporter())


CONTESTANTS: dict[str, Callable[[Path, Path], Work]] = {
    "FFCV": ffcv,
    "fastil": partial(fastil, mode="jpeg", check=True),
    "fastil --no-check": partial(fastil, mode="jpeg", check=False),
    "fastil --mode reencode": partial(fastil, mode="reencode", check=True),
}


def own_peak() -> float:
    """Return the peak memory of this process in MiB. ru_maxrss would start from what the parent process held."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run one contestant and print its line."""
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    with contextlib.redirect_stdout(sys.stderr):
        work = CONTESTANTS[name](folder, out)
        os.sync()  # what others have written must not be waited for here
        (out.parent / SCRAP).unlink(missing_ok=True)
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    for process in multiprocessing.active_children():  # FFCV does not wait for them
        process.join()
    # Of all processes that this one started and waited for, the largest.
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    own = own_peak()

    from fastil.data.formats.beton import Beton

    with Beton(out) as beton:
        images = len(beton)
    print(json.dumps({"seconds": seconds, "images": images, "process": own, "worker": worker}))


if __name__ == "__main__":
    main()
