"""`fastil verify`: whether a .beton matches its manifest byte by byte, and every image in it decodes."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from fastil.data.formats.beton import HEADER, RAW, ROW, TABLE, VERSION, Beton
from fastil.data.formats.manifest import manifest_path, read_manifest
from fastil.data.formats.pixels import check_decodes, open_image
from fastil.data.formats.records import Extent
from fastil.errors import UserError
from fastil.protocol import Ids
from fastil.tools.pool import Pool
from fastil.tools.reporting import Reporter

READ = 4 << 20
DECODED = 16  # samples per worker chunk
GAPS = np.setdiff1d(  # bytes of a row that belong to no field
    np.arange(ROW.itemsize), [at + i for kind, at, *_ in (ROW.fields or {}).values() for i in range(kind.itemsize)]
)


def verify(path: Path, sample: int | None, workers: int, reporter: Reporter) -> list[str]:
    """Return what is wrong, a line each; empty if nothing is. sample: look into this many samples only, evenly spread,
    and leave out the checksum of the file. Raises UserError if there is no file.
    """
    if sample is not None and sample < 1:
        raise UserError(f"--sample {sample}: must be at least 1")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a .beton file")
    with Pool(workers) as pool:
        try:
            with Beton(path) as beton:
                return _verify(beton, sample, pool, reporter)
        except UserError as error:
            lost = first_lost(path)
            return [f"{error}{lost}"]


def _verify(beton: Beton, sample: int | None, pool: Pool, reporter: Reporter) -> list[str]:
    problems = structure(beton)
    n = len(beton)
    chosen = np.arange(n) if sample is None else np.unique(np.linspace(0, n - 1, min(sample, n)).astype(np.int64))
    if beton.manifest is None:
        reporter.say(f"{beton.path}: no manifest next to it, so there are no checksums to compare", "no_manifest")
    else:
        problems += against_manifest(beton)
    with ThreadPoolExecutor(1) as thread:
        digest = thread.submit(sha256, beton) if beton.manifest is not None and sample is None else None
        problems += damaged(beton, chosen, pool, reporter)
    if digest is not None and beton.manifest is not None and digest.result() != beton.manifest.sha256 and not problems:
        problems.append("its header, a table or the padding between samples has changed; no sample has")
    if sample is None and not problems:
        doubles = n - len(np.unique(np.stack([checksums(beton), beton.lengths], 1), axis=0))
        if doubles:
            reporter.say(f"{beton.path}: {doubles:,} images are copies of others", "duplicates", images=doubles)
    return problems


def called(beton: Beton, i: int) -> str:
    """Return a sample's name for people."""
    known = beton.manifest is not None and i < len(beton.manifest.names)
    label = int(beton.labels[i])
    in_class = f" of class {beton.class_names[label]}" if label < len(beton.class_names) else ""
    return f"sample {i}{f' ({beton.name(i)})' if known else ''}{in_class}"


