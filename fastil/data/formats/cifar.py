"""CIFAR-10 and CIFAR-100: the python version (pickles) and the binary version.

A pickle can run code, so the unpickler here builds arrays, containers and strings and refuses everything else.
"""

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastil.data.formats.records import Unreadable, read_lines, whole_file
from fastil.errors import UserError

PIXELS = 3 * 32 * 32
MOST_META, MOST_RECORD = 1 << 20, 8192  # bytes of a pickle: for the names, and for each image
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


class File(NamedTuple):
    """A file of the published archive: its name, its MD5 and how many images it holds."""

    name: str
    md5: str
    images: int


@dataclass(frozen=True)
class Variant:
    """File names, published md5 sums and layout of CIFAR-10 or CIFAR-100."""

    name: str
    python_folder: str
    binary_folder: str
    train: tuple[File, ...]
    test: File
    meta: File
    label_key: bytes
    names_key: bytes
    names_file: str
    binary_train: tuple[str, ...]
    binary_test: str
    label_bytes: int  # in a binary record; the last one is the label to use
    archive: str
    archive_md5: str
    archive_bytes: int


CIFAR10 = Variant(
    name="cifar10",
    python_folder="cifar-10-batches-py",
    binary_folder="cifar-10-batches-bin",
    train=(
        File("data_batch_1", "c99cafc152244af753f735de768cd75f", 10000),
        File("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec", 10000),
        File("data_batch_3", "54ebc095f3ab1f0389bbae665268c751", 10000),
        File("data_batch_4", "634d18415352ddfa80567beed471001a", 10000),
        File("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb", 10000),
    ),
    test=File("test_batch", "40351d587109b95175f43aff81a1287e", 10000),
    meta=File("batches.meta", "5ff9c542aee3614f3951f8cda6e48888", 0),
    label_key=b"labels",
    names_key=b"label_names",
    names_file="batches.meta.txt",
    binary_train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    binary_test="test_batch.bin",
    label_bytes=1,
    archive="cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    archive_bytes=170_498_071,
)
CIFAR100 = Variant(
    name="cifar100",
    python_folder="cifar-100-python",
    binary_folder="cifar-100-binary",
    train=(File("train", "16019d7e3df5f24257cddd939b257f8d", 50000),),
    test=File("test", "f0ef6b0ae62326f3e7ffdfab6717acfc", 10000),
    meta=File("meta", "7973b15100ade9c7d40fb424638fde48", 0),
    label_key=b"fine_labels",
    names_key=b"fine_label_names",
    names_file="fine_label_names.txt",
    binary_train=("train.bin",),
    binary_test="test.bin",
    label_bytes=2,
    archive="cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    archive_bytes=169_001_437,
)


class _PickledArray:
    """A stand-in for numpy's array while a pickle is read. numpy's own reconstruction trusts the dtype in the file, and
    with a dtype of objects a file can make numpy follow any address.
    """

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if dtype is not _BYTES or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array in it is not one of bytes")
        self.values = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _PickledDtype:
    def __setstate__(self, state: Any) -> None:
        pass


_BYTES, _OTHER = _PickledDtype(), _PickledDtype()


def _dtype(code: Any, *options: Any) -> _PickledDtype:
    return _BYTES if code in (b"u1", "u1") else _OTHER


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


def _reconstruct(*arguments: Any) -> _PickledArray:
    return _PickledArray()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    """Return an array as protocol 5 pickles it."""
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", bytes(content) if isinstance(content, bytearray) else content))
    return array


# The only globals a CIFAR pickle needs: numpy's array reconstruction, under its names in numpy 1 and 2, and the encoder
# that newer Pythons write for bytes. All of them are stand-ins.
STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Reads CIFAR's pickles and refuses any that ask for other code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        asked = f"{module}.{name}"[:80]  # a damaged name can be as long as the file
        raise pickle.UnpicklingError(f"it asks for {asked}, which no CIFAR file needs")


def read(path: Path, variant: Variant, verify: bool) -> tuple[list[str], tuple[Arrays, Arrays]]:
    """Return class names and (train, test), each uint8 [N, 32, 32, 3] and int64 [N].

    path: the folder with the files, or the one it was unpacked into. verify: compare md5 sums (python version). None
    are published for the unpacked binary version, whose sizes and labels are checked.
    """
    found = find(path, variant)
    if found is not None:
        folder, version = found
        return _read_python(folder, variant, verify) if version == "python" else _read_binary(folder, variant)
    raise UserError(
        f"{path}: neither {variant.python_folder}/{variant.train[0].name} nor "
        f"{variant.binary_folder}/{variant.binary_train[0]} there; run fastil download {variant.name} {path}"
    )


