"""Loaders: images per second of uint8 frames 224x224, random resized crops of ImageNet JPEGs, two workers each.

python -m bench.loaders [--rounds N] [--images N] [--data FOLDER or TAR]

Claim: loader=ffcv at least 0.95 of FFCV's Loader on the same file, loader=dali at least 0.95 of a plain DALI pipeline
on the same files, loader=threads at least 1.5 times torch's DataLoader with Pillow and 0.8 of its own decode and resize
without a loader. New ids are switched to in at most 0.5 s (to the first batch), where a new FFCV Loader takes seconds.

On a GPU machine there are as many workers as cores, fastil's loaders bring frames to the GPU, and DALI decodes on it.

All contestants have read the files before, and FFCV has compiled its pipeline. None normalises. Also: opening, indexing
and planning an epoch of a file of 1.28 and 14 million samples (of which only the tables are there).
"""

import contextlib
import io
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.convert import read_arguments, spread_out
from bench.convert_contestants import own_peak
from bench.harness import ratio, save, show, spread, take_turns
from fastil import machine
from fastil.data import make_loader
from fastil.data.formats.beton import Beton
from fastil.data.loaders.choose import installed
from fastil.data.loaders.streaming import Streaming
from fastil.device import pick_device
from fastil.plan import AREA, ATTEMPTS, RATIO, Key, Transform, training_plan

DEVICE = pick_device("auto")
WORKERS = 2 if DEVICE.type == "cpu" else machine.cores()
BATCH, SIDE = 64, 224
TRANSFORM = Transform(SIDE, SIDE, 0, True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resized=True)
GOALS = {
    ("ffcv", "FFCV Loader"): 0.95,
    ("dali", "DALI pipeline"): 0.95,
    ("threads", "DataLoader + PIL"): 1.5,
    ("threads", "decode + resize alone"): 0.8,
}
Contestant = Callable[[], float]


def convert(folder: Path, out: Path) -> Beton:
    """Convert a folder and return the .beton."""
    from fastil.tools.convert import convert as convert_source
    from fastil.tools.convert import options_of
    from fastil.tools.reporting import Reporter

    options = options_of(check=False, workers=1)
    with contextlib.redirect_stdout(io.StringIO()):
        convert_source(folder, out, options, Reporter())
    return Beton(out)


