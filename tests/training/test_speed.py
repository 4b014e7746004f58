"""What a dry run and `fastil plan` say of this machine's speed, on clocks that the tests set."""

from types import SimpleNamespace

import pytest
import torch

from fastil.recipe_file import load
from fastil.text import duration
from fastil.training import estimate, speed
from fastil.training.speed import FEWEST, LONGEST, MOST, Rates, Speeds, Timed, steady


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_step_is_timed_by_both_clocks(share, monkeypatch):
    """Each look at the wall clock is a second after the last; the processor's clock goes slower by the share."""
    threads, looks = torch.get_num_threads(), iter(range(10_000))
    wall = SimpleNamespace(now=0.0)

    def look():
        wall.now = float(next(looks))
        return wall.now

    clock = SimpleNamespace(perf_counter=look, process_time=lambda: share * threads * wall.now)
    monkeypatch.setattr(speed, "time", clock)
    recipe = load("digits", ["batch_size=8", "precision=fp32"])
    found = speed._time_steps(recipe, recipe.build_network(10, 0), None, (8, 8), torch.device("cpu"))
    assert found.wall == 8
    assert found.share == pytest.approx(share)
    assert found.processor == pytest.approx(8 / (share * threads))


@pytest.mark.parametrize(("share", "threads"), [(0.5, 1), (0.9, 1), (0.4, 3)])
def test_a_busy_machine_is_told_and_what_a_quiet_one_would_do(share, threads, monkeypatch):
    """With several threads, what one of them does in a second of processor time, times their number."""
    asked = []

    def timed(recipe, student, teacher, size, device):
        asked.append(torch.get_num_threads())
        return Timed(
            100.0 if teacher is None else 80.0, 30.0 * (1 if teacher else 2), share if len(asked) <= 2 else 1.0
        )

    monkeypatch.setattr(speed, "_time_steps", timed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = speed.speeds(load("digits", ["device=cpu"]), (8, 8))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found.now == Rates(100.0, 80.0)
    assert asked == [threads] * 2 + ([1, 1] if threads > 1 else [])
    if share > 0.85:
        assert found == Speeds(Rates(100.0, 80.0))
    else:
        assert found.quiet == Rates(60.0 * threads, 30.0 * threads)
        assert found.others == pytest.approx(1 - share)


def test_steps_are_timed_until_their_median_is_steady():
    assert not steady([1.0] * (FEWEST - 1), LONGEST + 1)
    assert steady([1.0] * FEWEST, 0.0)
    assert not steady([1.0, 2.0, 3.0, 4.0], 0.0)
    assert steady([1.0, 2.0, 3.0, 4.0], LONGEST + 1)  # slow steps end it
    assert steady([1.0, 2.0] * MOST, 0.0)
    assert steady([1.0, 1.0, 1.0, 1.0, 9.0], 0.0)  # one that something else slowed down


def test_a_plan_says_how_long_it_takes_and_would_take_on_a_quiet_machine(monkeypatch):
    monkeypatch.setattr(estimate, "speeds", lambda *_: Speeds(Rates(10.0, 10.0), Rates(40.0, 40.0), 0.75))
    text = estimate.plan_text(load("digits"))
    visits = int(text.split("\nimage visits ")[1].split(" ")[0].replace(",", ""))
    assert f"estimated    {duration(visits / 10)} on" in text
    assert "other programs took 75 % of the processors while this was timed" in text
    assert f"on a quiet machine about {duration(visits / 40)} at best\n" in text + "\n"
