"""Writing one split, in this order: samples in place one after the other, tables, header, checksums, manifest, name.

One thread copies. Other threads follow: they sync what it has written, tell the journal and read it back.
"""

import io
import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray
from PIL import features

from fastil import files
from fastil.data.formats import beton
from fastil.data.formats.class_names import some
from fastil.data.formats.manifest import FORMAT, Changed, Manifest, manifest_path
from fastil.data.formats.pixels import content_of
from fastil.data.formats.records import Extent, Item, Records, Source, Unreadable, item_of
from fastil.errors import UserError
from fastil.tools.audit import Audit, chunks, planned
from fastil.tools.files import AGAIN, Pages, ReadBack
from fastil.tools.images import Prepared, Storage, prepare
from fastil.tools.journal import Candidate, Journal, Progress
from fastil.tools.pool import Pool
from fastil.tools.reporting import Reporter
from fastil.version import __version__

PREPARED = 32  # samples per worker chunk
COMMIT_SECONDS = 5.0
OnCorrupt = Literal["fail", "skip"]


@dataclass(frozen=True)
class Task:
    """What to write where. origin, parameters: as in the manifest."""

    source: Source
    split: str
    records: Records
    target: Path
    origin: dict[str, str]
    parameters: dict[str, Any]
    storage: Storage
    on_corrupt: OnCorrupt
    notes: tuple[str, ...]
    reporter: Reporter
    commit_bytes: int

    @property
    def partial(self) -> Path:
        """The path of the file while it is being written."""
        return self.target.with_name(self.target.name + ".partial")

    @property
    def journal(self) -> Path:
        """The path of the journal of what has been written."""
        return self.target.with_name(self.target.name + ".journal")

    @property
    def spool(self) -> Path:
        """The path of the copy of a source that can only be read from front to back."""
        return self.target.with_name(self.target.name + ".spool")

    def identity(self, start: int, page: int) -> dict[str, Any]:
        """The settings that decide the bytes of the file, together with what the source lists. Whether an unreadable
        image stops the work or is left out does not count: what is in place is the same.
        """
        options = dict(self.parameters)
        options |= options.pop("storage")
        return {f"--{key.replace('_', '-')}": value for key, value in options.items()} | {
            "source": self.origin, "split": self.split, "libraries": libraries(), "class list": self.source.class_names,
            "layout": [start, page],
        }  # fmt: skip


