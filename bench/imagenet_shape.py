"""ImageNet at its true shape on a CPU: 1,000 classes, base 500 + 5 x 100, ResNet-18 at 224x224, killed and resumed.

python -m bench.imagenet_shape [--data FOLDER or TAR] [--folder FOLDER]

Four training images and a test image of each of ImageNet's 1,000 wnids are cut from the photos of the data, each a crop
of its own, and encoded again; photos serve several classes. `fastil convert` makes a .beton of them, on which
`fastil run imagenet_balanced_5` trains an epoch a step, streamed: once undisturbed, and once killed (SIGKILL) in the
middle of step 2 and stopped (SIGTERM) in the middle of step 4, both at once with a thread each. Exit status 1 if the
two differ in what they write.

Seconds of a step, by the clock and on the processor: the plan; new ids to the first batch; training; choosing
exemplars, and what of it is herding; evaluation, and what of it is not the network; checkpoints. Memory: the peak so
far. Accuracies mean nothing here.
"""

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.convert import DATA, encoded_images
from bench.convert_contestants import own_peak
from bench.harness import save
from bench.same_results import WRITTEN
from fastil.data.published import table
from fastil.text import format_table, say

TRAIN, TEST = 4, 1  # images of a class
GREY = 50  # one class in so many
SETTINGS = [
    "epochs=1", "base_epochs=1", "exemplars_per_class=2", "batch_size=32", "lr=0.01", "device=cpu", "compile=false",
]  # fmt: skip
KILLED, STOPPED = 2, 4  # steps
WATCHED = "FASTIL_WATCHED"  # in the environment: the file for the seconds of a run's parts
MIDDLE, SAVED = "middle", "checkpoint"
PARTS = ("plan", "first batch", "train", "memory", "herding", "evaluate", "accuracies", SAVED)


