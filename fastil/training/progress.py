"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere."""

import time
from typing import Literal

from fastil.text import Bar

LINE_EVERY = 10.0  # seconds between the lines of epochs where there is no terminal


class StepBar(Bar):
    """Counts image visits within a step and shows its epochs."""

    last_line = 0.0

    def epoch(self, line: str, last: bool) -> None:
        """Show an epoch: at the bar, or as a line of its own now and then and for the last one."""
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        elif last or time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            self.say("  " + line)


class NoBar(StepBar):
    """Shows nothing: in the processes of a run but the first."""

    def begin(self, label: str | None, total: int, done: int = 0, unit: Literal["img", "B"] = "img") -> None:
        """Begin nothing."""

    def say(self, line: str) -> None:
        """Say nothing."""
