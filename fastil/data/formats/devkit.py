"""The devkit of ILSVRC2012, which names ImageNet's classes and says which one each validation image belongs to.

It numbers the classes in an order of its own (ILSVRC2012_ID 1 to 1,000, then inner nodes of WordNet), and the ground
truth of the validation images uses these numbers.
"""

import gzip
import io
import tarfile
import zlib
from typing import Any, NamedTuple

from fastil.data.formats.matfile import read_variables
from fastil.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
MOST_BYTES = 1 << 26  # unpacked; it has about 5 MB


class Devkit(NamedTuple):
    """The content of the devkit. wnids: by devkit id, classes only. titles, images: by wnid. truth: the devkit id of
    each validation image.
    """

    wnids: dict[int, str]
    titles: dict[str, str]
    images: dict[str, int]
    truth: list[int]


def read_devkit(path: str, raw: bytes) -> Devkit:
    """Return the devkit in an archive. path: its path, for messages. Raises UserError for a wrong or damaged one."""
    try:
        if raw.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(raw)) as file:
                raw = file.read(MOST_BYTES + 1)  # to the end, where the checksum is
        if len(raw) > MOST_BYTES:
            raise UserError(f"{path}: holds more than {MOST_BYTES >> 20} MiB, and no devkit does")
        parts: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
            for member in tar:
                part = next((part for part in (META, TRUTH) if member.name.endswith(f"/{part}")), None)
                opened = tar.extractfile(member) if part and member.isfile() else None
                if part and opened:
                    parts[part] = opened.read(MOST_BYTES)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({line}); fetch it again") from None
    for part in (META, TRUTH):
        if part not in parts:
            raise UserError(f"{path}: no {part} in it; fetch it again")
    wnids, titles, images = _parse_meta(parts[META], f"{path}: {META}")
    numbers = parts[TRUTH].split()
    if not numbers or not all(number.isdigit() and len(number) < 10 for number in numbers):
        raise UserError(f"{path}: {TRUTH} is not a list of numbers; fetch it again")
    return Devkit(wnids, titles, images, [int(number) for number in numbers])


def _parse_meta(content: bytes, where: str) -> tuple[dict[int, str], dict[str, str], dict[str, int]]:
    """Return wnids by devkit id, and titles and counts of training images by wnid. Only leaves are classes; the others
    are inner nodes.
    """
    try:
        found = [
            (_whole(row["ILSVRC2012_ID"]), row["WNID"].strip(), row["words"].strip(), _whole(row["num_train_images"]))
            for row in read_variables(content)["synsets"]
            if _whole(row["num_children"]) == 0
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where} cannot be read ({error or type(error).__name__}); fetch it again") from None
    wnids = {devkit_id: wnid for devkit_id, wnid, _, _ in found}
    titles = {wnid: words for _, wnid, words, _ in found}
    if not found or len(wnids) != len(found) or len(titles) != len(found):
        raise UserError(f"{where} names no class, or one twice; fetch it again")
    return wnids, titles, {wnid: count for _, wnid, _, count in found}


def _whole(array: Any) -> int:
    """Return the one number of an array."""
    if len(array) != 1:
        raise ValueError(f"{len(array)} numbers where one should be")
    return int(array[0])
