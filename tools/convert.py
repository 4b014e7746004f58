"""`fastil convert`: any supported source to .beton files with manifests, so that a kill at any moment loses nothing.

A split is written to X.beton.partial, in the order of its classes, by this process alone; workers only look at images
and encode those that have to be. After some megabytes the bytes are synced and the journal is told; the header comes
last, then the whole file is read back for its checksums, then it gets its name.
"""

import contextlib
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import features

from fastil.data import beton
from fastil.data.catalog import open_source
from fastil.data.manifest import FORMAT, Changed, Manifest, manifest_path, read_manifest
from fastil.data.records import Records, Source, is_sequential
from fastil.errors import UserError
from fastil.tools.audit import (
    Audit,
    audit,
    check_classes,
    chunks,
    describe,
    prepare_at,
    shortfall,
    some_of,
    summary,
)
from fastil.tools.choice import choose
from fastil.tools.files import full_disk, opened, read_back, reading_order, spooled, sync_folder, write_synced
from fastil.tools.images import Mode, Prepared, Storage
from fastil.tools.journal import Journal, Progress
from fastil.tools.pool import Pool, default_workers
from fastil.tools.reporting import Reporter

PREPARED = 8  # samples in a worker's chunk
COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 5.0
OnCorrupt = Literal["fail", "skip"]


@dataclass(frozen=True)
class Options:
    """What `fastil convert` can be told. workers: processes beside this one that decode; 1: none."""

    kind: str | None = None
    val: str | None = None  # a path, or "same"
    classes: str | None = None
    per_class: int | None = None
    storage: Storage = field(default_factory=Storage)
    on_corrupt: OnCorrupt = "fail"
    workers: int = field(default_factory=default_workers)

    def __post_init__(self) -> None:
        if not 1 <= self.storage.quality <= 100:
            raise UserError(f"--quality {self.storage.quality}: must lie between 1 and 100")
        if self.storage.max_side is not None and self.storage.max_side < 1:
            raise UserError(f"--max-side {self.storage.max_side}: must be at least 1 pixel")
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: must be at least 1")

    def parameters(self) -> dict[str, Any]:
        """Those that decide what is written."""
        keys = asdict(self)
        del keys["workers"], keys["kind"]
        return keys


def options_of(
    *, mode: str, max_side: int | None, quality: int, check: bool, on_corrupt: str, workers: int | None, **others: Any
) -> Options:
    """Options from what the command line was given."""
    for key, value, allowed in (("mode", mode, get_args(Mode)), ("on-corrupt", on_corrupt, get_args(OnCorrupt))):
        if value not in allowed:
            raise UserError(f"--{key} {value}: use one of {', '.join(allowed)}")
    storage = Storage(cast(Mode, mode), quality, max_side, check)
    workers = default_workers() if workers is None else workers
    return Options(storage=storage, on_corrupt=cast(OnCorrupt, on_corrupt), workers=workers, **others)


