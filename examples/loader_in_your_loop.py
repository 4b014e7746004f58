"""A loader in a training loop of your own: any ids of a .beton, in any order, cropped, flipped and normalised.

fastil convert DIR train.beton && python examples/loader_in_your_loop.py train.beton
"""

import sys

import numpy as np

import fastil
from fastil.plan import Key, Transform, training_plan

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def main(path: str, epochs: int = 2, size: int = 64) -> int:
    """Read some classes and a few images of the others, as an incremental step does. Returns the number of images."""
    images = fastil.Beton(path)
    transform = Transform(size, size, pad=0, flip=True, resized=True, **IMAGENET)
    loader = fastil.make_loader(images, "auto", transform, "cpu")
    new = np.flatnonzero(images.labels < 2)
    exemplars = np.flatnonzero(images.labels >= 2)[::5]
    seen = 0
    for epoch in range(epochs):
        plan = training_plan(np.concatenate([new, exemplars]), Key(0, 0, "train", epoch), transform, 32, images.sizes)
        for batch in loader.batches(plan):  # batch.images: float32 [B, 3, size, size]; batch.labels; batch.ids
            seen += len(batch.labels)
    loader.close()
    return seen


if __name__ == "__main__":
    print(f"{main(sys.argv[1])} images")
