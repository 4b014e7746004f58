"""An audit of a source before anything is written: counts, formats, sizes, what must be encoded, and what it costs."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil.data.formats.beton import ENTRY, PLACE, data_start, page_size_for, place
from fastil.data.formats.class_names import some
from fastil.data.formats.pixels import Reading, content_of
from fastil.data.formats.records import Extent, Item, Records, Source, Unreadable, is_sequential, item_of
from fastil.errors import UserError
from fastil.text import duration
from fastil.tools.files import reading_order
from fastil.tools.images import LOSSLESS, SMALL_FILE, Head, Prepared, Storage, look, prepare, small_lossless
from fastil.tools.pool import Pool
from fastil.tools.reporting import Reporter

# Training and validation images of well-known sets, as published.
EXPECTED = {
    "ilsvrc": (1_281_167, 50_000), "tiny-imagenet": (100_000, 10_000), "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}  # fmt: skip
LOOKED_AT = 64  # samples per worker chunk
TRIED = 24  # samples to prepare for an estimate of time and size
NAMED = 5  # problems to show; the rest is counted


@dataclass
class Audit:
    """The findings in one split. width, height: uint16 [n], as stored. kept: bool [n], whether the source's bytes are
    stored. problems, reasons: by sample.
    """

    split: str
    records: Records
    width: NDArray[np.uint16]
    height: NDArray[np.uint16]
    kept: NDArray[np.bool_]
    sizes: NDArray[np.int64]  # bytes in the source
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    projected: int = 0  # bytes of the .beton
    seconds: float = 0.0  # of writing it, estimated

    @property
    def lossless(self) -> int:
        """The number of images in a lossless format."""
        return sum(self.formats[kind] for kind in (*LOSSLESS, "TIFF"))

    def page(self, storage: Storage) -> int:
        """The page size of the file, from bounds on the bytes of the samples as they will be stored."""
        bounds = self.width.astype(np.int64) * self.height * 3
        if storage.mode != "raw":  # JPEG at 4:2:0 does not exceed the pixels, except for its tables
            bounds = np.where(self.kept, self.sizes, bounds + (1 << 16))
        return page_size_for(int(bounds.max(initial=0)), int(bounds.sum()))


def audit(split: str, records: Records, storage: Storage, pool: Pool, reporter: Reporter) -> Audit:
    """Read every header, and prepare a few samples to estimate the rest."""
    n = len(records)
    found = Audit(
        split, records, np.zeros(n, np.uint16), np.zeros(n, np.uint16), np.zeros(n, np.bool_), np.zeros(n, np.int64)
    )
    reporter.begin(f"audit {split}", n)
    work = partial(look, storage=storage)
    number = 0
    for heads in pool.map(work, chunks(records, np.arange(n), LOOKED_AT), records.where):
        for head in heads:
            note(found, number, head, storage)
            number += 1
        reporter.advance(len(heads))
    reporter.end()
    estimate(found, storage, pool)
    return found


def all_small_lossless(splits: Iterable[Records], how: Reading) -> bool:
    """Return whether every image that can be read is small and lossless. Stops at the first that is not."""
    found = False
    for records in splits:
        for i in reading_order(records) if is_sequential(records) else range(len(records)):
            item = item_of(records, int(i))
            if isinstance(item, Extent) and item.size > SMALL_FILE:
                return False
            try:
                content = content_of(item, how)
            except Unreadable:  # the audit reports it
                continue
            small = small_lossless(content, how) if isinstance(content, bytes) and content else False
            if small is False:
                return False
            found = found or small is True
    return found


def note(found: Audit, number: int, head: Head, storage: Storage) -> None:
    """Add what the header of image `number` says to the findings."""
    found.formats[head.format] += 1
    found.sizes[number] = head.size
    if head.problem is not None:
        found.problems[number] = head.problem
        return
    found.modes[head.mode] += 1
    found.width[number], found.height[number] = head.width, head.height
    found.kept[number] = head.kept(storage)
    if head.reasons:
        found.reasons[number] = ", ".join(head.reasons)


def estimate(found: Audit, storage: Storage, pool: Pool) -> None:
    """Time a few of the samples that are decoded, and measure the size of those that are encoded."""
    pixels = found.width.astype(np.int64) * found.height * 3
    good = np.setdiff1d(np.arange(len(pixels)), list(found.problems))
    again = good[~found.kept[good]]
    per_pixel = 1.0
    if storage.mode != "raw" and len(again):
        prepared, _ = timed(found, spread(again), storage, pool)
        written = [(len(p.content), p.width * p.height * 3) for p in prepared if p.content is not None]
        per_pixel = sum(a for a, _ in written) / max(1, sum(b for _, b in written))
    decoded = good if storage.check or storage.mode != "jpeg" else again
    if len(decoded):
        some = spread(decoded)
        found.seconds = timed(found, some, storage, pool)[1] / len(some) * len(decoded)
    page = found.page(storage)
    end = planned(found, storage, page, data_start(len(pixels), page), per_pixel)[1]
    found.projected = -(-end // page) * page + len(pixels) * PLACE.itemsize


def planned(
    found: Audit, storage: Storage, page: int, start: int, per_pixel: float | None = None
) -> tuple[NDArray[np.void] | None, int]:
    """Return ENTRY [n], without checksums, which says where everything will be, and the end of it.

    None, 0 if that depends on the size of images after encoding, unless per_pixel estimates it, or if some cannot be
    read.
    """
    pixels = found.width.astype(np.int64) * found.height * 3
    if storage.mode == "raw":
        sizes = pixels
    elif found.kept.all() or per_pixel is not None:
        sizes = np.where(found.kept, found.sizes, (pixels * (per_pixel or 0)).astype(np.int64))
    else:
        return None, 0
    if found.problems and per_pixel is None:
        return None, 0
    entries = np.zeros(len(sizes), ENTRY)
    entries["size"], entries["label"] = sizes, found.records.labels
    entries["width"], entries["height"] = found.width, found.height
    starts, position = entries["ptr"], start
    for i, size in enumerate(sizes.tolist()):
        starts[i] = at = place(position, size, page)
        position = at + size
    return entries, position


def timed(found: Audit, ids: NDArray[np.int64], storage: Storage, pool: Pool) -> tuple[list[Prepared], float]:
    """Return those samples as they will be stored, and the seconds that took."""
    began = time.perf_counter()
    work = partial(prepare, storage=storage)
    batches = pool.map(work, chunks(found.records, ids, -(-len(ids) // pool.workers)), found.records.where)
    prepared = [one for batch in batches for one in batch]
    return prepared, time.perf_counter() - began


def spread(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a few of them, evenly spread."""
    return ids[np.linspace(0, len(ids) - 1, min(TRIED, len(ids))).astype(np.int64)]