def structure(beton: Beton) -> list[str]:
    """Return what is wrong with the structure, among what opening the file does not check."""
    problems = []
    rows = np.arange(len(beton))
    if beton.manifest is not None and beton.ids is not None:
        problems += [f"{called(beton, int(i))}: its row has the id {beton.ids[i]}" for i in rows[beton.ids != rows]]
    if beton.manifest is not None and beton.rows_end == TABLE + len(beton) * ROW.itemsize:
        raw = np.frombuffer(beton.map, np.uint8, len(beton) * ROW.itemsize, TABLE).reshape(len(beton), -1)
        filled = rows[raw[:, GAPS].any(axis=1)]
        problems += [f"{called(beton, int(i))}: its row has something between its fields" for i in filled]
    wrong = rows[beton.place_ids != rows.astype(np.uint64)]
    problems += [f"{called(beton, int(i))}: the table of places gives it to {beton.place_ids[i]}" for i in wrong]
    page = beton.starts // beton.page_size
    straddling = rows[(beton.starts + np.maximum(beton.lengths, 1) - 1) // beton.page_size != page]
    problems += [f"{called(beton, int(i))}: straddles a page" for i in straddling]
    return problems


def against_manifest(beton: Beton) -> list[str]:
    """Return where size and classes differ from the manifest."""
    manifest = beton.manifest
    assert manifest is not None
    problems = []
    if manifest.bytes != beton.bytes:
        problems.append(f"{beton.bytes:,} bytes, the manifest says {manifest.bytes:,}")
    expected = np.repeat(np.arange(len(manifest.counts)), manifest.counts)
    wrong = np.flatnonzero(beton.labels != expected)
    return problems + [
        f"{called(beton, int(i))}: has the label {beton.labels[i]} instead of {expected[i]}" for i in wrong
    ]


def sha256(beton: Beton) -> str:
    """Return the SHA-256 of the whole file, hex."""
    digest = hashlib.sha256()
    for start in range(0, beton.bytes, READ):
        digest.update(memoryview(beton.map)[start : start + READ])
    return digest.hexdigest()


def checksums(beton: Beton) -> Ids:
    """Return the crc32 of each sample, int64 [n]."""
    if beton.manifest is not None:
        return np.array(beton.manifest.crc32, dtype=np.int64)
    return np.array([crc32(beton.view(i)) for i in range(len(beton))], dtype=np.int64)


def damaged(beton: Beton, chosen: Ids, pool: Pool, reporter: Reporter) -> list[str]:
    """Return the samples whose bytes are not those that were written, or that are no image of the size in their row."""
    reporter.begin("samples", len(chosen))
    problems = []
    known = beton.manifest.crc32 if beton.manifest is not None else None

    def chunks() -> Iterator[list[tuple[int, Sample]]]:
        for start in range(0, len(chosen), DECODED):
            yield [
                (
                    i,
                    Sample(
                        Extent(str(beton.path), int(beton.starts[i]), int(beton.lengths[i])), int(beton.sizes[i, 0]),
                        int(beton.sizes[i, 1]), bool(beton.modes[i] == RAW), None if known is None else known[i],
                    ),
                )
                for i in chosen[start : start + DECODED].tolist()
            ]  # fmt: skip

    at = 0
    for results in pool.map(look, chunks(), partial(called, beton)):
        for found in results:
            problems += [f"{called(beton, int(chosen[at]))}: {problem}" for problem in found]
            at += 1
        some = chosen[at - len(results) : at]
        reporter.advance(len(results), int(beton.lengths[some].sum()))
    reporter.end()
    return problems


class Sample(NamedTuple):
    """What a sample must be. expected: its crc32, if known."""

    extent: Extent
    height: int
    width: int
    raw: bool
    expected: int | None


def look(sample: Sample) -> list[str]:
    """Return what is wrong with a sample, if anything."""
    try:
        content = sample.extent.read()
    except UserError as error:
        return [str(error)]
    problems = []
    if sample.expected is not None and crc32(content) != sample.expected:
        problems.append("its bytes are not those that were written")
    try:
        if not sample.raw:
            image = open_image(content)
            if image.size != (sample.width, sample.height):
                size = f"{image.width}x{image.height}"
                problems.append(f"has {size} pixels, its row says {sample.width}x{sample.height}")
            check_decodes(content)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged bytes
        problems.append(f"does not decode ({' '.join(str(error).split())})")
    return problems


def first_lost(path: Path) -> str:
    """Return which samples of a file that was cut short and does not open are lost, from its front and its manifest."""
    try:
        header = np.fromfile(path, HEADER, 1)[0]
        size, n = path.stat().st_size, int(header["num_samples"])
        manifest = read_manifest(manifest_path(path))
        if (
            header["version"] != VERSION
            or header["alloc_table_ptr"] <= size
            or manifest is None
            or manifest.images != n
        ):
            return ""
        rows = np.fromfile(path, ROW, n, offset=TABLE)
        starts = rows["image"]["data_ptr"].astype(np.int64)
        last = int(np.searchsorted(starts, size)) - 1  # it begins before the end
        if last >= 0 and is_whole(path, rows[last], manifest.crc32[last], size):
            last += 1
    except (OSError, ValueError, LookupError):
        return ""
    return "" if last == n else f"; samples from {max(last, 0)} on are not whole or gone"


def is_whole(path: Path, row: np.void, expected: int, size: int) -> bool:
    """Return whether the last sample is complete in a file that ends within its samples or the padding after them."""
    image = row["image"]
    start = int(image["data_ptr"])
    if image["mode"] == RAW:
        return start + int(image["width"]) * int(image["height"]) * 3 <= size
    content = Extent(str(path), start, size - start).read()
    found = crc32(content.rstrip(b"\0"))
    for _ in range(len(content) - len(content.rstrip(b"\0"))):  # some zeros may be its own
        if found == expected:
            return True
        found = crc32(b"\0", found)
    return found == expected
