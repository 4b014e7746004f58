"""Text for a terminal and for Markdown.

Everything that fastil prints goes through `say` or a `Bar`, which let no control characters through. The linter forbids
`print` and tqdm elsewhere (pyproject.toml).
"""

import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import IO, Any, Literal

from tqdm import tqdm  # noqa: TID251  (elsewhere Bar stands for it)

WIDTH = 80  # columns of a terminal that tables and paragraphs fit
CLEAR_LINE = "\r\x1b[K"
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
    """Print a text to stdout or to `file`, without its control characters, in the place of a passing line."""
    passing("")
    print(plain(text), file=file, flush=flush)


def passing(text: str) -> None:
    """Show on a terminal what is being done, until something else is shown there. Elsewhere nothing is written: what
    stays in a log is what has happened."""
    global _passes
    if sys.stderr.isatty() and (text or _passes):
        sys.stderr.write(CLEAR_LINE + one_line(text)[: WIDTH - 1])
        sys.stderr.flush()
        _passes = bool(text)


_passes = False  # whether a passing line stands on the terminal


def duration(seconds: float) -> str:
    """Return a time as text: "45 s", "12 min", "3.9 hours"."""
    if seconds > 5400:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def estimate(seconds: float) -> str:
    """Return an estimated time as text. Below ten seconds it is none to rely on."""
    return duration(seconds) if seconds >= 10 else "under 10 s"


def paragraph(text: str, indent: str = "") -> str:
    """Return the text in lines of a terminal. indent: of all lines but the first."""
    return textwrap.fill(one_line(text), WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a table for a terminal, two blanks between its columns. right: the columns of numbers."""
    cells = [[one_line(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


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
    """A bar whose label and remarks are shown as one plain line. remark: what stands behind the bar in the place of
    tqdm's own numbers, looked up whenever it is drawn."""

    def __init__(self, remark: Callable[[], str] | None, **settings: Any) -> None:
        self.remark = remark
        settings |= {"bar_format": "{desc}: {percent:3d} %|{bar}| {remark}"} if remark else {}
        super().__init__(leave=False, dynamic_ncols=True, **settings)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar's format may name."""
        # Whole percents, rounded down: 100 is what is finished.
        own = {"percent": int(100 * self.n // (self.total or 1)), "remark": self.remark()} if self.remark else {}
        return {**super().format_dict, **own}

    def __str__(self) -> str:
        return one_line(super().__str__())


class Bar:
    """A bar of progress over one job after the other, and lines that do not break it. Without a terminal nothing is
    drawn, and lines are just printed."""

    def __init__(self) -> None:
        self.bar: _PlainBar | None = None

    def begin(
        self,
        label: str | None,
        total: float,
        done: float = 0,
        unit: Literal["img", "B"] = "img",
        remark: Callable[[], str] | None = None,
    ) -> None:
        """A job over so many images or bytes begins, `done` of them before a resume. remark: what to show behind the
        bar, in the place of the count, the time and the rate."""
        self.end()
        passing("")
        if sys.stderr.isatty():
            self.bar = _PlainBar(remark, total=total, initial=done, desc=label, unit=unit, unit_scale=unit == "B")

    def advance(self, count: float) -> None:
        """So many more are done."""
        if self.bar is not None:
            self.bar.update(count)

    def end(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.clear()
        say(line, flush=True)
