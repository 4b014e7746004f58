"""SIGTERM, SIGINT and SIGHUP as a flag that the training loop reads between batches."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


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
        with contextlib.suppress(OSError):  # print may be in the middle of a line, and is not to be called here
            os.write(2, b"\nfastil: stopping after the batch in hand; a second signal ends it at once\n")

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        return self.number is not None