class Writing:
    """Writes the file of a task, which is open and locked."""

    def __init__(self, task: Task, found: Audit, file: io.FileIO) -> None:
        self.task, self.found, self.file = task, found, file
        self.page = found.page(task.storage)
        self.start = beton.data_start(len(task.records), self.page)
        self.mode = beton.RAW if task.storage.mode == "raw" else beton.JPEG
        self.progress = Progress(np.zeros(len(task.records), beton.ENTRY), position=self.start)
        self.journal = Journal(task.journal, task.identity(self.start, self.page), task.records)

    def run(self, pool: Pool) -> None:
        """Write from where an earlier attempt ended to the finished file."""
        self.resume()
        back = None if self.progress.done else self.read_back()  # after a stop there is much of it, so it is a stage
        pages = Pages(self.file, self.page, self.progress.position)
        with Follower(pages, self.journal, back) as follower:
            self.copy(pool, follower)
            back = follower.back
        self.finish(back)
        self.task.journal.unlink(missing_ok=True)

    def read_back(self) -> ReadBack | None:
        """Return a reader if the front of the file is known before the samples are in place."""
        plan = planned(self.found, self.task.storage, self.page, self.start)[0]
        if plan is None:
            return None
        return ReadBack(self.task.partial, self.progress.entries, beton.front(plan, self.mode, self.page, self.start))

    def resume(self) -> None:
        """Take over what an earlier attempt left on disk, as far as the source is unchanged."""
        task, progress, file = self.task, self.progress, self.file
        if task.journal.exists():
            task.reporter.begin(f"compare {task.split}", len(task.records))
        resumed = self.journal.resume(progress, task.partial, self.unchanged)
        task.reporter.end()
        if resumed:
            task.reporter.say(f"{task.partial}: going on after {progress.done:,} images", "resumed", done=progress.done)
        else:
            file.truncate(0)
            self.journal.begin()
        if progress.skipped and task.on_corrupt == "fail":
            i, problem = progress.skipped[0]
            raise UserError(
                f"{task.records.where(i)}: was left out ({problem}) by the conversion that this one would go on with; "
                f"give --on-corrupt skip, or remove {task.partial}"
            )
        file.truncate(progress.position)

    def unchanged(self, candidate: Candidate) -> bool:
        """Return whether the source still has what an earlier attempt read there, which name and size do not tell."""
        records, storage, i = self.task.records, self.task.storage, candidate.number
        item = item_of(records, i)
        if candidate.problem is not None:
            same = prepare(item, storage).problem == candidate.problem
        else:
            try:
                content = content_of(item, storage.reading)
                same = candidate.crc32 in (None, crc32(content))
            except (Unreadable, ValueError):
                same = False
        if not same:
            self.task.reporter.say(f"{records.where(i)}: has changed since the last attempt; written again from there")
        self.task.reporter.advance(1, int(self.found.sizes[i]))
        return same

    def copy(self, pool: Pool, follower: "Follower") -> None:
        """Put every sample in place."""
        task, progress, pages = self.task, self.progress, follower.pages
        records, labels, reporter = task.records, task.records.labels, task.reporter
        reporter.begin(f"convert {task.split}", len(records), progress.done)
        since, last = 0, time.monotonic()
        for i, prepared in self.prepared(pool):
            if prepared.problem is not None:
                if task.on_corrupt == "fail":
                    follower.commit(progress)
                    follower.wait()
                    raise UserError(
                        f"{records.where(i)}: {prepared.problem}; repair or remove it, or --on-corrupt skip. What is "
                        "written stays: the same command goes on"
                    )
                progress.skipped.append((i, prepared.problem))
                follower.back = None  # the front of the file will be different
                progress.done = i + 1
                reporter.advance(1)
                continue
            content: Item = item_of(records, i) if prepared.content is None else prepared.content
            if isinstance(content, Unreadable):
                raise content
            if prepared.content is not None:
                reason = self.found.reasons.get(i, f"--mode {task.storage.mode}")
                progress.changed.append((i, reason, prepared.source))
            if isinstance(content, np.ndarray):
                content = content.tobytes()
            size = content.size if isinstance(content, Extent) else len(content)
            if size > self.page:
                raise UserError(f"{records.where(i)}: {size:,} bytes, more than a page; use --max-side")
            room = pages.room(size)
            try:
                if isinstance(content, Extent):
                    content.read_into(room)
                else:
                    room[:] = content
            except Unreadable as error:  # it could be read a moment ago
                raise UserError(f"{error}; mend that, and the same command goes on") from None
            at = pages.taken(size)
            checksum = crc32(room) if prepared.crc32 is None else prepared.crc32
            progress.entries[progress.placed] = at, size, labels[i], checksum, prepared.width, prepared.height
            progress.placed, progress.position, progress.done = progress.placed + 1, pages.position, i + 1
            since += size
            reporter.advance(1, size)
            if since >= task.commit_bytes or time.monotonic() - last > COMMIT_SECONDS:
                follower.commit(progress)
                since, last = 0, time.monotonic()
        follower.commit(progress)
        follower.wait()
        reporter.end()

    def prepared(self, pool: Pool) -> Iterator[tuple[int, Prepared]]:
        """Yield the remaining samples as they are to be stored, in order. Workers see those that must be decoded."""
        found, storage, records = self.found, self.task.storage, self.task.records
        untouched = found.kept & (not storage.check or storage.mode == "raw")
        ids = np.arange(self.progress.done, len(records))
        todo = ids[~untouched[ids]]
        results = (
            one
            for batch in pool.map(partial(prepare, storage=storage), chunks(records, todo, PREPARED), records.where)
            for one in batch
        )
        for i in ids:
            if untouched[i]:
                yield int(i), Prepared(None, int(found.width[i]), int(found.height[i]), None, None)
            else:
                yield int(i), next(results)

    def finish(self, back: ReadBack | None) -> None:
        """Write tables, header, checksums, manifest, name."""
        task, file, progress = self.task, self.file, self.progress
        entries = progress.entries[: progress.placed]
        self.refuse_empty_classes(entries)
        before = beton.front(entries, self.mode, self.page, self.start)
        beton.write_tables(file, entries, before, self.page)
        beton.write_header(file, before)
        size = os.fstat(file.fileno()).st_size
        if back is None or os.pread(file.fileno(), self.start, 0) != back.front:
            back = ReadBack(task.partial, progress.entries)  # the front is known only now
        with ThreadPoolExecutor(1) as thread:
            synced = thread.submit(os.fsync, file.fileno())
            task.reporter.begin("read back", len(entries), back.at)
            back.to(size, len(entries), task.reporter)
            task.reporter.end()
        synced.result()
        sha256 = back.digest.hexdigest()
        manifest = self.manifest(sha256, size)
        files.write_atomically(
            manifest_path(task.target), lambda out: out.writelines(piece.encode() for piece in manifest.pieces()), AGAIN
        )
        os.replace(task.partial, task.target)
        files.sync_folder(task.target.parent)
        task.reporter.say(
            f"{task.target}: {len(entries):,} images, {size / 1e6:,.1f} MB, {len(manifest.reencoded):,} "
            f"{task.storage.made}, "
            f"{len(manifest.skipped):,} left out, sha256 {sha256[:16]}...",
            "written", file=str(task.target), images=len(entries), bytes=size, sha256=sha256,
            reencoded=len(manifest.reencoded), skipped=len(manifest.skipped),
        )  # fmt: skip

    def refuse_empty_classes(self, entries: NDArray[np.void]) -> None:
        """Raise UserError if all images of a class were left out."""
        source = self.task.source
        counts = np.bincount(entries["label"], minlength=len(source.class_names))
        missing = some([source.class_names[label] for label in np.flatnonzero(counts == 0)])
        if missing:
            raise UserError(
                f"{source.name}: every image of class {missing} in {self.task.split} was left out; leave the class out "
                f"as well (--classes), and remove {self.task.partial}"
            )

    def manifest(self, sha256: str, size: int) -> Manifest:
        """Return the manifest of the finished file."""
        task, progress, source = self.task, self.progress, self.task.source
        left_out = {i for i, _ in progress.skipped}
        ids = [i for i in range(len(task.records)) if i not in left_out]
        entries = progress.entries[: progress.placed]
        return Manifest(
            format=FORMAT,
            tool=f"fastil {__version__}",
            beton_version=beton.VERSION,
            split=task.split,
            source=task.origin,
            parameters=task.parameters,
            libraries=libraries(),
            class_names=source.class_names,
            titles=source.titles,
            counts=np.bincount(entries["label"], minlength=len(source.class_names)).tolist(),
            images=len(entries),
            bytes=size,
            sha256=sha256,
            crc32=entries["crc32"].tolist(),
            names=[task.records.name(i) for i in ids],
            reencoded=[
                Changed(bisect_left(ids, i), task.records.name(i), reason, checksum, int(self.found.sizes[i]))
                for i, reason, checksum in progress.changed
            ],
            skipped=[Changed(-1, task.records.name(i), reason) for i, reason in progress.skipped],
            notes=list(task.notes),
        )