def find(path: Path, variant: Variant) -> tuple[Path, Literal["python", "binary"]] | None:
    """Return the folder with the files and which version they are. Only the python version has published md5 sums."""
    versions: tuple[tuple[str, str, Literal["python", "binary"]], ...] = (
        (variant.python_folder, variant.train[0].name, "python"),
        (variant.binary_folder, variant.binary_train[0], "binary"),
    )
    for name, file, version in versions:
        for folder in (path / name, path):
            if (folder / file).is_file():
                return folder, version
    return None


def _read_python(folder: Path, variant: Variant, verify: bool) -> tuple[list[str], tuple[Arrays, Arrays]]:
    meta = _unpickle(folder, variant, variant.meta, verify)
    try:
        names = [name if isinstance(name, str) else name.decode() for name in meta[variant.names_key]]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise UserError(f"{folder / variant.meta.name}: no class names in it; download it again") from None
    parts = [_python_batch(folder, file, variant, verify) for file in variant.train]
    train = np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
    return names, (train, _python_batch(folder, variant.test, variant, verify))


def _python_batch(folder: Path, file: File, variant: Variant, verify: bool) -> Arrays:
    content = _unpickle(folder, variant, file, verify)
    data, labels = getattr(content.get(b"data"), "values", None), content.get(variant.label_key)
    if (
        data is None
        or not isinstance(labels, list)
        or not all(type(label) is int and 0 <= label < 256 for label in labels)
        or data.shape != (len(labels), PIXELS)
    ):
        raise UserError(f"{folder / file.name}: no images and labels of {variant.name} in it; download it again")
    if len(data) != file.images and verify:
        raise UserError(f"{folder / file.name}: {len(data)} images instead of {file.images}; download it again")
    return _planar_to_rows(data), np.asarray(labels, dtype=np.int64)


def _unpickle(folder: Path, variant: Variant, file: File, verify: bool) -> dict[bytes, Any]:
    path = folder / file.name
    most = MOST_META + file.images * MOST_RECORD
    try:
        raw = whole_file(path).front(most + 1)
    except Unreadable as error:
        raise UserError(f"{error}; download the data set again") from None
    if len(raw) > most:
        raise UserError(f"{path}: more than {most:,} bytes, no file of {variant.name} has so many; download it again")
    if verify and hashlib.md5(raw, usedforsecurity=False).hexdigest() != file.md5:
        raise UserError(
            f"{path}: damaged or changed, its md5 is not {file.md5}; download it again, or say that it is meant: "
            "verify=false (fastil convert: --kind)"
        )
    try:
        content = RestrictedUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{path}: refused, {error or 'the file is cut short'}; download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a CIFAR file (no dictionary in it); download it again")
    # Python 2 wrote the published files with bytes as keys; Python 3 would write text.
    return {key.encode("utf-8", "replace") if isinstance(key, str) else key: value for key, value in content.items()}


def _read_binary(folder: Path, variant: Variant) -> tuple[list[str], tuple[Arrays, Arrays]]:
    names_path = folder / variant.names_file
    names = read_lines(names_path)
    parts = [_binary_batch(folder / name, variant, len(names)) for name in variant.binary_train]
    train = np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
    return names, (train, _binary_batch(folder / variant.binary_test, variant, len(names)))


def _binary_batch(path: Path, variant: Variant, classes: int) -> Arrays:
    try:
        raw = np.frombuffer(whole_file(path).read(), dtype=np.uint8)
    except Unreadable as error:
        raise UserError(f"{error}; unpack the binary version again") from None
    record = variant.label_bytes + PIXELS
    if len(raw) == 0 or len(raw) % record:
        raise UserError(f"{path}: {len(raw)} bytes are not whole records of {record}; it is cut short, unpack it again")
    rows = raw.reshape(-1, record)
    labels = rows[:, variant.label_bytes - 1].astype(np.int64)
    if labels.max() >= classes:
        raise UserError(f"{path}: label {labels.max()} but only {classes} classes; unpack the binary version again")
    return _planar_to_rows(rows[:, variant.label_bytes :]), labels


def _planar_to_rows(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return [N, 3072] channel planes as contiguous [N, 32, 32, 3]."""
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