def chunks(records: Records, ids: NDArray[np.int64], size: int) -> Iterator[list[tuple[int, Item]]]:
    """Yield the samples in chunks of this size."""
    for start in range(0, len(ids), size):
        yield [(int(i), item_of(records, int(i))) for i in ids[start : start + size]]


def counts_of(records: Records, classes: int) -> NDArray[np.int64]:
    """Return the images of each class, int64 [classes]."""
    return np.bincount(records.labels, minlength=classes)


def shortfall(source: Source, splits: dict[str, Records], reduced: bool) -> list[str]:
    """Return how the counts differ from those of the complete set, if that is known."""
    if reduced or source.kind not in EXPECTED:
        return []
    pairs = zip(("train", "val"), EXPECTED[source.kind], strict=True)
    return [
        f"{split} has {len(splits[split]):,} images, the complete set {expected:,}"
        for split, expected in pairs
        if split in splits and len(splits[split]) != expected
    ]


def check_classes(source: Source, splits: dict[str, Records]) -> None:
    """Raise UserError for a class without images."""
    for split, records in splits.items():
        counts = counts_of(records, len(source.class_names))
        missing = [source.class_names[label] for label in np.flatnonzero(counts == 0)]
        if missing:
            raise UserError(
                f"{source.name}: {split} has no image of class {some(missing)}; add some or leave it out (--classes)"
            )


def audit_text(source: Source, audits: Sequence[Audit], free: int, notes: Sequence[str], made: str) -> str:
    """Return the audit for people. made: what happens to images whose bytes are not kept."""
    lines = [f"{source.kind}: {source.name}, {len(source.class_names):,} classes"]
    for found in audits:
        n = len(found.records)
        counts = counts_of(found.records, len(source.class_names))
        good = np.setdiff1d(np.arange(n), list(found.problems))
        lines.append(f"{found.split}: {n:,} images, {counts.min():,} to {counts.max():,} per class")
        lines.append(f"  formats   {listed(found.formats)}; modes {listed(found.modes)}")
        if len(good):
            w, h = found.width[good], found.height[good]
            lines.append(
                f"  as stored {w.min()} to {w.max()} wide (median {np.median(w):.0f}), {h.min()} to {h.max()} high "
                f"(median {np.median(h):.0f})"
            )
        lines.append(
            f"  bytes     {found.kept.sum():,} kept as they are, {n - found.kept.sum() - len(found.problems):,} {made}"
        )
        lines += [f"  reason    {reason}: {count:,}" for reason, count in Counter(found.reasons.values()).most_common()]
        lines += some_of(found.problems, found.records.where, "  unreadable")
        lines.append(f"  output    about {amount(found.projected)} in about {duration(found.seconds)}")
    lines += [f"note: {text}" for text in notes]
    lines.append(f"free disk space: {amount(free)}")
    return "\n".join(lines)


def amount(size: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / 1e9:,.1f} GB" if size >= 10**10 else f"{size / 1e6:,.1f} MB"


def some_of(problems: dict[int, str], where: Callable[[int], str], label: str) -> list[str]:
    """Return the first few of them, a line each."""
    lines = [f"{label} {where(i)} ({what})" for i, what in list(problems.items())[:NAMED]]
    more = len(problems) - len(lines)
    return [*lines, f"{label} {more:,} more"] if more else lines


def summary(found: Audit, classes: int) -> dict[str, Any]:
    """Return the audit of a split for programs."""
    return {
        "split": found.split,
        "images": len(found.records),
        "counts": counts_of(found.records, classes).tolist(),
        "formats": dict(found.formats),
        "modes": dict(found.modes),
        "kept": int(found.kept.sum()),
        "reasons": dict(Counter(found.reasons.values())),
        "problems": [{"source": found.records.where(i), "reason": what} for i, what in found.problems.items()],
        "projected_bytes": found.projected,
        "estimated_seconds": round(found.seconds, 1),
    }


def listed(counter: "Counter[str]") -> str:
    """Return counts as text, the largest first: "JPEG 50,000, PNG 3"."""
    return ", ".join(f"{key} {count:,}" for key, count in counter.most_common())
