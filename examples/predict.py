"""A finished run that classifies: train a few epochs on image folders, then name the class of an image.

python examples/predict.py DIR IMAGE        (DIR as for `fastil run folder --data DIR`)
"""

import sys

import fastil


def main(data: str, image: str, out: str = "runs/predict") -> dict[str, float]:
    """Train, unless that is done, and return the probability of each class, the likeliest first."""
    settings = {"model": "resnet8", "size": 32, "base_epochs": 5, "epochs": 5}
    run = fastil.run("folder", data, out, resume=True, **settings)  # goes on where it stopped, or is done already
    print(f"average incremental accuracy {run.results.average_incremental_accuracy:.2f}")
    (probabilities,) = run.predict([image])
    return probabilities


if __name__ == "__main__":
    for name, probability in list(main(*sys.argv[1:3]).items())[:3]:
        print(f"{probability:6.1%}  {name}")
