"""`fastil predict`: the classes of image files, by the network of a run."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from fastil.data.formats.left_out import is_image, suffix_of
from fastil.data.formats.pixels import FORMATS, advice
from fastil.data.formats.tree import is_hidden
from fastil.errors import UserError
from fastil.reporting.classifier import Classifier
from fastil.text import one_line, say

BATCH = 64  # images that are decoded and classified together
SHOWN = 5  # classes of a line


class Prediction(NamedTuple):
    """What became of a file: the probability of each class, the likeliest first, or why there is none."""

    path: Path
    probabilities: dict[str, float]
    problem: UserError | None = None


def predictions(network: Classifier, paths: Iterable[Path | Prediction]) -> Iterator[Prediction]:
    """A prediction for each image file, in their order; those that already have one keep it."""
    left = iter(paths)
    while chosen := list(islice(left, BATCH)):
        images, found = [], []
        for path in chosen:
            if isinstance(path, Prediction):
                found.append(path)
                continue
            try:
                images.append(torch.from_numpy(network.image(path).copy()))
                found.append(Prediction(path, {}))
            except UserError as error:
                found.append(Prediction(path, {}, error))
        rows: Iterator[list[float]] = iter(())
        if images:
            with torch.no_grad():
                rows = iter(network(torch.stack(images)).tolist())
        for one in found:
            yield one if one.problem else one._replace(probabilities=_ranked(next(rows), network.class_names))


def _ranked(row: list[float], names: list[str]) -> dict[str, float]:
    return {names[c]: row[c] for c in sorted(range(len(row)), key=lambda c: -row[c])}


def files_of(given: Iterable[Path]) -> Iterator[Path | Prediction]:
    """The files that are given, and those in folders that are given and in all folders below, in the order of their
    names, without hidden ones. A link to a folder is not followed within one: it may lead round in a circle. UserError
    for what is not there."""
    given = list(given)
    for path in given:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such image or folder")
    for path in given:
        yield from _below(path) if path.is_dir() else (path,)


def _below(top: Path) -> Iterator[Path | Prediction]:
    left = [top]
    while left:
        path = left.pop()
        if path == top or (path.is_dir() and not path.is_symlink()):
            try:
                inside = [name for name in os.listdir(path) if not is_hidden(name)]
            except OSError as error:
                yield Prediction(path, {}, UserError(f"{path}: cannot be read ({error.strerror}); left out"))
                continue
            left += [path / name for name in sorted(inside, reverse=True)]
        elif is_image(path.name):
            yield path
        else:  # without reading it: a folder of images may hold a film
            suffix = suffix_of(path.name)
            known = any(suffix in endings for endings in FORMATS.values())
            yield Prediction(path, {}, UserError(f"{path}: {advice(suffix) if known else 'no image by its ending'}"))


def write_predictions(network: Classifier, given: Iterable[Path], as_json: bool) -> bool:
    """Print a line for each image of these files and folders. Returns whether all could be read. UserError where there
    is none."""
    whole, some = True, False
    for path, probabilities, problem in predictions(network, files_of(given)):
        some, whole = True, whole and problem is None
        if as_json:
            what = {"probabilities": probabilities} if problem is None else {"error": str(problem)}
            say(json.dumps({"image": str(path)} | what))
        elif problem is not None:
            say(f"left out: {problem}", sys.stderr)
        else:
            likeliest = list(probabilities.items())[:SHOWN]
            say("\t".join([one_line(str(path)), *(one_line(f"{100 * p:.1f} % {name}") for name, p in likeliest)]))
    if not some:
        raise UserError(f"{', '.join(map(str, given))}: no images; give files, or folders with images in them")
    return whole
