"""The manifest next to a .beton file: its source, its classes, and checksums of the file and of each sample."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic

from fastil.data.formats.identity import Identity, of_hashes
from fastil.data.formats.records import whole_file
from fastil.errors import UserError
from fastil.protocol import Ids

FORMAT = 1
TOGETHER = 10_000  # entries of a list per piece of text
RESIZED = ("larger than --max-side", "of another size than --squash")  # in the reasons of what was
CHECKED = pydantic.ConfigDict(strict=True, revalidate_instances="always")


@dataclass(frozen=True)
class Changed:
    """A sample whose bytes are not those of its source. id: its row; -1: it was left out. crc32, size: of the source's
    bytes; None if it was left out, and in manifests of older versions.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = CHECKED
    id: int
    source: str
    reason: str
    crc32: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The manifest. class_names: by label, the data set's own ids (wnids for ImageNet); titles: the usual names.
    counts: images per class. names: each sample's name in the source.

    `fastil convert` writes it; two conversions of the same source by the same versions write the same one.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = CHECKED
    format: int
    tool: str  # name and version
    beton_version: int
    split: str
    source: dict[str, str]  # kind, name, path
    parameters: dict[str, Any]
    libraries: dict[str, str]  # what decoded and encoded
    class_names: list[str]
    titles: list[str] | None
    counts: list[int]
    images: int
    bytes: int
    sha256: str  # of the .beton file
    crc32: list[int]
    names: list[str]
    reencoded: list[Changed] = field(default_factory=list)
    skipped: list[Changed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def dump(self) -> str:
        """Return JSON with a line per entry of a list."""
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        """Yield the text of `dump` piece by piece, because it may be long."""
        for number, (key, value) in enumerate(vars(self).items()):
            yield f'{"," if number else "{"}\n"{key}": '
            if not isinstance(value, list):
                yield json.dumps(value)
                continue
            yield "["
            for start in range(0, len(value), TOGETHER):
                text = json.dumps(value[start : start + TOGETHER], default=vars, separators=(",\n", ": "))
                yield f"{',' if start else ''}\n{text[1:-1]}"
            yield "]"
        yield "\n}\n"


def manifest_path(beton: Path) -> Path:
    """Return the path of x.beton's manifest, x.manifest.json."""
    return beton.with_name(beton.name.removesuffix(".beton") + ".manifest.json")


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest, None if there is none. Raises UserError if it is damaged or of a later format."""
    if not path.exists():
        return None
    try:
        content = json.loads(whole_file(path).read())
        if content["format"] != FORMAT:
            raise UserError(f"{path}: format {content['format']!r}, this fastil knows {FORMAT}; install a newer one")
        for key in ("reencoded", "skipped"):
            content[key] = [Changed(**one) for one in content.get(key, ())]
        os.fsencode("".join(content["names"]))  # they were file names, so they can be encoded as such
        manifest = pydantic.TypeAdapter(Manifest).validate_python(Manifest(**content))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged; remove it and convert again, or fetch another copy") from None
    same = manifest.images == len(manifest.crc32) == len(manifest.names) == sum(manifest.counts)
    classes = {len(part) for part in (manifest.class_names, manifest.counts, manifest.titles) if part is not None}
    if len(set(manifest.class_names)) < len(manifest.class_names):
        raise UserError(f"{path}: damaged, it names a class twice; convert again, or fetch another copy")
    same = same and all(0 <= one.id < manifest.images for one in manifest.reencoded)
    if not same or len(classes) != 1 or min(manifest.counts, default=-1) < 0 or "name" not in manifest.source:
        raise UserError(f"{path}: damaged, its counts differ; remove it and convert again, or fetch another copy")
    return manifest


def source_files(manifest: Manifest, lengths: Ids) -> tuple[Ids, Ids] | None:
    """Return crc32 and size of each sample's image file in the source, int64 [n]; for a file of pixels, those of the
    pixels. None if an older manifest does not say what was encoded.

    lengths: int64 [n], bytes of the samples. What libjpeg makes of an image that could not be kept depends on its
    version and on --quality, so it does not count.
    """
    checksums, sizes = np.array(manifest.crc32, dtype=np.int64), lengths.astype(np.int64)
    if manifest.parameters.get("storage", {}).get("mode") == "jpeg":
        for one in manifest.reencoded:
            if one.crc32 is None or one.size is None:
                return None
            checksums[one.id], sizes[one.id] = one.crc32, one.size
    return checksums, sizes


def identity_of(manifest: Manifest, labels: Ids, lengths: Ids) -> Identity | None:
    """Return the identity of a streamed file from its manifest; no image is read. labels, lengths: int64 [n], of the
    samples and of their bytes. None if `source_files` does not know.
    """
    files = source_files(manifest, lengths)
    if files is None:
        return None
    hashes = np.stack(files, axis=1).astype(">u8")
    resized = any(reason in one.reason for one in manifest.reencoded for reason in RESIZED)
    reencoded = manifest.parameters.get("storage", {}).get("mode") == "reencode"
    kind = "changed" if resized or reencoded or manifest.skipped else "stored"
    return of_hashes(kind, (), hashes, labels, kind)
