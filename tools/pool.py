"""Worker processes that are watched: one that dies ends the work with the place it was at."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from types import TracebackType
from typing import Any, TypeVar

from fastil.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
AHEAD = 4  # chunks per worker that wait for their turn

_at: "SynchronizedArray[int] | None" = None  # in a worker: the item that each worker is at, by slot
_slot = 0


class WorkerDied(UserError):
    """A worker was killed, or an exception that no image should cause ended it."""


class Pool:
    """Maps chunks of items over worker processes, in order. One worker: this process does the work."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.executor: ProcessPoolExecutor | None = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
            self.at: SynchronizedArray[int] = context.Array("q", [-1] * workers)
            self.executor = ProcessPoolExecutor(workers, context, _begin, (self.at, context.Value("i", 0)))

    def map(
        self, work: Callable[[Task], Result], chunks: Iterable[list[tuple[int, Task]]], where: Callable[[int], str]
    ) -> Iterator[list[Result]]:
        """The results of each chunk of numbered items, in order. where: of an item, for a message."""
        if self.executor is None:
            for chunk in chunks:
                yield [work(item) for _, item in chunk]
            return
        waiting: deque[tuple[list[tuple[int, Task]], Future[Any]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, self.executor.submit(_do, work, chunk)))
                if len(waiting) > AHEAD * self.workers:
                    yield self._result(*waiting.popleft(), where)
            while waiting:
                yield self._result(*waiting.popleft(), where)
        finally:
            for _, future in waiting:
                future.cancel()

    def _result(
        self, chunk: list[tuple[int, Task]], future: "Future[list[Result]]", where: Callable[[int], str]
    ) -> list[Result]:
        try:
            return future.result()
        except BrokenProcessPool:
            at = [number for number in self.at[:] if number >= 0]
            places = "; ".join(where(number) for number in at) or where(chunk[0][0])
            raise WorkerDied(
                f"a worker process was killed (out of memory, or a decoder crashed) at {places}; nothing written is "
                "lost: run the same command again, with --workers 1 to see which image it is, or remove that image"
            ) from None
        except _Failed as failed:
            raise WorkerDied(
                f"a worker failed at {where(failed.number)}: {failed.what}; please report it. {failed.trace}"
            ) from None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=kind is None, cancel_futures=True)


class _Failed(Exception):
    """Carries what happened in a worker to the process that waits for it."""

    def __init__(self, number: int, what: str, trace: str) -> None:
        super().__init__(number, what, trace)
        self.number, self.what, self.trace = number, what, trace


def _begin(at: "SynchronizedArray[int]", counter: "Synchronized[int]") -> None:
    global _at, _slot
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with counter.get_lock():
        _at, _slot = at, counter.value % len(at)
        counter.value += 1


def _end_with_parent() -> None:
    """A parent that is killed leaves no worker behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(work: Callable[[Task], Result], chunk: list[tuple[int, Task]]) -> list[Result]:
    results = []
    for number, item in chunk:
        if _at is not None:
            _at[_slot] = number
        try:
            results.append(work(item))
        except UserError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise _Failed(number, what, traceback.format_exc()) from None
    if _at is not None:
        _at[_slot] = -1
    return results


def default_workers() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
