"""`fastil convert`: any supported source to .beton files with manifests. A kill at any moment loses nothing.

A split is written to X.beton.partial, in the order of its classes, by this process alone; workers only look at images
and encode those that must be. Every few megabytes the bytes are synced and the journal is updated. The header comes
last, then the whole file is read back for its checksums, and then it gets its name.
"""

import contextlib
import io
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from fastil import files, machine
from fastil.data.formats.beton import Beton
from fastil.data.formats.beton_source import Stored, val_path_of
from fastil.data.formats.detect import open_source
from fastil.data.formats.manifest import Manifest, manifest_path, read_manifest
from fastil.data.formats.pixels import DEFAULT, MOST_PIXELS, Exif, Reading, reading_of
from fastil.data.formats.records import Files, Pixels, is_sequential
from fastil.errors import UserError
from fastil.tools.audit import (
    Audit,
    all_small_lossless,
    amount,
    audit,
    audit_text,
    check_classes,
    shortfall,
    some_of,
    summary,
)
from fastil.tools.choice import subset
from fastil.tools.files import AGAIN, opened, reading_order, spooled
from fastil.tools.images import JPEG_SIDE, SMALL_SIDE, Mode, Storage
from fastil.tools.pool import Pool
from fastil.tools.reporting import Reporter
from fastil.tools.writing import OnCorrupt, Task, Writing

COMMIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Options:
    """The options of `fastil convert`. workers: processes next to this one that decode; 1: none."""

    kind: str | None = None
    val: str | None = None  # a path, or "same"
    classes: str | None = None
    per_class: int | None = None
    storage: Storage = field(default_factory=Storage)
    on_corrupt: OnCorrupt = "fail"
    image_column: str | None = None  # of parquet files
    label_column: str | None = None
    workers: int = field(default_factory=machine.cores)

    def __post_init__(self) -> None:
        if not 1 <= self.storage.quality <= 100:
            raise UserError(f"--quality {self.storage.quality}: must lie between 1 and 100")
        for option, side in (("--max-side", self.storage.max_side), ("--squash", self.storage.squash)):
            if side is not None and side < 1:
                raise UserError(f"{option} {side}: must be at least 1 pixel")
        if self.storage.squash is not None and self.storage.squash > JPEG_SIDE:
            raise UserError(f"--squash {self.storage.squash}: must be at most {JPEG_SIDE:,} pixels")
        if self.storage.max_side is not None and self.storage.squash is not None:
            raise UserError("--max-side and --squash both say how large images become; drop one of the two")

    def parameters(self) -> dict[str, Any]:
        """The options that decide what is written."""
        keys = asdict(self)
        del keys["workers"], keys["kind"], keys["on_corrupt"]  # images left out are in `skipped`
        for key in ("image_column", "label_column"):  # like files older than these options
            if keys[key] is None:
                del keys[key]
        storage = keys["storage"]
        if self.storage.squash is None:
            del storage["squash"]
        reading, usual = storage.pop("reading"), asdict(DEFAULT)
        storage |= {key: value for key, value in reading.items() if value != usual[key]}
        return keys


def options_of(
    *,
    mode: str = "auto",
    max_side: int | None = None,
    squash: int | None = None,
    quality: int = 95,
    check: bool = True,
    exif: str = "upright",
    max_pixels: int = MOST_PIXELS,
    on_corrupt: str = "fail",
    workers: int | None = None,
    **others: Any,
) -> Options:
    """Return options from the command line's arguments."""
    for key, value, allowed in (
        ("mode", mode, get_args(Mode)), ("exif", exif, get_args(Exif)), ("on-corrupt", on_corrupt, get_args(OnCorrupt)),
    ):  # fmt: skip
        if value not in allowed:
            raise UserError(f"--{key} {value}: use one of {', '.join(allowed)}")
    if max_pixels < 1:
        raise UserError(f"--max-pixels {max_pixels}: must be at least 1")
    reading = Reading(cast(Exif, exif), max_pixels)
    storage = Storage(cast(Mode, mode), quality, max_side, squash, check, reading)
    workers = machine.cores() if workers is None else workers
    return Options(storage=storage, on_corrupt=cast(OnCorrupt, on_corrupt), workers=workers, **others)