def make_images(data: Path, folder: Path) -> None:
    """Write train/WNID and val/WNID: crops of nine tenths of a photo, at places of their own; some are grayscale, as in
    ImageNet.
    """
    photos = [content for _, _, content in encoded_images(data)]
    for number, name in enumerate(table()["imagenet"].class_names):
        photo: Image.Image = Image.open(io.BytesIO(photos[number % len(photos)]))
        photo = photo.convert("L") if number % GREY == 0 else photo
        random = np.random.default_rng(number)
        for i, split in enumerate(["train"] * TRAIN + ["val"] * TEST):
            width, height = (max(1, side * 9 // 10) for side in photo.size)
            left, top = (int(random.integers(0, a - b + 1)) for a, b in zip(photo.size, (width, height), strict=True))
            path = folder / split / name / f"{name}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.crop((left, top, left + width, top + height)).save(path, "JPEG", quality=92)


def clocks() -> tuple[float, float]:
    """Return the seconds of the clock and of the processor."""
    return time.perf_counter(), time.process_time()


def watched() -> None:
    """Be fastil's command line, and add the seconds of a run's parts to the file WATCHED, a line each."""
    from fastil import cli, memory
    from fastil.data.loaders.streaming import Streaming
    from fastil.training import experiment, phases, run_directory

    step = -1

    def note(part: str, began: tuple[float, float], **more: Any) -> None:
        clock, processor = (now - then for now, then in zip(clocks(), began, strict=True))
        line = {"step": step, "part": part, "seconds": clock, "processor": processor, "mebibytes": own_peak()}
        with open(os.environ[WATCHED], "a") as file:
            file.write(json.dumps(line | more) + "\n")

    def timed(owner: Any, name: str, part: str) -> None:
        work = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            began = clocks()
            result = work(*arguments, **options)
            note(part, began)
            return result

        setattr(owner, name, call)

    def inputs(self: Any, plan: Any, first: int = 0) -> Iterator[Any]:
        began, batches, middle = clocks(), all_inputs(self, plan, first), len(plan.ids) // plan.batch_size // 2
        for number, batch in enumerate(batches):
            if self.transform.resized and number == 0:
                note("first batch", began, images=len(plan.ids))
            if self.transform.resized and number == middle:
                note(MIDDLE, began)
            yield batch

    def run_step(self: Any, plan: Any, position: Any) -> None:
        nonlocal step
        step = plan.step
        whole_step(self, plan, position)

    all_inputs, whole_step = Streaming.inputs, experiment.Experiment.run_step
    Streaming.inputs = inputs  # type: ignore[assignment]
    experiment.Experiment.run_step = run_step  # type: ignore[method-assign]
    timed(phases.Phases, "training_epoch", "plan")
    timed(memory, "herd_classes", "herding")
    timed(experiment, "evaluate", "accuracies")
    for name in ("save", "save_step"):
        timed(run_directory.RunDirectory, name, SAVED)
    for name, part in (("train", "train"), ("select_exemplars", "memory"), ("evaluate", "evaluate")):
        timed(experiment.Experiment, name, part)
    cli.main()


class Run:
    """A run in a folder, started and ended as often as need be."""

    def __init__(self, folder: Path, beton: Path) -> None:
        self.out, self.log, self.text = folder / "run", folder / "watched.jsonl", folder / "output.txt"
        self.command = ["run", "imagenet_balanced_5", *SETTINGS, "--data", str(beton), "--out", str(self.out)]
        folder.mkdir()

    def start(self, *options: str) -> "subprocess.Popen[bytes]":
        with open(self.text, "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", "from bench.imagenet_shape import watched; watched()", *self.command, *options],
                env=os.environ | {WATCHED: str(self.log), "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output,
            )  # fmt: skip

    def finish(self, *options: str) -> float:
        """Let it run to its end. Returns the seconds."""
        began = time.perf_counter()
        if self.start(*options).wait():
            raise SystemExit(f"the run failed, see {self.text}:\n{self.text.read_text()[-2000:]}")
        return time.perf_counter() - began

    def end_in(self, step: int, number: signal.Signals, *options: str) -> None:
        """Let it run to the middle of the training of a step, and send a signal."""
        process = self.start(*options)
        while process.poll() is None:
            if any((line["step"], line["part"]) == (step, MIDDLE) for line in self.lines()):
                process.send_signal(number)
                break
            time.sleep(0.1)
        status, last = process.wait(), self.lines()[-1]
        if status not in (-number, 128 + number) or (last["step"], last["part"]) not in ((step, MIDDLE), (step, SAVED)):
            raise SystemExit(f"ended with {status} after {last}, not by {number.name} in step {step}; see {self.text}")

    def lines(self) -> list[dict[str, Any]]:
        """Return what `watched` has written so far."""
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def written(self) -> dict[str, bytes]:
        """Return the bytes of what must be the same after a resume, by name."""
        names = sorted(path for part in (*WRITTEN, "protocol.json") for path in self.out.glob(part))
        return {str(path.relative_to(self.out)): path.read_bytes() for path in names}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the network after the last step."""
        found: dict[str, torch.Tensor] = torch.load(self.out / "checkpoints/step_5.pt", weights_only=True)
        return found

    def parts(self) -> dict[int, dict[str, Any]]:
        """Return of each step the seconds of its parts, its images, and MiB at the peak of memory so far."""
        found: dict[int, dict[str, Any]] = {}
        for line in self.lines():
            if line["step"] < 0 or line["part"] == MIDDLE:
                continue
            of_step = found.setdefault(line["step"], {part: {"seconds": 0.0, "processor": 0.0} for part in PARTS})
            for key in ("seconds", "processor"):
                of_step[line["part"]][key] += line[key]
            of_step |= {key: line[key] for key in ("mebibytes", "images") if key in line}
        return found

    def resumed_at(self) -> list[str]:
        """Return where it went on, as it said."""
        return re.findall(r"going on at (.*)", self.text.read_text())


def timed_command(*arguments: str) -> float:
    """Run a command of fastil. Returns its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fastil", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def megabytes(folder: Path) -> float:
    """Return the size of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def show(parts: dict[int, dict[str, Any]]) -> None:
    """Print seconds per step, by the clock and on the processor."""
    header = ("step", "images", *PARTS, "MiB")
    rows = [
        (
            str(step), str(one["images"]), *("{seconds:.2f} / {processor:.2f}".format(**one[part]) for part in PARTS),
            f"{one['mebibytes']:.0f}",
        )
        for step, one in parts.items()
    ]  # fmt: skip
    say(format_table(header, rows))


def measure(data: Path, folder: Path, tell: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
    """Return the content of the result file, and whether the disturbed run is the undisturbed one."""
    make_images(data, folder / "images")
    beton = folder / "imagenet.beton"
    converted = timed_command("convert", str(folder / "images"), str(beton))
    tell(f"converted in {converted:.0f} s: {beton.stat().st_size / 1e6:,.0f} MB")
    planned = timed_command("plan", "imagenet_balanced_5", *SETTINGS, "--data", str(beton))
    whole, ended = Run(folder / "whole", beton), Run(folder / "ended", beton)
    with ThreadPoolExecutor(1) as pool:
        undisturbed = pool.submit(whole.finish)
        ended.end_in(KILLED, signal.SIGKILL)
        ended.end_in(STOPPED, signal.SIGTERM, "--resume")
        ended.finish("--resume")
        seconds = undisturbed.result()
    parts = whole.parts()
    tell(f"trained undisturbed in {seconds:.0f} s, with its start")
    show(parts)
    ours, theirs = whole.written(), ended.written()
    different = sorted(name for name in ours.keys() | theirs if ours.get(name) != theirs.get(name))
    one, other = whole.weights(), ended.weights()
    different += [name for name in one if not torch.equal(one[name], other[name])]
    tell(f"killed in step {KILLED}, stopped in step {STOPPED}; went on at {'; '.join(ended.resumed_at())}")
    tell(f"{len(ours)} files and {len(one)} tensors of the last network, {len(different)} different {different}")
    reported = timed_command("report", str(whole.out), "--out", str(folder / "report"), "--html")
    content = {
        "settings": SETTINGS, "train_images": TRAIN * 1000, "test_images": TEST * 1000,
        "beton_megabytes": beton.stat().st_size / 1e6,
        "seconds": {"convert": converted, "plan": planned, "run": seconds, "report": reported},
        "steps": parts, "run_directory_megabytes": megabytes(whole.out),
        "page_megabytes": (folder / "report/report.html").stat().st_size / 1e6,
        "went_on_at": ended.resumed_at(), "files_compared": len(ours), "different": different,
    }  # fmt: skip
    return content, bool(ours) and not different


def main() -> int:
    """Run the bench and write its result file. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--folder", type=Path, help="keep everything there; default: a temporary one")
    arguments = parser.parse_args()
    if not arguments.data.exists():
        print(f"no images at {arguments.data}: give --data a folder or a tar of JPEGs", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if arguments.folder is None else arguments.folder
        content, same = measure(arguments.data, folder, lambda line: say(line, flush=True))
    say(f"run directory {content['run_directory_megabytes']:.0f} MB; {content['seconds']}")
    say(f"written to {save('imagenet_shape', torch.device('cpu'), content)}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
