"""What a run shows while it runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_EVERY = 10.0  # seconds between the lines of epochs where there is no terminal


class Progress:
    """Counts images within a step and prints lines that do not break the bar."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.last_line = 0.0

    def begin(self, label: str, visits: int, done: int) -> None:
        """A step of so many image visits begins, `done` of them before a resume."""
        self.end()
        if sys.stderr.isatty():
            self.bar = tqdm(total=visits, initial=done, desc=label, unit="img", leave=False, dynamic_ncols=True)

    def tick(self, images: int) -> None:
        if self.bar is not None:
            self.bar.update(images)

    def epoch(self, line: str, last: bool) -> None:
        """Of an epoch: beside the bar, or a line of its own now and then and for the last one."""
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        elif last or time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            self.say("  " + line)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)
