"""Who waits for whom, on clocks and streams that the tests set."""

from types import SimpleNamespace

import pytest
import torch

from fastil.training import waiting
from fastil.training.waiting import Waiting

CPU = torch.device("cpu")


class Clock:
    """The loop's clock, and a GPU that begins what is queued when it is queued or when it is through with the rest."""

    def __init__(self, monkeypatch, gpu):
        self.now = self.free = 0.0
        monkeypatch.setattr(waiting.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(waiting, "has_streams", lambda device: gpu)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def work(self, seconds):
        """Queue work for the GPU, which takes the loop no time."""
        self.free = max(self.now, self.free) + seconds


class Event:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.at = max(self.clock.now, self.clock.free)

    def query(self):
        return self.at <= self.clock.now

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def epoch(clock, loads, step, host=0.0, gpu=True):
    """The seconds counted in an epoch whose batches take so long to load and whose steps take so long."""
    counted = Waiting(SimpleNamespace(device=CPU, worked=None))

    def batches():
        for load in loads:
            clock.now += load
            yield "inputs"

    for _ in counted.over(batches()):
        clock.now += host
        if gpu:
            clock.work(step)
        else:
            clock.now += step
    clock.now = max(clock.now, clock.free)  # the epoch's one wait for the device
    return counted.read()


@pytest.mark.parametrize(
    ("loads", "step", "host", "expected"),
    [
        ([3.0] + [1.0] * 9, 2.0, 0.0, 3.0),  # the loop waits as long again, in which the GPU is at work
        ([3.0] * 10, 2.0, 0.0, 3.0 + 9 * 1.0),  # a second in each of three is lost
        ([1.0, 1.0, 7.0, 1.0], 3.0, 0.0, 1.0 + 2.0),  # one batch late, by 7 - 5
        ([0.5] * 10, 0.1, 1.0, 0.5 + 9 * 0.4),  # the GPU waits for the loop as well, which is not for data
        ([], 1.0, 0.0, 0.0),
    ],
)
def test_a_gpu_waits_where_it_has_nothing_to_do_and_the_loop_waits_too(monkeypatch, loads, step, host, expected):
    assert epoch(Clock(monkeypatch, gpu=True), loads, step, host) == pytest.approx(expected)


def test_a_cpu_waits_while_the_loop_does(monkeypatch):
    assert epoch(Clock(monkeypatch, gpu=False), [3.0, 1.0, 0.0], 2.0, gpu=False) == pytest.approx(4.0)


def test_what_a_gpu_has_not_come_to_is_read_later(monkeypatch):
    clock = Clock(monkeypatch, gpu=True)
    counted = Waiting(SimpleNamespace(device=CPU, worked=None))
    batches = counted.over(iter("ab"))
    next(batches)
    clock.work(5.0)
    clock.now = 6.0
    next(batches)
    clock.work(5.0)
    assert counted.read() == 0.0  # the loop did not wait for the second one
    assert not counted.unread
    clock.now = 7.0
    assert list(batches) == []


@pytest.mark.parametrize(("worked", "idle"), [((3.0, 13.0), 0.0), ((3.0, 5.0), 0.8), ((0.0, 11.0), 0.0), (None, None)])
def test_a_loader_is_idle_for_what_its_threads_do_not_work(monkeypatch, worked, idle):
    clock = Clock(monkeypatch, gpu=False)
    loader = SimpleNamespace(device=CPU, worked=worked and worked[0])
    counted = Waiting(loader)
    clock.now = 100.0
    counted.begin_epoch()
    clock.now = 110.0
    loader.worked = worked and worked[1]
    assert counted.loader_idle() == (None if idle is None else pytest.approx(idle))
