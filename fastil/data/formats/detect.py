"""The kinds of data sets that are read, and which kind a path is. Samples are listed here, not decoded."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastil.data.formats import cifar, idx, shards
from fastil.data.formats.class_names import order_note
from fastil.data.formats.folder import KAGGLE, open_folder
from fastil.data.formats.imagenet import TRAIN, VAL, is_ilsvrc, open_ilsvrc, open_tiny_imagenet
from fastil.data.formats.left_out import suffix_of
from fastil.data.formats.parquet import open_parquet
from fastil.data.formats.pixels import suffixes
from fastil.data.formats.records import SAME, Pixels, Source, special
from fastil.data.formats.shards import split_of
from fastil.data.formats.tar import COMPRESSED
from fastil.data.formats.tree import Folder
from fastil.data.formats.webdataset import looks_like_webdataset, open_webdataset
from fastil.errors import UserError

SMOKE_TEST = "validation images are the training images: a smoke test, not a result"
BUILT_IN = "brings its own validation images; leave --val out, or give --val same"
PACKED = (".zip", ".7z", ".rar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst")
CIFAR_FOLDERS = [folder for v in (cifar.CIFAR10, cifar.CIFAR100) for folder in (v.python_folder, v.binary_folder)]


@dataclass(frozen=True)
class Asked:
    """How to open a data set.

    val: a path of the validation images in the same kind of layout, or "same" for the training images. verify: compare
    the md5 sums of CIFAR's files with the published ones. image_column, label_column: of parquet files.
    """

    val: str | None = None
    verify: bool = True
    image_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of data set. layout: its description for a message."""

    layout: str
    opened: Callable[[Path, Asked], Source]


def open_source(path: Path, kind: str | None = None, val: str | None = None, **how: Any) -> Source:
    """Return the data set at a path. A UserError names what is damaged, missing or unknown, and the fix.

    kind: a name of KINDS, for a path that would be taken for another kind. val, how: fields of `Asked`.
    """
    asked = Asked(val, **how)
    if kind is not None and kind not in KINDS:
        raise UserError(f"kind {kind}: unknown; use one of {', '.join(KINDS)}")
    path = Path(path)
    try:
        if not path.exists() and "{" not in str(path):
            raise UserError(f"{path}: no such file or folder; give the path of a data set")
        kind = kind or detect(path, asked.val)
        for key in ("image_column", "label_column"):
            if getattr(asked, key) is not None and kind != "parquet":
                raise UserError(f"{path}: is of the kind {kind}, and only parquet files take {key}; leave it out")
        source = KINDS[kind].opened(path, asked)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text file in it is not UTF-8 ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    if asked.val == SAME:
        source = replace(source, val=source.train, notes=(*source.notes, SMOKE_TEST))
    _check_names(path, source)
    note = order_note(source.class_names)
    if note is not None and note not in source.notes:
        source = replace(source, notes=(*source.notes, note))
    return source


def check_whole(path: Path) -> None:
    """Raise UserError, naming the whole data set, if a path without validation images is one half of it, such as
    DIR/train or x.val.beton.
    """
    base = path if path.name else path.absolute()
    name = base.name
    if path.suffix == ".beton":
        whole = base.with_name(name.removesuffix(".val.beton") + ".beton")
        if name.endswith(".val.beton"):
            give = str(whole) if whole.exists() else "the file of its training images"
            raise UserError(f"{path}: holds the validation images of {whole.name}; give --data {give}")
        return
    if split_of(name) is None:
        return
    others = {split_of(entry.name) for entry in base.parent.iterdir() if entry.is_dir() == path.is_dir()}
    if "train" in others and others & {"val", "test"}:
        raise UserError(f"{path}: is one half of the data set {base.parent}; give --data {base.parent}")


def detect(path: Path, val: str | None = None) -> str:
    """Return the kind of a path, from the names of its files and, for a tar, its first members."""
    if not path.is_dir():
        return _detect_file(path)
    for kind, sign in _SIGNS:
        if (path / sign).exists():
            return kind
    if (path / "train").is_file() and (path / "meta").is_file():
        return "cifar100"
    has_folders = _has_class_folders(path / "train") or _has_class_folders(path / "val")
    if not has_folders:  # class folders win over shards next to them
        for kind, suffix in (("parquet", ".parquet"), ("webdataset", ".tar")):
            if shards.grouped(path, suffix):
                return kind
    splits = ("train", "val", *(f"{at}/train" for at in KAGGLE))
    if val is not None or any((path / at).is_dir() for at in splits) or _has_images(path):
        return "folder"
    packed = next((entry for entry in sorted(path.iterdir()) if entry.suffix in PACKED), None)
    raise _unknown(path, f"{packed.name} in it has to be unpacked first, if that is the data set" if packed else "")


def _detect_file(path: Path) -> str:
    if "{" in str(path) and not path.exists():
        return "parquet" if path.suffix == ".parquet" else "webdataset"
    if path.suffix in (".beton", ".parquet"):
        return path.suffix[1:]
    what = special(path.stat().st_mode)  # not opened: a pipe would wait
    if what:
        raise UserError(f"{path}: is {what}, neither a file nor a folder; give the path of a data set")
    with path.open("rb") as file:
        begin = file.read(512)
    tool = next((tool for magic, tool in COMPRESSED.items() if begin.startswith(magic)), None)
    if tool:
        raise UserError(f"{path}: compressed, so its images have no address; {tool} it first")
    if path.suffix != ".tar" and begin[257:262] != b"ustar":
        raise _unknown(path, "")
    if begin.partition(b"/")[0].decode("ascii", "replace") in CIFAR_FOLDERS:
        raise UserError(f"{path}: CIFAR's own archive; unpack it (tar -xf) and give the folder")
    if is_ilsvrc(path):
        return "ilsvrc"
    return "webdataset" if looks_like_webdataset(path) else "folder-tar"


