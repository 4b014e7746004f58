"""Text for a terminal and for Markdown."""

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


def format_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


class Bar:
    """A bar of progress over the images of one job after the other, and lines that do not break it. Without a terminal
    nothing is drawn, and lines are just printed."""

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