def convert(
    path: Path, out: Path, options: Options, reporter: Reporter, dry_run: bool = False, commit_bytes: int = COMMIT_BYTES
) -> list[Path]:
    """Write OUT.beton (train) and OUT.val.beton, with manifests. Returns the files, none with dry_run.

    Raises UserError for anything wrong with the source, the options or the disk. What is written stays, and the same
    call continues from there.
    """
    if out.suffix != ".beton" or out.name == ".beton":
        raise UserError(f"{out}: the name of the output must end in .beton")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it, or choose another output")
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(Pool(options.workers))
        pool.start()
        columns = {"image_column": options.image_column, "label_column": options.label_column}
        source = open_source(path, options.kind, val=options.val, verify=options.kind is None, **columns)
        notes = list(source.notes)
        source = subset(source, options.classes, options.per_class)
        splits = {name: r for name, r in (("train", source.train), ("val", source.val)) if r is not None}
        check_classes(source, splits)
        kept = False
        if options.storage.mode == "auto":
            if any(isinstance(records, Stored) and records.beton.mode == "mixed" for records in splits.values()):
                raise UserError(
                    f"{path}: holds JPEGs and pixels; say --mode jpeg, which encodes the pixels, or --mode raw"
                )
            kept = all_small_lossless(splits.values(), options.storage.reading)
            of_pixels = isinstance(next(iter(splits.values())), Pixels | Stored)
            options = replace(options, storage=replace(options.storage, mode="raw" if kept or of_pixels else "jpeg"))
        if "val" not in splits:
            notes.append("no validation images; give --val with their path, or --val same for a smoke test")
        notes += shortfall(source, splits, options.classes is not None or options.per_class is not None)
        targets = {"train": out, "val": val_path_of(out)}
        storage = replace(options.storage, reading=reading_of(source, options.storage.reading))
        task = partial(
            Task, source=source, origin={"kind": source.kind, "name": source.name, "path": os.path.abspath(path)},
            parameters=options.parameters(), storage=storage, on_corrupt=options.on_corrupt, notes=tuple(notes),
            reporter=reporter, commit_bytes=commit_bytes,
        )  # fmt: skip
        jobs = [Job(task(split=split, records=records, target=targets[split])) for split, records in splits.items()]
        waiting = [job for job in jobs if not job.finished() and (dry_run or job.begin(stack))]
        for job in waiting:
            job.look(pool, dry_run)
        free = shutil.disk_usage(out.parent).free
        audits = [job.audit for job in waiting if job.audit is not None]
        notes += [note for job in waiting for note in job.own_notes()]
        if any(found.problems for found in audits) and options.on_corrupt == "fail":
            notes.append("the conversion stops at what is unreadable: repair or remove it, or --on-corrupt skip")
        if kept:
            notes.append(
                f"all images are lossless and no larger than {SMALL_SIDE}x{SMALL_SIDE}: their pixels are stored as "
                "they are, in RGB of 8 bits (alpha and the low byte of 16-bit samples are dropped); --mode jpeg "
                "encodes them"
            )
        needed = sum(max(0, job.projected() - job.there()) for job in waiting)
        if needed > free:
            notes.append(f"{amount(needed)} are needed, {amount(free)} are free: the conversion would stop")
        reporter.say(
            audit_text(source, audits, free, notes, options.storage.made), "audit",
            source=source.name, kind=source.kind, classes=len(source.class_names),
            splits=[summary(a, len(source.class_names)) for a in audits], notes=notes, free_bytes=free,
        )  # fmt: skip
        if dry_run:
            return []
        for job in waiting:
            job.check()
        if needed > free:
            raise UserError(f"{out.parent}: {amount(needed)} are needed, {amount(free)} are free; free some")
        for job in waiting:
            job.write(pool)
    return [job.task.target for job in jobs]