def arrived() -> None:
    """Wait until all that was sent to the GPU is there."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


class Fastil:
    """One of fastil's backends, an epoch at a time."""

    def __init__(self, name: str, beton: Beton) -> None:
        loader = make_loader(beton, name, TRANSFORM, DEVICE)
        assert isinstance(loader, Streaming)
        self.loader, self.sizes, self.epoch = loader, beton.sizes, 0

    def frames(self, ids: np.ndarray[Any, Any]) -> Iterator[torch.Tensor]:
        """Yield the frames of an epoch."""
        self.epoch += 1
        return self.loader.pixels(training_plan(ids, Key(0, 0, "train", self.epoch), TRANSFORM, BATCH, self.sizes))

    def rate(self, count: int) -> float:
        """Return images per second."""
        began = time.perf_counter()
        images = sum(len(frames) for frames in self.frames(np.arange(count)))
        assert images == count
        arrived()
        return count / (time.perf_counter() - began)

    def switch(self, count: int, seed: int) -> float:
        """Return the seconds from other ids to the first batch."""
        ids = np.random.default_rng(seed).choice(count, count // 2, replace=False)
        began = time.perf_counter()
        frames = self.frames(ids)
        next(frames)
        arrived()
        found = time.perf_counter() - began
        frames.close()  # type: ignore[attr-defined]
        return found


def torchvision_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Return a crop as RandomResizedCrop.get_params does, without the tensors that torchvision makes of its numbers."""
    for _ in range(ATTEMPTS):
        area = random.uniform(*AREA) * height * width
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return 0, 0, height, width


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """A Dataset of files for DataLoader with PIL: torchvision's steps on Pillow's images."""

    def __init__(self, files: list[Path], sizes: list[list[int]]) -> None:
        self.files, self.sizes = files, sizes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        top, left, height, width = torchvision_crop(*self.sizes[i])
        with Image.open(self.files[i]) as opened:
            image = opened.convert("RGB").crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))


def dataloader(files: list[Path], sizes: np.ndarray[Any, Any]) -> Contestant:
    """Return a contestant: images per second of torch's DataLoader."""
    loader = torch.utils.data.DataLoader(
        Files(files, sizes.tolist()), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )

    def rate() -> float:
        began = time.perf_counter()
        return sum(len(batch) for batch in loader) / (time.perf_counter() - began)

    rate()
    return rate


def stock_ffcv(path: Path) -> Any:
    """Return FFCV's Loader on a file."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    return Loader(
        str(path), BATCH, WORKERS, os_cache=True, order=OrderOption.RANDOM, drop_last=False,
        pipelines={"image": [RandomResizedCropRGBImageDecoder((SIDE, SIDE)), ToTensor()], "label": None, "id": None},
    )  # fmt: skip


def ffcv(path: Path) -> Contestant:
    """Return a contestant: images per second of FFCV's Loader."""
    loader = stock_ffcv(path)

    def rate() -> float:
        began = time.perf_counter()
        return sum(len(batch) for (batch,) in loader) / (time.perf_counter() - began)

    rate()  # compiles
    return rate


def new_ffcv(path: Path) -> float:
    """Return the seconds to the first batch of another Loader."""
    began = time.perf_counter()
    batches = iter(stock_ffcv(path))
    next(batches)
    found = time.perf_counter() - began
    for _ in batches:
        pass
    return found


def dali(files: list[Path]) -> Contestant:
    """Return a contestant: images per second of a DALI pipeline."""
    from nvidia.dali import Pipeline, fn, types

    on_gpu = DEVICE.type == "cuda"
    pipeline = Pipeline(BATCH, WORKERS, 0 if on_gpu else None)
    with pipeline:
        encoded, _ = fn.readers.file(files=[str(file) for file in files], random_shuffle=True)
        decoder = "mixed" if on_gpu else "cpu"
        images = fn.decoders.image_random_crop(encoded, device=decoder, output_type=types.RGB, random_area=[0.08, 1.0])
        pipeline.set_outputs(fn.resize(images, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True))
    pipeline.build()
    batches = -(-len(files) // BATCH)

    def rate() -> float:
        began = time.perf_counter()
        for _ in range(batches):
            pipeline.run()
        arrived()
        return batches * BATCH / (time.perf_counter() - began)

    rate()
    return rate


def alone(beton: Beton, *, resize: bool) -> Contestant:
    """Return a contestant: images per second of the decoder of loader=threads, with the resize or without it, in as
    many threads, without a loader."""
    import simplejpeg
    import torch.nn.functional as F

    contents = [beton.encoded(i) for i in range(len(beton))]
    boxes = training_plan(np.arange(len(beton)), Key(0, 0), TRANSFORM, BATCH, beton.sizes)
    of_image = dict(zip(boxes.ids.tolist(), boxes.boxes.tolist(), strict=True))

    largest = int(beton.sizes.prod(axis=1).max()) * 3

    def work(first: int) -> None:
        decoded, cut = (np.empty(largest, np.uint8) for _ in range(2))
        for i in range(first, len(contents), WORKERS):
            image = simplejpeg.decode_jpeg(contents[i], buffer=decoded)
            if resize:
                top, left, height, width = of_image[i]
                part = cut[: height * width * 3].reshape(height, width, 3)
                part[...] = image[top : top + height, left : left + width]
                tensor = torch.from_numpy(part).as_strided((1, 3, height, width), (part.size, 1, width * 3, 3))
                F.interpolate(tensor, size=(SIDE, SIDE), mode="bilinear", antialias=True)

    def rate() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(work, range(WORKERS)))
        return len(contents) / (time.perf_counter() - began)

    return rate


def differences(beton: Beton, backends: list[str], different: int) -> dict[str, dict[str, float]]:
    """Return how far frames are from Pillow's, of 255, over one copy of each image."""
    ids = np.arange(0, len(beton), len(beton) // different)
    plan = training_plan(ids, Key(0, 0), TRANSFORM, BATCH, beton.sizes)
    frames = {}
    for name in ("reference", *backends):
        loader = make_loader(beton, name, TRANSFORM, DEVICE)
        assert isinstance(loader, Streaming)
        frames[name] = torch.cat([part.clone() for part in loader.pixels(plan)]).int()
        loader.close()
    apart = {name: (frames[name] - frames["reference"]).abs() for name in backends}
    return {name: {"mean": float(d.float().mean()), "max": float(d.max())} for name, d in apart.items()}


def at_scale(samples: int) -> dict[str, float]:
    """Return the seconds to open a file of so many samples (without their bytes) and to plan an epoch of it, and the
    peak of memory in MiB, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "large.beton"
        for function in ("write_tables_of", "open_and_plan"):
            code = f"from bench.loaders import {function}; {function}({samples}, {str(path)!r})"
            output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    opened, planned, mebibytes = map(float, output.split())
    return {"open": opened, "plan": planned, "peak_mib": mebibytes}


def write_tables_of(samples: int, path: str) -> None:
    """Write a file with the tables of so many samples and no bytes of images."""
    from fastil.data.formats import beton

    entries = np.zeros(samples, beton.ENTRY)
    entries["size"], entries["width"], entries["height"] = 100_000, 500, 375
    entries["label"] = np.arange(samples) * 1000 // samples
    start = beton.data_start(samples, beton.PAGE)
    rows, in_page = np.arange(samples), beton.PAGE // 100_000
    entries["ptr"] = start + rows // in_page * beton.PAGE + rows % in_page * 100_000
    with open(path, "w+b") as file:
        front = beton.front(entries, beton.JPEG, beton.PAGE, start)
        beton.write_tables(file, entries, front, beton.PAGE)
        beton.write_header(file, front)


def open_and_plan(samples: int, path: str) -> None:
    """Print seconds, seconds and MiB; an epoch visits half of the classes, as the base step does."""
    before = own_peak()
    began = time.perf_counter()
    found = Beton(path)
    opened = time.perf_counter()
    ids = np.concatenate([found.of_class(label) for label in range(500)])
    training_plan(ids, Key(0, 1), TRANSFORM, BATCH, found.sizes)
    print(opened - began, time.perf_counter() - opened, own_peak() - before)


def main() -> None:
    """Run the bench and write its result file."""
    arguments = read_arguments(__doc__, rounds=5, images=6000)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:WORKERS])  # as many workers as cores for everybody
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count, different, _ = spread_out(arguments.data, folder / "images", arguments.images)
        files = sorted((folder / "images").rglob("*.JPEG"))
        beton = convert(folder / "images", folder / "x.beton")
        backends = ["threads"] + [n for n, m in (("ffcv", "ffcv"), ("dali", "nvidia.dali")) if installed(m)]
        fastil = {name: Fastil(name, beton) for name in backends}
        for one in fastil.values():
            one.rate(count)
        contestants: dict[str, Contestant] = {
            "DataLoader + PIL": dataloader(files, beton.sizes),
            "decode alone": alone(beton, resize=False),
            "decode + resize alone": alone(beton, resize=True),
        }
        if "ffcv" in backends:
            contestants["FFCV Loader"] = ffcv(folder / "x.beton")
        if "dali" in backends:
            contestants["DALI pipeline"] = dali(files)
        contestants |= {name: partial(one.rate, count) for name, one in fastil.items()}
        print(f"images per second; {count} JPEGs, {different} different ones, {WORKERS} workers")
        figures = take_turns(contestants, arguments.rounds)
        switches = {
            name: spread([one.switch(count, seed) for seed in range(arguments.rounds)]) for name, one in fastil.items()
        }
        if "ffcv" in backends:
            switches["a new FFCV Loader"] = spread([new_ffcv(folder / "x.beton") for _ in range(2)])
        apart = differences(beton, backends, different)
    for label, values in figures.items():
        show(label, spread(values), "images/s")
    for label, values_apart in apart.items():
        print(
            f"{label}: pixels {values_apart['mean']:.3f} from Pillow's in the mean, {values_apart['max']:.0f} at most"
        )
    ratios = {f"{a} / {b}": ratio(figures, a, b) for a, b in GOALS if a in figures and b in figures}
    for (a, b), goal in GOALS.items():
        if f"{a} / {b}" in ratios:
            show(f"{a} / {b}", ratios[f"{a} / {b}"], f"goal {goal:g}")
    for label, seconds in switches.items():
        show(f"new ids to first batch, {label}", seconds, "s")
    # Of no interest for a GPU, and in a stage of bench.first_contact too long.
    elsewhere = DEVICE.type == "cuda" or "FASTIL_RESULTS" in os.environ
    samples_of = () if elsewhere else (1_280_000, 14_000_000)
    scale = {str(samples): at_scale(samples) for samples in samples_of}
    for samples, found in scale.items():
        print(
            f"{int(samples):,} samples: opened in {found['open']:.2f} s, an epoch of half of them planned in "
            f"{found['plan']:.2f} s, {found['peak_mib']:.0f} MiB"
        )
    content = {
        "rounds": arguments.rounds, "images": count, "different": different, "workers": WORKERS, "batch": BATCH,
        "images_per_second": {name: spread(values) for name, values in figures.items()},
        "ratios": ratios, "goals": {f"{a} / {b}": goal for (a, b), goal in GOALS.items()},
        "pixels_from_pillow": apart, "switch_seconds": switches, "scale": scale,
    }  # fmt: skip
    print(f"written to {save('loaders', DEVICE, content)}")


if __name__ == "__main__":
    main()
