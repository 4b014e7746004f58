"""Who waits for whom in an epoch: training for data, or the loader for training."""

import time
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

import torch

from fastil.data import Loader
from fastil.training.captured import has_streams

Item = TypeVar("Item")


class Waiting:
    """Counts the seconds for which the device had nothing to do because the next batch was not there.

    On a CPU a step is done when the next batch is asked for, so they are the seconds that the loop waited. A GPU works
    on what is queued while the loop waits: it had nothing to do from the end of a step to the arrival of the next
    batch, both of them events on its stream, and no longer than the loop waited, which has other things to do as well.
    Nobody waits for an event; it is read some time after it has happened.

    seconds: of the epoch so far.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader, self.streams = loader, has_streams(loader.device)
        self.seconds = 0.0
        self.unread: deque[tuple[torch.cuda.Event, torch.cuda.Event, float]] = deque()
        self.began, self.worked = 0.0, 0.0

    def begin_epoch(self) -> None:
        """Look at the clock and at the loader's."""
        self.began, self.worked = time.perf_counter(), self.loader.worked or 0.0

    def over(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield the batches, and count how long each was waited for."""
        while True:
            done, asked = self._event(), time.perf_counter()
            batch = next(batches, None)
            waited = time.perf_counter() - asked
            if batch is None:
                return
            arrived = self._event()
            if done is None or arrived is None:
                self.seconds += waited
            else:
                self.unread.append((done, arrived, waited))
                self.read()
            yield batch

    def _event(self) -> torch.cuda.Event | None:
        """An event at the end of what is queued by now."""
        if not self.streams:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read(self) -> float:
        """Take up the events that have happened. Returns `seconds`."""
        while self.unread and self.unread[0][1].query():  # type: ignore[no-untyped-call]
            done, arrived, waited = self.unread.popleft()
            self.seconds += min(waited, done.elapsed_time(arrived) / 1000)
        return self.seconds

    def loader_idle(self) -> float | None:
        """The share of the time since `begin_epoch` in which the loader's threads had nothing to do, because the
        batches ahead were ready; None where it has no threads of its own, or none that tell."""
        if self.loader.worked is None:
            return None
        passed = time.perf_counter() - self.began
        return min(1.0, max(0.0, 1 - (self.loader.worked - self.worked) / passed))
