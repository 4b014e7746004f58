"""Data sources as uint8 images in memory, and the streamed ones.

A source yields two splits with the same classes: train and val (the test set of the protocol). Sample id = row.
"""

import difflib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt

from fastil.data import published
from fastil.data.formats import cifar, in_memory
from fastil.data.formats.beton import Beton
from fastil.data.formats.beton_source import check_same_classes, notes_of, val_path_of
from fastil.data.formats.class_names import some
from fastil.data.formats.detect import PACKED, SMOKE_TEST, check_whole, detect, open_source
from fastil.data.formats.folder import NEEDED
from fastil.data.formats.identity import Identity, of_pixels
from fastil.data.formats.pixels import MOST_PIXELS, Exif, Reading, reading_of
from fastil.data.formats.records import SAME, ByClass, Source, relabelled
from fastil.errors import UserError
from fastil.settings import shown

BACKENDS = ("auto", "resident", "threads", "reference", "ffcv", "dali")  # how the images of a split are read
THREE = Field(min_length=3, max_length=3)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # from Debian's dataset-fashion-mnist


@dataclass(frozen=True)
class DataConfig:
    """The data set and how its pixels are prepared."""

    dataset: str = "digits"  # digits | fashion-mnist | idx | cifar10 | cifar100 | folder | imagenet
    data: str | None = None  # path of the data set; --data sets it
    val: str | None = None  # path of the test images if DATA has none, or same; --val sets it
    # folder: images are resized once, short side, then centre-cropped to a square
    size: Annotated[int, Field(ge=8)] = 32
    loader: str = "auto"  # auto | resident | threads | ffcv | dali | reference: what reads the images
    memory: Literal["streamed", "resident"] = "streamed"  # resident: exemplars stay decoded on the device
    on_corrupt: Literal["fail", "skip"] = "fail"  # folder: what to do about an image that cannot be read
    image_column: str | None = None  # of parquet files, if it is not called image or img
    label_column: str | None = None  # of parquet files, if it is not called label, fine_label or labels
    exif: Exif = "upright"  # upright: turned as the camera's tag says | ignore: as the pixels lie in the file
    max_pixels: PositiveInt = MOST_PIXELS  # an image with more is refused
    verify: bool = True  # digits, fashion-mnist, cifar: demand the images published under that name
    pad: Annotated[int, Field(ge=0)] = 4  # random crop after black padding of this many pixels
    flip: bool = True  # random mirror
    mean: Annotated[list[float], THREE] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: Annotated[list[PositiveFloat], THREE] = field(default_factory=lambda: [0.229, 0.224, 0.225])

    def __post_init__(self) -> None:
        if self.dataset not in SOURCES:
            near = difflib.get_close_matches(self.dataset, SOURCES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(SOURCES)}"
            raise UserError(f"dataset={shown(self.dataset)}: unknown; {hint}")
        if self.loader not in BACKENDS:
            raise UserError(f"loader={shown(self.loader)}: unknown; use one of {', '.join(BACKENDS)}")
        for key in ("data", "val"):
            path = getattr(self, key)
            if path is not None and not is_path(path):
                raise UserError(f"{key}={shown(path)}: must be a path or null")
        if self.pad > self.size:
            raise UserError(f"pad={self.pad}: must be at most size={self.size}, the side of the images")