class Job:
    """The conversion of one split, from the look at what exists to the finished file."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.audit: Audit | None = None
        self.file: io.FileIO | None = None

    def finished(self) -> bool:
        """Return whether this very conversion has already written the target. Raises UserError if it is another
        file.
        """
        task = self.task
        if not task.target.exists():
            return False
        manifest = read_manifest(manifest_path(task.target))
        if manifest is None:
            raise UserError(f"{task.target}: exists, without a manifest; remove it or choose another output")
        size = task.target.stat().st_size
        if size != manifest.bytes:
            raise UserError(
                f"{task.target}: {size:,} bytes, its manifest says {manifest.bytes:,}; remove it and convert again"
            )
        different = self.differences(manifest)
        if different:
            raise UserError(
                f"{task.target}: exists, of another conversion (other {', '.join(different)}); remove it or choose "
                "another output"
            )
        if not task.partial.exists():  # otherwise another conversion is at work
            task.journal.unlink(missing_ok=True)
            task.spool.unlink(missing_ok=True)
        task.reporter.say(
            f"{task.target}: converted already (fastil verify looks into it)", "finished", file=str(task.target),
            sha256=manifest.sha256,
        )  # fmt: skip
        return True

    def differences(self, manifest: Manifest) -> list[str]:
        """Return where a finished file differs from the one that this conversion would write, as far as that shows
        without reading the images again.
        """
        task, records = self.task, self.task.records
        # Older manifests have on_corrupt, which decides nothing if no image was left out.
        ours, theirs = (parameters | parameters["storage"] for parameters in (task.parameters, manifest.parameters))
        different = [
            f"--{key.replace('_', '-')}"
            for key in sorted((ours | theirs).keys() - {"storage", "on_corrupt"})
            if ours.get(key) != theirs.get(key)
        ]
        if manifest.skipped and task.on_corrupt == "fail":
            different.append("--on-corrupt")
        if manifest.source != task.origin:
            different.append(f"SOURCE ({manifest.source['path']})")
        if manifest.class_names != task.source.class_names:
            different.append("classes")
        names = Counter(manifest.names + [one.source for one in manifest.skipped])
        if names != Counter(records.name(i) for i in range(len(records))):
            different.append("images")
        elif isinstance(records, Files):
            with Beton(task.target) as file:
                sizes: dict[int, int | None] = dict(enumerate(file.lengths.tolist()))
            sizes |= {one.id: one.size for one in manifest.reencoded}  # None in older manifests
            written = Counter(size for size in sizes.values() if size is not None)
            if written - Counter(records.size.tolist()):
                different.append("sizes of images")
        return different

    def begin(self, stack: contextlib.ExitStack) -> bool:
        """Keep other conversions off the file until the stack is closed. Returns False if one has just finished it."""
        self.file = stack.enter_context(opened(self.task.partial))
        stack.callback(self.task.spool.unlink, missing_ok=True)
        return not self.finished()

    def look(self, pool: Pool, dry_run: bool) -> None:
        """Audit the images of the split. A source that can only be read from front to back is copied to disk first."""
        records = self.task.records
        if is_sequential(records):
            if dry_run:
                records = records.take(reading_order(records))
            else:
                with files.written(self.task.spool, AGAIN):
                    records = spooled(records, self.task.spool, self.task.reporter)
            self.task = replace(self.task, records=records)
        self.audit = audit(self.task.split, records, self.task.storage, pool, self.task.reporter)

    def own_notes(self) -> list[str]:
        """The notes of this split alone. A manifest holds these and the source's only, so it does not show whether
        there was a stop between two splits.
        """
        storage = self.task.storage
        if not (self.audit and self.audit.lossless and storage.mode == "jpeg"):
            return []
        return [
            f"{self.task.split}: {self.audit.lossless:,} lossless images become JPEGs of quality {storage.quality}; "
            "--mode raw keeps their pixels"
        ]

    def projected(self) -> int:
        """The bytes that the file is expected to take."""
        return self.audit.projected if self.audit else 0

    def there(self) -> int:
        """Return the bytes on the disk from an earlier attempt."""
        return self.task.partial.stat().st_blocks * 512 if self.task.partial.exists() else 0

    def check(self) -> None:
        """Raise UserError for what the audit found, before anything is written."""
        assert self.audit is not None
        if self.audit.problems and self.task.on_corrupt == "fail":
            raise UserError(
                "; ".join(some_of(self.audit.problems, self.task.records.where, "unreadable:"))
                + "; repair or remove them, or --on-corrupt skip"
            )

    def write(self, pool: Pool) -> None:
        """Write the file, or continue with it."""
        assert self.audit is not None
        assert self.file is not None
        with files.written(self.task.partial, AGAIN):
            task = replace(self.task, notes=(*self.task.notes, *self.own_notes()))
            Writing(task, self.audit, self.file).run(pool)
