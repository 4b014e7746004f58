"""SIGTERM, SIGINT and SIGHUP as a flag that the training loop reads between batches, in all processes of a run."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch.distributed as dist

from fastil import ranks
from fastil.text import CLEAR_LINE

STOPPING = "fastil: stopping after the batch in hand; a second signal ends it at once"
LOOK_EVERY, GIVE_UP = 0.2, 30.0  # seconds between looks at what others have announced, and until they are given up


class Interrupt:
    """While entered, the first signal only sets `number`; a second one acts as it would have without this. In a thread
    other than the main one Python handles no signals, and nothing changes."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if main else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: outlive the terminal
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self.previous[number])
        if not ranks.first():
            return
        with contextlib.suppress(OSError):  # print is not to be called here
            # A terminal has a bar there, and the ^C behind it.
            start = CLEAR_LINE if os.isatty(2) else ""
            os.write(2, f"{start}{STOPPING}\n".encode())

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether the run is to stop."""
        return self.number is not None


class SharedInterrupt(Interrupt):
    """The same for a process among others: a signal to one of them stops all of them before the same batch.

    `requested` is called as often in each of them, before every batch. A thread looks now and then whether one has had
    a signal, and then announces the first call of `requested` at which this process can stop; all stop at the latest
    of these. So nothing is exchanged, and nobody waits, as long as there was no signal.
    """

    runs = 0  # of this process

    def __init__(self) -> None:
        super().__init__()
        SharedInterrupt.runs += 1
        self.key = f"fastil/{SharedInterrupt.runs}"
        self.store = dist.distributed_c10d._get_default_store()
        self.calls, self.announced = 0, False
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._look, name="fastil-interrupt", daemon=True)

    def __enter__(self) -> "Interrupt":
        super().__enter__()
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self.thread.join(GIVE_UP)  # which the store may keep, where its machine is gone
        super().__exit__(*exc)

    def _look(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: so is the run
            while not self.ended.wait(LOOK_EVERY):
                if self.number is not None and not self.store.check([f"{self.key}/signal"]):
                    self.store.set(f"{self.key}/signal", str(int(self.number)))
                if self.store.check([f"{self.key}/signal"]):
                    with self.lock:
                        self.announced = True
                        self.store.set(f"{self.key}/stop/{ranks.rank()}", str(self.calls + 1))
                    return

    def requested(self) -> bool:
        with self.lock:
            self.calls += 1
            if not self.announced:
                return False
        keys = [f"{self.key}/stop/{rank}" for rank in range(ranks.count())]
        waiting = time.monotonic()
        while not self.store.check(keys):
            if time.monotonic() - waiting > GIVE_UP:
                silent = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
                raise RuntimeError(f"no answer from rank {', '.join(silent)}: stopped without a checkpoint")
            time.sleep(LOOK_EVERY)
        self.number = int(self.store.get(f"{self.key}/signal"))
        return self.calls >= max(int(self.store.get(key)) for key in keys)
