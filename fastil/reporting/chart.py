"""Line charts for a page without scripts: where everything lies. templates/chart.svg draws it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 400, 270, 52, 18, 42, 22


@dataclass(frozen=True)
class Style:
    """How the lines of a group look."""

    colour: str
    dashes: str


@dataclass(frozen=True)
class Series:
    """What belongs together in a chart; None as y breaks a line."""

    style: Style
    x: Sequence[float]
    y: Sequence[float | None]
    titles: Sequence[str]  # of the points, shown on hovering; "" for a point without a dot
    band: Sequence[float] | None = None  # half its width
    thin: Sequence[Sequence[float | None]] = ()  # further lines, behind


@dataclass(frozen=True)
class Axis:
    label: str
    limits: tuple[float, float]
    ticks: Sequence[tuple[float, str]]


class Tick(NamedTuple):
    """at: in pixels. text: "" where it would touch the one before."""

    at: float
    text: str


class Dot(NamedTuple):
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """A series in pixels. path, band, thin: the d of an SVG path, "" for none."""

    style: Style
    path: str
    band: str
    thin: str
    faint: float  # opacity of the thin lines
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Chart:
    """What templates/chart.svg draws, in pixels. marks: vertical lines with a label on top."""

    name: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Tick]
    lines: Sequence[Line]
    width: ClassVar[int] = WIDTH
    height: ClassVar[int] = HEIGHT
    left: ClassVar[int] = LEFT
    right: ClassVar[int] = WIDTH - RIGHT
    top: ClassVar[int] = TOP
    floor: ClassVar[int] = HEIGHT - BOTTOM


def log_axis(label: str, low: float, high: float) -> Axis:
    """An axis of log10(value) around low, high and 1; ticks at 1, 2, 5 or, where these are too few, at tenths."""
    low, high = min(low, 0.8), max(high, 1.05)
    if high / low > 5:
        values = [n * 10.0**e for e in range(-9, 9) for n in (1, 2, 5)]
    else:
        values = [n / 10 for n in range(1, 60)]
    ticks = [(math.log10(v), f"{v:g}") for v in values if low <= v <= high]
    return Axis(label, (math.log10(low) - 0.02, math.log10(high) + 0.02), ticks)


def chart(name: str, series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[tuple[float, str]] = ()) -> Chart:
    """Lay a chart out. marks: vertical lines by their x, each with a label."""

    def across(value: float) -> float:
        low, high = x.limits
        return LEFT + (value - low) / ((high - low) or 1) * (Chart.right - LEFT)

    def down(value: float) -> float:
        low, high = y.limits
        return Chart.floor - (min(max(value, low), high) - low) / (high - low) * (Chart.floor - TOP)

    def line(of: Series) -> Line:
        xs, ys = [across(value) for value in of.x], [None if value is None else down(value) for value in of.y]
        area = ""
        if of.band is not None and any(of.band):
            pairs = list(zip(of.y, of.band, strict=True))
            upper, lower = ([down(v + s * b) for v, b in pairs if v is not None] for s in (1, -1))
            area = path([*xs, *xs[::-1]], [*upper, *lower[::-1]]) + "Z"
        thin = "".join(path(xs, [None if v is None else down(v) for v in other]) for other in of.thin)
        dots = [
            Dot(at, height, title)
            for at, height, title in zip(xs, ys, of.titles, strict=True)
            if title and height is not None
        ]
        return Line(of.style, path(xs, ys), area, thin, min(0.35, 10 / max(1, len(of.thin))), dots)

    return Chart(
        name,
        x.label,
        y.label,
        uncrowded((across(v), across(v) - 4 * len(text), across(v) + 4 * len(text) + 5, text) for v, text in x.ticks),
        uncrowded((down(v), -down(v), 14 - down(v), text) for v, text in sorted(y.ticks)),
        uncrowded((across(v), across(v), across(v) + 7 * len(text) + 5, text) for v, text in marks),
        [line(of) for of in series],
    )


def uncrowded(places: Iterable[tuple[float, float, float, str]]) -> list[Tick]:
    """Ticks without the labels that would touch the one before. places: where each is, where its label begins and where
    the next one may, and the label."""
    ticks, free = [], -math.inf
    for at, begin, end, text in places:
        ticks.append(Tick(at, text if begin >= free else ""))
        free = end if begin >= free else free
    return ticks


def path(xs: Sequence[float], ys: Sequence[float | None]) -> str:
    """The d of an SVG path; None begins a new piece."""
    pieces, command = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            pieces.append(f"{command}{x:.1f} {y:.1f}")
        command = "M" if y is None else "L"
    return "".join(pieces)
