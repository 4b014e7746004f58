"""Text for a terminal and for Markdown.

Everything that fastil prints goes through `say` or a `Bar`, which let no control characters through. The linter forbids
`print` and tqdm elsewhere (pyproject.toml).
"""

import re
import sys
from collections.abc import Sequence
from typing import IO, Literal

from tqdm import tqdm  # noqa: TID251  (elsewhere Bar stands for it)

# C0 without tab and newline, DEL, C1, marks that change the direction of text, Unicode's own ends of lines, and
# surrogates, which stand for bytes of a file name that are not UTF-8.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Return the text with its control characters written as JSON writes them: ESC becomes \\u001b.

    A terminal obeys control characters, and names of files and classes can hold them. Tab and newline stay. A text that
    is JSON stays the same JSON.
    """
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """Return the plain text as one line: each newline, with the blanks around it, becomes a blank."""
    return plain(re.sub(r"\s*\n\s*", " ", text))


def say(text: str, file: IO[str] | None = None, flush: bool = False) -> None:
    """Print a text to stdout or to `file`, without its control characters."""
    print(plain(text), file=file, flush=flush)


def duration(seconds: float) -> str:
    """Return a time as text: "45 s", "12 min", "3.9 hours"."""
    if seconds > 5400:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def format_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table whose columns line up in a terminal too. Each cell is one line."""
    header, rows = tuple(map(one_line, header)), [tuple(map(one_line, row)) for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


class _PlainBar(tqdm):  # type: ignore[type-arg]
    """A bar whose label and remarks are shown as one plain line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class Bar:
    """A bar of progress over one job after the other, and lines that do not break it. Without a terminal nothing is
    drawn, and lines are just printed."""

    def __init__(self) -> None:
        self.bar: _PlainBar | None = None

    def begin(self, label: str | None, total: int, done: int = 0, unit: Literal["img", "B"] = "img") -> None:
        """A job over so many images or bytes begins, `done` of them before a resume."""
        self.end()
        if sys.stderr.isatty():
            self.bar = _PlainBar(
                total=total,
                initial=done,
                desc=label,
                unit=unit,
                unit_scale=unit == "B",
                leave=False,
                dynamic_ncols=True,
            )

    def advance(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.clear()
        say(line, flush=True)
