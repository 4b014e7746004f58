"""Herding and evaluation: their time over the network's pure forward on the same images.

python -m bench.memory [--rounds N]

50 classes of 500 images at 32x32 through ResNet-32, 20 exemplars each. The pure forward runs the same folded float32
network on batches that are already there.

Claim: both take at most 1.15 of it.
"""

import argparse

import numpy as np
import torch

from bench.harness import digits_at, ratio, save, seconds, show, spread, take_turns
from fastil import memory
from fastil.data import make_loader
from fastil.device import pick_device
from fastil.evaluation import BATCH, evaluate, forward
from fastil.models import Folded, ModelConfig, build_network
from fastil.plan import Transform, sequential_plan

CLASSES, IMAGES, EXEMPLARS = 50, 500, 20
TRANSFORM = Transform(32, 32, pad=4, flip=True, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def main() -> None:
    """Run the bench and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    device = pick_device("auto")
    loader = make_loader(digits_at(32, CLASSES * IMAGES), "auto", TRANSFORM, device)
    network = build_network(ModelConfig("resnet32"), 100, 0).to(device).eval()
    frozen = Folded(network, torch.float32, BATCH)
    ids = np.arange(CLASSES * IMAGES)
    ready = [batch.images for batch in loader.batches(sequential_plan(ids, TRANSFORM, BATCH))]

    def pure_forward() -> None:
        with torch.inference_mode():
            for images in ready:
                frozen(images)

    def features_and_herding() -> None:
        features = forward(frozen, loader, ids).features
        picks = memory.herd_classes(torch.split(features, IMAGES), EXEMPLARS)
        assert [len(p) for p in picks] == [EXEMPLARS] * CLASSES

    def evaluation() -> None:
        logits = forward(frozen, loader, ids).scaled_logits
        evaluate(logits, labels, step=0, num_base=CLASSES, num_old=0, num_seen=CLASSES)

    labels = torch.arange(CLASSES, device=device).repeat_interleave(IMAGES)
    features = forward(frozen, loader, ids).features
    print(f"seconds, {CLASSES} classes of {IMAGES} images")
    figures = take_turns(
        {
            "features and herding": lambda: seconds(features_and_herding, device),
            "evaluation": lambda: seconds(evaluation, device),
            "pure forward": lambda: seconds(pure_forward, device),
            "herding alone": lambda: seconds(
                lambda: memory.herd_classes(torch.split(features, IMAGES), EXEMPLARS), device
            ),
        },
        rounds,
    )
    over = {name: ratio(figures, name, "pure forward") for name in ("features and herding", "evaluation")}
    for name, values in figures.items():
        show(name, spread(values), "s")
    for name, found in over.items():
        show(f"{name} / pure forward", found)
    content = {
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in figures.items()},
        "over the forward": over,
    }
    print(f"written to {save('memory', device, content)}")


if __name__ == "__main__":
    main()
