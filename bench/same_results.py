"""Whether two commits train the same: a dozen short runs with each, and the bytes of what they write.

python -m bench.same_results COMMIT [COMMIT]      the second is HEAD by default

Every method, loss, sampler and correction on scikit-learn's digits, a streamed .beton and a run that is killed and
resumed, one after the other in checkouts of their own. Exit status 1 if a file differs or is missing on one side.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SHORT = [
    "base_classes=6", "increment=2", "base_epochs=2", "epochs=2", "batch_size=32", "exemplars_per_class=10",
    "compile=false", "device=cpu", "precision=fp32",
]  # fmt: skip
COSINE = ["head=cosine", "last_relu=false"]
PROXIES = ["head=proxies", "proxies=3", "last_relu=false"]
RUNS = {
    "softmax": ["loss=softmax"],
    "balanced": ["loss=balanced", "alpha=0.5"],
    "meta": ["loss=meta_balanced", "meta_every=2"],
    "separated": ["loss=separated", "sampler=memory_oversampling"],
    "rescaled": ["loss=rescaled", "sampler=class_oversampling", "exemplar_selection=random"],
    "finetuned": ["loss=softmax", "correction=balanced_finetuning", "finetune_epochs=2"],
    "icarl": ["method=icarl", "loss=softmax", "predictor=nme"],
    "icarl_bce": ["method=icarl_bce", "loss=softmax", "predictor=nme"],
    "bic": ["method=bic", "loss=softmax", "bic_validation=reserved"],
    "lucir": ["method=lucir", "loss=softmax", *COSINE],
    "mnemonics": ["method=mnemonics", "loss=softmax", *COSINE],
    "podnet": ["method=podnet", "loss=nca", *PROXIES],
    "tpcil": ["method=tpcil", "loss=softmax", *COSINE],
}
STREAMED = [
    "size=32", "order=alphabetical", "base_classes=4", "increment=1", "exemplars_per_class=4", "model=resnet8",
    "epochs=2", "batch_size=16", "device=cpu", "compile=false", "precision=fp32",
]  # fmt: skip
WRITTEN = ("results.json", "metrics.jsonl", "memory/*.json", "predictions/*.npy", "confusion/*.npy")


def start(checkout: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start fastil from a checkout. Returns the process."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastil.cli", *arguments], env=environment, cwd=checkout, stdout=subprocess.DEVNULL
    )


def train(checkout: Path, out: Path, *arguments: str) -> None:
    """Train a run; end the process if that fails."""
    if start(checkout, "run", *arguments, "--out", str(out)).wait():
        raise SystemExit(f"{out} failed")


def train_all(checkout: Path, root: Path, images: Path) -> None:
    """Train every run from a checkout, under root."""
    for name, settings in RUNS.items():
        train(checkout, root / name, "digits", *SHORT, *settings)
    if start(checkout, "convert", str(images), str(root / "x.beton")).wait():
        raise SystemExit("convert failed")
    train(checkout, root / "streamed", "imagenet_balanced_5", f"data={root / 'x.beton'}", *STREAMED)
    killed, metrics = ["digits", *SHORT, "checkpoint_every=1"], root / "killed/metrics.jsonl"
    process = start(checkout, "run", *killed, "--out", str(root / "killed"))
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    train(checkout, root / "killed", *killed, "--resume")


def written(root: Path) -> dict[Path, bytes]:
    """Return the bytes of the files that must be the same."""
    return {path.relative_to(root): path.read_bytes() for part in WRITTEN for path in root.glob(f"*/{part}")}


def draw_images(folder: Path) -> None:
    """Write JPEGs of six colours and many sizes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for label in range(6):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for i in range(count):
                size = (*random.integers(30, 80, 2), 3)
                pixels = np.roll([200, 30, 30 + 30 * label], label) + random.normal(0, 25, size)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i:02d}.jpg")


def main() -> int:
    """Train with both commits. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("commits", nargs="+", metavar="COMMIT")
    commits = [*parser.parse_args().commits, "HEAD"][:2]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_images(root / "images")
        found = []
        for number, commit in enumerate(commits):
            checkout = root / f"checkout{number}"
            subprocess.run(["git", "clone", "--quiet", "--shared", ".", checkout], check=True)
            subprocess.run(["git", "-C", checkout, "checkout", "--quiet", "--detach", commit], check=True)
            train_all(checkout, root / f"runs{number}", root / "images")
            found.append(written(root / f"runs{number}"))
    ours, theirs = found
    different = sorted(str(path) for path in ours.keys() | theirs if ours.get(path) != theirs.get(path))
    for name in different:
        print(f"DIFFERENT {name}")
    print(f"{commits[0]} and {commits[1]}: {len(RUNS) + 2} runs, {len(ours)} files, {len(different)} different")
    return 1 if different or not ours else 0


if __name__ == "__main__":
    raise SystemExit(main())