def _has_class_folders(path: Path) -> bool:
    """Return whether a folder has folders and no shards, from its first entries only: there may be a million."""
    if not path.is_dir():
        return False
    entries = [entry for entry in itertools.islice(path.iterdir(), 1000) if not entry.name.startswith(".")]
    return any(entry.is_dir() for entry in entries) and not any(
        entry.suffix in (".parquet", ".tar") for entry in entries
    )


def _has_images(path: Path) -> bool:
    """Return whether its first folder holds image files, which makes it a folder of class folders without train/."""
    tree = Folder(path)
    first = next(iter(tree.inside("").folders), None)
    return first is not None and any(suffix_of(file.name) in suffixes() for file in tree.inside(first).files)


def _unknown(path: Path, hint: str) -> UserError:
    looked_for = "; ".join(f"{name}: {kind.layout}" for name, kind in KINDS.items())
    return UserError(f"{path}: no data set that is known here{f'; {hint}' if hint else ''}. Looked for {looked_for}")


def _check_names(path: Path, source: Source) -> None:
    """Check the names of classes. They go into a text file, are shown to people, and tell two files' classes apart."""
    twice = [name for name, count in Counter(source.class_names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: two classes are called {twice[0][:80]!r}; rename one, or fetch it again")
    for name in source.class_names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: the name of class {name[:80]!r} is not UTF-8; rename it") from None
        if not name.isprintable():
            raise UserError(f"{path}: the name of class {name[:80]!r} has characters that cannot be shown; rename it")


def _open_cifar(variant: cifar.Variant, path: Path, asked: Asked) -> Source:
    _own_val_only(path, asked.val)
    names, (train, test) = cifar.read(path, variant, asked.verify)
    parts = Pixels(f"{path} (train)", *train), Pixels(f"{path} (test)", *test)
    return Source(variant.name, variant.name, names, *parts)


def _open_idx(path: Path, asked: Asked) -> Source:
    _own_val_only(path, asked.val)
    names, (train, test) = idx.read(path)
    return Source("idx", path.resolve().name, names, Pixels(f"{path} (train)", *train), Pixels(f"{path} (t10k)", *test))


def _class_folders(*, packed: bool) -> Callable[[Path, Asked], Source]:
    def opened(path: Path, asked: Asked) -> Source:
        if path.is_file() != packed:
            raise UserError(
                f"{path}: {'no file' if packed else 'a file, not a folder of class folders'}; leave --kind out"
            )
        return open_folder(path, asked.val)

    return opened


def _own_val_only(path: Path, val: str | None) -> None:
    if val not in (None, SAME):
        raise UserError(f"{path}: {BUILT_IN}")


def _open_beton(path: Path, asked: Asked) -> Source:
    from fastil.data.formats.beton_source import records_of

    if asked.val in (None, SAME):
        return records_of(path)
    if not str(asked.val).endswith(".beton"):
        raise UserError(f"{asked.val}: the validation images of a .beton must be one, too; convert them")
    return records_of(path, Path(str(asked.val)))


def _open_parquet(path: Path, asked: Asked) -> Source:
    return open_parquet(path, asked.val, asked.image_column, asked.label_column)


def _plain(opened: Callable[[Path, str | None], Source]) -> Callable[[Path, Asked], Source]:
    return lambda path, asked: opened(path, asked.val)


# What a folder of each kind must hold; the first match decides.
_SIGNS = (
    ("ilsvrc", TRAIN),
    ("ilsvrc", VAL),
    ("tiny-imagenet", "wnids.txt"),
    *(
        (variant.name, f"{folder}{file}")
        for variant in (cifar.CIFAR10, cifar.CIFAR100)
        for folder in ("", f"{variant.python_folder}/", f"{variant.binary_folder}/")
        for file in (variant.train[0].name, variant.binary_train[0])
        if file != "train" or folder  # train may also be a folder of class folders
    ),
    ("idx", idx.TRAIN_IMAGES),
    ("idx", f"{idx.TRAIN_IMAGES}.gz"),
)
KINDS = {
    "folder": Kind("train/<class>/* and val/<class>/*, or <class>/* alone", _class_folders(packed=False)),
    "folder-tar": Kind("the same in one .tar", _class_folders(packed=True)),
    "ilsvrc": Kind(f"{TRAIN} with the val and devkit archives next to it", _plain(open_ilsvrc)),
    "tiny-imagenet": Kind("wnids.txt, train/<wnid>/images/*, val/val_annotations.txt", _plain(open_tiny_imagenet)),
    "cifar10": Kind("cifar-10-batches-py or -bin", lambda path, asked: _open_cifar(cifar.CIFAR10, path, asked)),
    "cifar100": Kind("cifar-100-python or -binary", lambda path, asked: _open_cifar(cifar.CIFAR100, path, asked)),
    "idx": Kind("train-images-idx3-ubyte and its three companions", _open_idx),
    "parquet": Kind("train-*.parquet and validation-*.parquet", _open_parquet),
    "webdataset": Kind("train-*.tar and val-*.tar with <key>.jpg, <key>.cls", _plain(open_webdataset)),
    "beton": Kind("FILE.beton", _open_beton),
}
