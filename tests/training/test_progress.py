"""What a run shows of its progress, with a clock that the tests set."""

import io
import re
import signal
import sys

import pytest

from fastil import text
from fastil.recipe_file import load
from fastil.text import columns, estimate, paragraph, passing, say
from fastil.training import progress
from fastil.training.experiment import Experiment
from fastil.training.interrupt import Interrupt
from fastil.training.progress import StepBar
from fastil.training.step_plan import StepWork


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    """What is written to stderr from here on; pytest puts its own there after the fixtures."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def bar_of(*steps):
    """A bar over steps of (training, evaluation) in forward passes, of which a visit takes 3."""
    bar = StepBar()
    bar.work = [
        StepWork({"train": train, "correct": 0.0, "memory": 0.0, "evaluate": test}, 3.0) for train, test in steps
    ]
    return bar


def test_the_time_left_counts_what_comes_after_training(clock):
    bar = bar_of((3000, 500), (900, 600), (900, 700))
    bar.begin_phase(0, "train", 1, 10)
    assert bar.left() == ""
    bar.advance(100)
    clock[0] += 30  # 300 in 30 s
    assert bar.left() == f"step {estimate(3200 / 10)}, run {estimate((3200 + 1500 + 1600) / 10)} left"
    bar.advance(900)
    clock[0] += 270
    bar.begin_phase(0, "evaluate")
    assert bar.left() == f"step {estimate(50)}, run {estimate(50 + 310)} left"
    bar.begin_phase(1, "train", 1, 10)  # the evaluation took no time
    clock[0] += 10
    # What 300 s were for counts for ten of the twenty.
    pace = 20 / (3500 * 10 / 300)
    assert bar.left() == f"step {estimate(1500 * pace)}, run {estimate(3100 * pace)} left"


def test_a_run_that_goes_on_takes_its_speed_from_what_it_does_itself(clock):
    bar = bar_of((3000, 0))
    bar.begin_phase(0, "train", 8, 10, done=700)
    bar.advance(100)
    clock[0] += 15
    assert bar.left() == f"step {estimate(600 / 300 * 15)} left"


def test_a_bar_says_100_percent_of_nothing_that_goes_on(monkeypatch):
    terminal = on_terminal(monkeypatch)
    bar = bar_of((3000, 7))
    bar.begin_phase(0, "train", 10, 10)
    bar.advance(1000)
    bar.begin_phase(0, "evaluate")
    bar.bar.refresh()
    bar.end()
    shown = [int(number) for number in re.findall(r"(\d+) %", terminal.getvalue())]
    assert shown[-1] == 99
    assert max(len(frame.rstrip()) for frame in terminal.getvalue().split("\r")) <= 80


@pytest.mark.parametrize(("tty", "epochs", "seconds", "shown"), [
    (True, 5, 0.1, [1, 2, 3, 4, 5]), (True, 30, 0.1, [30]), (True, 30, 4.0, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),
    (True, 12, 20.0, list(range(1, 13))), (False, 5, 0.1, [5]), (False, 30, 21.0, [*range(3, 31, 3)]),
    (False, 3, 90.0, [1, 2, 3]),
])  # fmt: skip
def test_epochs_stay_in_lines_at_a_rhythm(clock, monkeypatch, capsys, tty, epochs, seconds, shown):
    if tty:
        on_terminal(monkeypatch)
    bar = bar_of((3.0 * epochs, 10))
    bar.begin_phase(0, "train", 1, epochs)
    for epoch in range(1, epochs + 1):
        clock[0] += seconds
        bar.advance(1)
        bar.epoch(f"epoch {epoch}/{epochs}", epoch, epochs)
    bar.end()
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.match(r"  epoch (\d+)/", line)[1]) for line in lines] == shown
    assert all(line.endswith(" left)") != (tty or line.startswith(f"  epoch {epochs}/")) for line in lines)


def test_a_passing_line_is_gone_when_something_is_said(monkeypatch):
    terminal = on_terminal(monkeypatch)
    passing("loading \x1b[31m" + "x" * 200)
    assert len(terminal.getvalue()) < 80 + len(text.CLEAR_LINE)
    assert terminal.getvalue().startswith(text.CLEAR_LINE + "loading \\u001b")
    say("done", terminal)
    say("more", terminal)
    assert terminal.getvalue().endswith(f"x{text.CLEAR_LINE}done\nmore\n")


def test_nothing_passes_where_there_is_no_terminal(capsys):
    passing("loading")
    say("done", sys.stderr)
    assert capsys.readouterr().err == "done\n"


def test_columns_and_paragraphs():
    assert columns(("a", "number"), [("long cell", "5"), ("b", "1,234,567")], right=(1,)) == (
        "a             number\nlong cell          5\nb          1,234,567"
    )
    words = paragraph("word " * 40, "  ").splitlines()
    assert max(map(len, words)) <= 80
    assert all(line.startswith("  word") for line in words[1:])


@pytest.mark.parametrize("tty", [True, False])
def test_the_answer_to_ctrl_c_begins_on_a_line_of_its_own(monkeypatch, tty):
    """A terminal has written ^C behind the bar, which stands in a line that has not ended."""
    written = []
    monkeypatch.setattr("fastil.training.interrupt.os.isatty", lambda file: tty)
    monkeypatch.setattr("fastil.training.interrupt.os.write", lambda file, data: written.append((file, data.decode())))
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested()
    start = text.CLEAR_LINE if tty else ""
    assert written == [(2, f"{start}fastil: stopping after the batch in hand; a second signal ends it at once\n")]


def test_a_run_that_ends_leaves_no_bar(monkeypatch, tmp_path):
    """What the command says next begins on a line of its own."""
    terminal = on_terminal(monkeypatch)
    experiment = Experiment(load("digits", ["precision=fp32"]), tmp_path / "run", resume=False)
    experiment.progress.begin_phase(0, "train", 1, 15)
    experiment.close()
    assert re.search(r"\r +\r$", terminal.getvalue())