@dataclass(frozen=True)
class Split(ByClass):
    """A split in memory: uint8 images [N, h, w, 3] and int64 labels [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Height and width of each image, int32 [N, 2]."""
        return np.tile(np.array(self.images.shape[1:3], dtype=np.int32), (len(self.images), 1))

    @cached_property
    def sha256(self) -> str:
        """The hash of pixels and labels, so that two runs can prove that they saw the same data."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    @cached_property
    def identity(self) -> Identity:
        """The content of the split in any order: see `fastil.data.formats.identity`."""
        return of_pixels(self.images, self.labels)


@dataclass(frozen=True)
class Dataset:
    """Train and val splits with the same classes, in memory or streamed."""

    name: str
    class_names: list[str]
    train: Split | Beton
    val: Split | Beton
    notes: tuple[str, ...] = ()  # what the reader did that the user should know
    proven: bool = False  # checksums of its files prove that it is the published one
    skipped: tuple[str, ...] = ()  # the notes that name images which could not be read


def load_dataset(config: DataConfig) -> Dataset:
    """Return the data set of a recipe. A UserError names what is missing or damaged, and the fix."""
    if config.dataset == "digits" and (config.data or config.val):
        raise UserError("digits come with scikit-learn and take no --data; for your own images use the recipe folder")
    dataset = SOURCES[config.dataset](config)
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        if len(split.labels) == 0:
            raise UserError(f"{dataset.name}: {name} has no images; add some")
        if split.labels.min() < 0 or split.labels.max() >= len(dataset.class_names):
            raise UserError(f"{dataset.name}: {name} has labels outside its {len(dataset.class_names)} classes")
        counts = np.bincount(split.labels, minlength=len(dataset.class_names))
        missing = some([dataset.class_names[label] for label in np.flatnonzero(counts == 0)])
        if missing:
            raise UserError(f"{dataset.name}: {name} has no image of class {missing}; add some or remove the class")
    if (
        isinstance(dataset.train, Split)
        and isinstance(dataset.val, Split)
        and dataset.train.images.shape[1:] != dataset.val.images.shape[1:]
    ):
        raise UserError(f"{dataset.name}: train and test images differ in size; make them the same")
    if len(dataset.class_names) < 2:
        raise UserError(
            f"{dataset.name}: only one class ({dataset.class_names[0]}); incremental training needs two or more"
        )
    return _known(config, dataset)


def _known(config: DataConfig, dataset: Dataset) -> Dataset:
    """Return the data set, with a note if it is a published one. Raises UserError if it should be and is not."""
    train, val = dataset.train, dataset.val
    if not isinstance(train, Split) or not isinstance(val, Split):  # ImageNet's identity is not known here
        return dataset
    expected = published.table().get(config.dataset)
    if expected is None:
        found = published.recognised(train.identity, val.identity)
        return dataset if found is None else replace(dataset, notes=(*dataset.notes, f"the images are {found.title}'s"))
    if not config.verify or dataset.proven:
        return dataset
    differences = published.differences(expected, dataset.class_names, train.identity, val.identity)
    if differences:
        raise UserError(
            f"{config.data or dataset.name}: not {expected.title} as published: "
            f"{'; '.join([*differences, *dataset.skipped])}. Take the published images, or train on these as another "
            "data set, without a published number next to it: verify=false"
        )
    return dataset


def image_size(config: DataConfig, dataset: Dataset) -> tuple[int, int]:
    """Return height and width of what the network sees."""
    if isinstance(dataset.train, Split):
        height, width = dataset.train.images.shape[1:3]
        return height, width
    return config.size, config.size


def digits(config: DataConfig) -> Dataset:
    """Return scikit-learn's 8x8 digits, from its wheel. Every 5th image per class in file order is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    is_val = np.zeros(len(labels), dtype=np.bool_)
    for digit in range(10):
        is_val[np.flatnonzero(labels == digit)[4::5]] = True
    images = _rgb(grey)
    return Dataset(
        "digits",
        [str(digit) for digit in range(10)],
        Split(images[~is_val], labels[~is_val]),
        Split(images[is_val], labels[is_val]),
    )


def fashion_mnist(config: DataConfig) -> Dataset:
    """Return Fashion-MNIST, by default from the idx files of Debian's package."""
    if config.data is None and not FASHION_MNIST.exists():
        raise UserError(
            f"Fashion-MNIST not found at {FASHION_MNIST}; apt-get install dataset-fashion-mnist, or --data with its "
            "idx files"
        )
    return _published(replace(config, data=config.data or str(FASHION_MNIST)))


def idx(config: DataConfig) -> Dataset:
    """Return any grayscale data set in the four idx files of MNIST's format, gzipped or not, or in a .beton."""
    path = _required(config)
    if path.suffix == ".beton":
        return image_folder(config)
    source = open_source(_unpacked(path), "idx", config.val, verify=config.verify)
    return replace(_in_memory(config, source, None), name="idx")


def cifar10(config: DataConfig) -> Dataset:
    """Return CIFAR-10 from its unpacked archives, or its images from any other source."""
    return _cifar(config, cifar.CIFAR10)


def cifar100(config: DataConfig) -> Dataset:
    """Return CIFAR-100 with its 100 fine labels from its unpacked archives, or its images from any other source."""
    return _cifar(config, cifar.CIFAR100)