def convert(
    path: Path, out: Path, options: Options, reporter: Reporter, dry_run: bool = False, commit_bytes: int = COMMIT_BYTES
) -> list[Path]:
    """Write OUT.beton (train) and OUT.val.beton, with manifests. Returns the files; none with dry_run.

    Raises UserError for whatever is wrong with the source, the options or the disk; what is written already stays, and
    the same call goes on from there.
    """
    if out.suffix != ".beton" or out.name == ".beton":
        raise UserError(f"{out}: the name of the output must end in .beton")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it, or choose another output")
    source = open_source(path, options.kind, options.val)
    notes = list(source.notes)
    source = choose(source, options.classes, options.per_class)
    splits = {name: r for name, r in (("train", source.train), ("val", source.val)) if r is not None}
    check_classes(source, splits)
    if options.storage.mode == "auto":
        mode: Mode = "jpeg" if isinstance(next(iter(splits.values())).content(0), bytes) else "raw"
        options = replace(options, storage=replace(options.storage, mode=mode))
    if "val" not in splits:
        notes.append("no validation images; give --val with their path, or --val same for a smoke test")
    notes += shortfall(source, splits, options.classes is not None or options.per_class is not None)
    targets = {"train": out, "val": beton.val_path_of(out)}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(Pool(options.workers))
        jobs = [
            Job(source, str(path), split, records, targets[split], options, notes, reporter, commit_bytes)
            for split, records in splits.items()
        ]
        waiting = [job for job in jobs if not job.finished() and (dry_run or job.begin(stack))]
        for job in waiting:
            job.look(pool, dry_run)
        free = shutil.disk_usage(out.parent).free
        audits = [job.audit for job in waiting if job.audit is not None]
        reporter.say(
            describe(source, audits, free, notes), "audit", source=source.name, kind=source.kind,
            classes=len(source.class_names), splits=[summary(a, len(source.class_names)) for a in audits],
            notes=notes, free_bytes=free,
        )  # fmt: skip
        if dry_run:
            return []
        for job in waiting:
            job.check()
        needed = sum(max(0, job.projected() - job.there()) for job in waiting)
        if needed > free:
            raise UserError(
                f"{out.parent}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free; free some"
            )
        for job in waiting:
            job.write(pool)
    return [job.target for job in jobs]


