"""A bar of progress where there is a terminal, and lines that do not break it."""

import sys
from typing import Any

from tqdm import tqdm


class Bar:
    """Counts images of one job after the other. Without a terminal nothing is drawn, and lines are just printed."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def begin(self, label: str | None, total: int, done: int = 0) -> None:
        """A job over so many images begins, `done` of them before a resume."""
        self.end()
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=label, unit="img", leave=False, dynamic_ncols=True)

    def advance(self, images: int) -> None:
        if self.bar is not None:
            self.bar.update(images)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)