def _cifar(config: DataConfig, variant: cifar.Variant) -> Dataset:
    if config.data is None:
        raise UserError(f"{variant.name} needs its files: fastil download {variant.name} DIR, then --data DIR")
    path = Path(config.data)
    found = cifar.find(path, variant)
    if found is not None:
        source = open_source(path, variant.name, val=config.val, verify=config.verify)
        # There is no identity of CIFAR-10 to compare with: the md5 sums of the python version's files prove it.
        return replace(_published(config, source), proven=config.verify and config.val is None and found[1] == "python")
    if path.is_dir():
        try:
            detect(path, config.val)
        except UserError:
            cifar.read(path, variant, config.verify)  # its error says how to fetch it
    return _published(config)


def _published(config: DataConfig, source: Source | None = None) -> Dataset:
    """Return a published data set from any container, with its own classes in their order and its images unchanged."""
    path, expected = _required(config), published.table()[config.dataset]
    if path.is_file() and path.suffix in PACKED:
        _unpacked(path)
    source = source or _opened(config)
    labels = published.official_labels(expected, source.class_names)
    if labels is not None:
        source = relabelled(source, labels, list(expected.class_names))
    return replace(_in_memory(config, source, None), name=config.dataset)


def image_folder(config: DataConfig) -> Dataset:
    """Return image files train/<class>/* and val/<class>/*, or any other kind of source, decoded into memory. Only
    dataset=folder resizes them.
    """
    source = _opened(config)
    return _in_memory(config, source, config.size if config.dataset == "folder" else None)


def _opened(config: DataConfig) -> Source:
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    return open_source(_required(config), val=config.val, verify=config.verify, **columns)


def _in_memory(config: DataConfig, source: Source, size: int | None) -> Dataset:
    """Return both splits, decoded. size: of the images; None: their own."""
    path = _required(config)
    for name, records in (("train", source.train), ("val", source.val)):
        if records is not None:
            continue
        check_whole(path)
        if source.kind == "folder":
            raise UserError(f"{path / name}: no such folder; {NEEDED}")
        raise UserError(f"{path}: no {name} images in this source of the kind {source.kind}; give them by --val")
    how = reading_of(source, Reading(config.exif, config.max_pixels))
    known = published.table().get(config.dataset) if config.verify else None
    by = in_memory.SKIP
    if known:
        by += f" verify=false (fewer images are no longer {known.title} as published)"
    (train, val), skipped = in_memory.read(source, size, how, config.on_corrupt == "skip", by)
    notes = (*source.notes, *skipped)
    return Dataset(source.name, source.class_names, Split(*train), Split(*val), notes, skipped=tuple(skipped))


def imagenet(config: DataConfig) -> Dataset:
    """Return a .beton to be streamed: ImageNet, or any other set whose images must be read again in every epoch."""
    if config.data is None or not config.data.endswith(".beton"):
        raise UserError(
            "dataset=imagenet is streamed from a file: fastil convert SOURCE imagenet.beton, then --data imagenet.beton"
        )
    path = Path(config.data)
    if not path.exists():
        raise UserError(f"{path}: no such file; give --data the file that fastil convert wrote")
    val_path = path if config.val == SAME else Path(config.val) if config.val else val_path_of(path)
    if not val_path.exists():
        check_whole(path)
        raise UserError(f"{val_path}: no such file; convert the validation images as well, or give --val FILE or same")
    train, val = Beton(path), Beton(val_path)
    names = train.class_names
    check_same_classes(train, val)
    notes = notes_of(train)
    if config.val:  # they are given now, though they were missing then
        notes = tuple(note for note in notes if not note.startswith("no validation images"))
    if config.val == SAME:
        notes += (SMOKE_TEST,)
    return Dataset(train.manifest.source["name"] if train.manifest else path.stem, names, train, val, notes)


def _required(config: DataConfig) -> Path:
    if config.data is None:
        raise UserError(f"dataset={config.dataset} needs --data PATH")
    path = Path(config.data)
    if not path.exists() and "{" not in config.data:
        raise UserError(f"{path}: no such file or folder; --data must name the data set")
    return path


def is_path(text: str) -> bool:
    """Return whether a text can be the name of a file. Empty text cannot: it would be the current folder."""
    try:
        return text != "" and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _unpacked(path: Path) -> Path:
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path}: not a folder that can be read; unpack the archive and give its folder as --data")
    return path


def _rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=3)


SOURCES: dict[str, Callable[[DataConfig], Dataset]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "idx": idx,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "folder": image_folder,
    "imagenet": imagenet,
}
