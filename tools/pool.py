"""A pool of worker processes in which a worker that dies ends the work and names the image it was at.

Each worker has a pipe of its own and a thread here that talks to it. Nothing is shared that a killed process could keep
locked. The queues of concurrent.futures are shared, so its pool can wait for ever for a killed worker.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import Array
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, TypeVar

from fastil.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Chunk = list[tuple[int, Task]]
MOST_WORKERS = 1024
AHEAD = 4  # waiting chunks per worker


class WorkerDied(UserError):
    """A worker was killed, or ended by an exception that no image should cause."""


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    pipe: "Connection[Any, Any]"
    slot: int  # index in the list of items that the workers are at


class Pool:
    """Maps chunks of items over worker processes, in order. With one worker, this process does the work."""

    def __init__(self, workers: int) -> None:
        if not 1 <= workers <= MOST_WORKERS:
            raise UserError(f"--workers {workers}: must lie between 1 and {MOST_WORKERS}")
        self.workers = workers
        self.context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
        self.at: Array[Any] = self.context.RawArray("q", [-1] * workers)
        self.started: list[_Worker] = []
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(workers)

    def map(
        self, work: Callable[[Task], Result], chunks: Iterable[Chunk[Task]], where: Callable[[int], str]
    ) -> Iterator[list[Result]]:
        """Yield the results of each chunk of numbered items, in order. where: of an item, for a message."""
        if self.workers == 1:
            for chunk in chunks:
                yield [work(item) for _, item in chunk]
            return
        self.start()
        waiting: deque[Future[list[Result]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(self.threads.submit(self._ask, work, chunk, where))
                if len(waiting) > AHEAD * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def start(self) -> None:
        """Start the workers, which need a quarter of a second, while this process does something else."""
        if self.workers == 1:
            return
        resource_tracker.ensure_running()  # multiprocessing would start it below, and unblock the signal
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a worker inherits it
        try:
            for slot in range(len(self.started), self.workers):
                ours, theirs = self.context.Pipe()
                process = self.context.Process(target=_serve, args=(theirs, self.at, slot), daemon=True)
                process.start()
                theirs.close()  # so that the pipe ends with the worker
                self.started.append(_Worker(process, ours, slot))
                self.idle.put(self.started[-1])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _ask(self, work: Callable[[Task], Result], chunk: Chunk[Task], where: Callable[[int], str]) -> list[Result]:
        """Return the results that the next idle worker computes for a chunk. Runs in a thread."""
        worker = self.idle.get()
        try:
            worker.pipe.send((work, chunk))
            answer = worker.pipe.recv()
        except (EOFError, OSError):
            number = self.at[worker.slot]
            raise WorkerDied(
                f"a worker process was killed (out of memory, or a decoder crashed) at "
                f"{where(chunk[0][0] if number < 0 else number)}; what is committed stays: run the same command again, "
                "with --workers 1 to see which image it is, or remove that image"
            ) from None
        finally:
            self.idle.put(worker)  # a dead one too, so that the next caller gets an error instead of waiting
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, _Failed):
            raise WorkerDied(
                f"a worker failed at {where(answer.number)}: {answer.what}; please report it. {answer.trace}"
            )
        results: list[Result] = answer
        return results

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.started:
            worker.process.terminate()  # it holds nothing but the image it works on
        self.threads.shutdown(cancel_futures=True)
        for worker in self.started:
            worker.process.join()
            worker.pipe.close()


@dataclass(frozen=True)
class _Failed:
    """What went wrong in a worker."""

    number: int
    what: str
    trace: str


def _serve(pipe: "Connection[Any, Any]", at: "Array[Any]", slot: int) -> None:
    """Run a worker, which answers chunk by chunk."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        while True:
            work, chunk = pipe.recv()
            pipe.send(_do(work, chunk, at, slot))


def _end_with_parent() -> None:
    """End the worker when its parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(
    work: Callable[[Task], Result], chunk: Chunk[Task], at: "Array[Any]", slot: int
) -> list[Result] | UserError | _Failed:
    results = []
    for number, item in chunk:
        at[slot] = number
        try:
            results.append(work(item))
        except UserError as error:
            return error
        except Exception as error:
            return _Failed(number, f"{type(error).__name__}: {error}", traceback.format_exc())
    at[slot] = -1
    return results