class Job:
    """The conversion of one split."""

    def __init__(
        self, source: Source, path: str, split: str, records: Records, target: Path, options: Options,
        notes: list[str], reporter: Reporter, commit_bytes: int,
    ) -> None:  # fmt: skip
        self.source, self.split, self.records, self.target = source, split, records, target
        self.options, self.notes, self.reporter, self.commit_bytes = options, notes, reporter, commit_bytes
        self.origin = {"kind": source.kind, "name": source.name, "path": os.path.abspath(path)}
        self.partial = target.with_name(target.name + ".partial")
        self.spool = target.with_name(target.name + ".spool")
        self.journal_path = target.with_name(target.name + ".journal")
        self.audit: Audit | None = None
        self.file: IO[bytes] | None = None

    def identity(self, start: int, page: int) -> dict[str, Any]:
        """What decides the bytes of the file, beside what the source lists. An image that cannot be read stops the
        work or is left out: what is in place is the same."""
        options = self.options.parameters()
        options |= options.pop("storage")
        del options["on_corrupt"]
        return {f"--{key.replace('_', '-')}": value for key, value in options.items()} | {
            "source": self.origin, "split": self.split, "libraries": libraries(), "class list": self.source.class_names,
            "layout": [start, page],
        }  # fmt: skip

    def finished(self) -> bool:
        """Whether the target is there already, by this very conversion; a UserError if it is another file."""
        if not self.target.exists():
            return False
        manifest = read_manifest(manifest_path(self.target))
        same = (
            manifest is not None
            and (manifest.source, manifest.parameters) == (self.origin, self.options.parameters())
            and manifest.class_names == self.source.class_names
            and Counter(manifest.names + [one.source for one in manifest.skipped])
            == Counter(self.records.name(i) for i in range(len(self.records)))
        )
        if not same:
            raise UserError(f"{self.target}: exists, of another conversion; remove it or choose another output")
        if not self.partial.exists():  # else another conversion is at work
            self.journal_path.unlink(missing_ok=True)
            self.spool.unlink(missing_ok=True)
        self.reporter.say(f"{self.target}: converted already", "finished", file=str(self.target))
        return True

    def begin(self, stack: contextlib.ExitStack) -> bool:
        """Keep every other conversion off the file until the stack is closed. False: one has just finished it."""
        stack.enter_context(full_disk(self.partial))
        self.file = stack.enter_context(opened(self.partial))
        stack.callback(self.spool.unlink, missing_ok=True)
        return not self.finished()

    def look(self, pool: Pool, dry_run: bool) -> None:
        if is_sequential(self.records):
            if dry_run:
                self.records = self.records.take(reading_order(self.records))
            else:
                self.records = spooled(self.records, self.spool, self.reporter)
        self.audit = audit(self.split, self.records, self.options.storage, pool, self.reporter)

    def projected(self) -> int:
        return self.audit.projected if self.audit else 0

    def there(self) -> int:
        """Bytes on the disk of an earlier attempt."""
        return self.partial.stat().st_blocks * 512 if self.partial.exists() else 0

    def check(self) -> None:
        """Refuse what the audit found, before anything is written."""
        assert self.audit is not None
        if self.audit.problems and self.options.on_corrupt == "fail":
            raise UserError(
                "; ".join(some_of(self.audit.problems, self.records.where, "unreadable:"))
                + "; repair or remove them, or --on-corrupt skip"
            )

    def write(self, pool: Pool) -> None:
        assert self.audit is not None
        page = beton.page_size_for(self.audit.largest(self.options.storage))
        start = beton.data_start(len(self.records), page)
        progress = Progress(np.zeros(len(self.records), beton.ENTRY), position=start)
        journal = Journal(self.journal_path, self.identity(start, page), self.records)
        file = self.file
        assert file is not None
        if journal.resume(progress, self.partial):
            self.reporter.say(f"{self.partial}: going on after {progress.done:,} images", "resumed", done=progress.done)
        else:
            file.truncate(0)
            journal.begin()
        if progress.skipped and self.options.on_corrupt == "fail":
            i, problem = progress.skipped[0]
            raise UserError(
                f"{self.records.where(i)}: was left out ({problem}) by the conversion that this one would go on with; "
                f"give --on-corrupt skip, or remove {self.partial}"
            )
        file.truncate(progress.position)
        file.seek(progress.position)
        self.copy(file, progress, journal, page, pool)
        self.finish(file, progress, page)
        self.journal_path.unlink(missing_ok=True)

    def copy(self, file: IO[bytes], progress: Progress, journal: Journal, page: int, pool: Pool) -> None:
        """Put every sample in place."""
        records, labels = self.records, self.records.labels
        self.reporter.begin(f"convert {self.split}", len(records), progress.done)
        since, last = 0, time.monotonic()
        for i, prepared in self.prepared(progress.done, pool):
            if prepared.problem is not None:
                if self.options.on_corrupt == "fail":
                    self.commit(file, progress, journal)
                    raise UserError(
                        f"{records.where(i)}: {prepared.problem}; repair or remove it, or --on-corrupt skip. What is "
                        "written stays: the same command goes on"
                    )
                progress.skipped.append((i, prepared.problem))
                progress.done = i + 1
                self.reporter.advance(1)
                continue
            content = prepared.content
            if content is None:
                original = records.content(i)
                content = original if isinstance(original, bytes) else original.tobytes()
            else:
                progress.changed.append((i, self.reason(i)))
            if len(content) > page:
                raise UserError(f"{records.where(i)}: {len(content):,} bytes, more than a page; use --max-side")
            at = beton.place(progress.position, len(content), page)
            if at != progress.position:
                file.seek(at)
            file.write(content)
            progress.entries[progress.placed] = (
                at, len(content), labels[i], zlib.crc32(content), prepared.width, prepared.height,
            )  # fmt: skip
            progress.placed, progress.position, progress.done = progress.placed + 1, at + len(content), i + 1
            since += len(content)
            self.reporter.advance(1, len(content))
            if since >= self.commit_bytes or time.monotonic() - last > COMMIT_SECONDS:
                self.commit(file, progress, journal)
                since, last = 0, time.monotonic()
        self.commit(file, progress, journal)
        self.reporter.end()

    def prepared(self, first: int, pool: Pool) -> Iterator[tuple[int, Prepared]]:
        """From a sample on, each as it is to be stored, in order. Workers see those that have to be decoded."""
        assert self.audit is not None
        found, storage = self.audit, self.options.storage
        untouched = found.kept & (not storage.check)
        ids = np.arange(first, len(found.kept))
        todo = ids[~untouched[ids]]
        work = partial(prepare_at, storage=storage)
        results = (
            one for batch in pool.map(work, chunks(self.records, todo, PREPARED), self.records.where) for one in batch
        )
        for i in ids:
            if untouched[i]:
                yield int(i), Prepared(None, int(found.width[i]), int(found.height[i]), None)
            else:
                yield int(i), next(results)

    def reason(self, i: int) -> str:
        """Why the bytes of a sample are not its source's."""
        assert self.audit is not None
        return self.audit.reasons.get(i, f"--mode {self.options.storage.mode}")

    def commit(self, file: IO[bytes], progress: Progress, journal: Journal) -> None:
        file.flush()
        os.fsync(file.fileno())
        journal.commit(progress)

    def finish(self, file: IO[bytes], progress: Progress, page: int) -> None:
        """Tables, header, checksums, manifest, name: in that order."""
        entries = progress.entries[: progress.placed]
        self.refuse_empty_classes(entries)
        mode = beton.RAW if self.options.storage.mode == "raw" else beton.JPEG
        beton.write_tables(file, entries, mode, page)
        beton.write_header(file, entries, page)
        file.flush()
        with ThreadPoolExecutor(1) as thread:
            synced = thread.submit(os.fsync, file.fileno())  # while the file is read back
            digest = read_back(self.partial, entries, self.reporter)
        synced.result()
        manifest = self.manifest(progress, digest, self.partial.stat().st_size)
        write_synced(manifest_path(self.target), manifest.dump())
        os.replace(self.partial, self.target)
        sync_folder(self.target.parent)
        self.reporter.say(
            f"{self.target}: {len(entries):,} images, {manifest.bytes / 1e6:,.1f} MB, {len(manifest.reencoded):,} "
            f"encoded anew, {len(manifest.skipped):,} left out, sha256 {digest[:16]}...",
            "written", file=str(self.target), images=len(entries), bytes=manifest.bytes, sha256=digest,
            reencoded=len(manifest.reencoded), skipped=len(manifest.skipped),
        )  # fmt: skip

    def refuse_empty_classes(self, entries: NDArray[np.void]) -> None:
        counts = np.bincount(entries["label"], minlength=len(self.source.class_names))
        if counts.min() == 0:
            missing = self.source.class_names[int(counts.argmin())]
            raise UserError(
                f"{self.source.name}: every image of class {missing} in {self.split} was left out; leave the class out "
                f"as well (--classes), and remove {self.partial}"
            )

    def manifest(self, progress: Progress, digest: str, size: int) -> Manifest:
        left_out = {i for i, _ in progress.skipped}
        ids = [i for i in range(len(self.records)) if i not in left_out]
        row = {i: number for number, i in enumerate(ids)}
        entries = progress.entries[: progress.placed]
        counts = np.bincount(entries["label"], minlength=len(self.source.class_names))
        return Manifest(
            format=FORMAT,
            tool=f"fastil {version('fastil')}",
            beton_version=beton.VERSION,
            split=self.split,
            source=self.origin,
            parameters=self.options.parameters(),
            libraries=libraries(),
            class_names=self.source.class_names,
            titles=self.source.titles,
            counts=counts.tolist(),
            images=len(entries),
            bytes=size,
            sha256=digest,
            crc32=entries["crc32"].tolist(),
            names=[self.records.name(i) for i in ids],
            reencoded=[Changed(row[i], self.records.name(i), reason) for i, reason in progress.changed],
            skipped=[Changed(-1, self.records.name(i), reason) for i, reason in progress.skipped],
            notes=self.notes,
        )


def libraries() -> dict[str, str]:
    """What decodes and encodes: other versions may write other bytes."""
    return {"pillow": version("pillow"), "jpeg": str(features.version("libjpeg_turbo") or features.version("jpg"))}