class Follower:
    """Syncs what a writer has written, tells the journal and reads it back. back: None if that must wait."""

    def __init__(self, pages: Pages, journal: Journal, back: ReadBack | None) -> None:
        self.pages, self.journal, self.back = pages, journal, back
        self.threads = ThreadPoolExecutor(2)
        self.waiting: list[Future[None]] = []

    def commit(self, progress: Progress) -> None:
        """Commit all that is written so far, once the last commit has finished."""
        self.wait()
        self.pages.flush()
        self.waiting = [self.threads.submit(self._sync, self.journal.record(progress))]
        if self.back is not None:
            self.waiting.append(self.threads.submit(self.back.to, progress.position, progress.placed))

    def _sync(self, record: bytes) -> None:
        os.fsync(self.pages.file.fileno())
        self.journal.append(record)

    def wait(self) -> None:
        """Wait for the last commit. Raises whatever went wrong."""
        for one in self.waiting:
            one.result()
        self.waiting = []

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *exception: object) -> None:
        self.threads.shutdown()


def libraries() -> dict[str, str]:
    """Return the versions that decode and encode; others may write other bytes."""
    return {
        "pillow": version("pillow"),
        "jpeg": str(features.version("libjpeg_turbo") or features.version("jpg")),
        "simplejpeg": version("simplejpeg"),
    }
