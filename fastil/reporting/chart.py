"""Line charts as inline SVG, for a page without scripts. Their classes are styled by the page's sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 400, 270, 52, 18, 42, 22


@dataclass(frozen=True)
class Style:
    """How the lines of a group look."""

    colour: str
    dashes: str

    @property
    def stroke(self) -> str:
        return f'stroke="{self.colour}" stroke-dasharray="{self.dashes}"' if self.dashes else f'stroke="{self.colour}"'


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


def legend(styles: dict[str, Style]) -> str:
    items = (
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><path d="M1 5H29" stroke-width="3" {style.stroke}/></svg>'
        f"{escape(label)}</li>"
        for label, style in styles.items()
    )
    return f"<ul class=legend>{''.join(items)}</ul>"


def log_axis(label: str, low: float, high: float) -> Axis:
    """An axis of log10(value) around low, high and 1; ticks at 1, 2, 5 or, where these are too few, at tenths."""
    low, high = min(low, 0.8), max(high, 1.05)
    if high / low > 5:
        values = [n * 10.0**e for e in range(-9, 9) for n in (1, 2, 5)]
    else:
        values = [n / 10 for n in range(1, 60)]
    ticks = [(math.log10(v), f"{v:g}") for v in values if low <= v <= high]
    return Axis(label, (math.log10(low) - 0.02, math.log10(high) + 0.02), ticks)


def chart(name: str, series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Inline SVG; marks: vertical lines with a label on top. Labels that would touch the one before are left out."""

    def across(value: float) -> float:
        low, high = x.limits
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        low, high = y.limits
        return HEIGHT - BOTTOM - (min(max(value, low), high) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    drawn, floor, right = [], HEIGHT - BOTTOM, WIDTH - RIGHT
    free = math.inf
    for value, text in sorted(y.ticks):
        at = down(value)
        drawn.append(f'<path class=grid d="M{LEFT} {at:.1f}H{right}"/>')
        if at <= free:
            drawn.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
            free = at - 14
    free = -math.inf
    for value, text in x.ticks:
        at, half = across(value), 4 * len(text)
        drawn.append(f'<path class=axis d="M{at:.1f} {floor}v4"/>')
        if at - half >= free:
            drawn.append(f'<text x="{at:.1f}" y="{floor + 18}" text-anchor="middle">{text}</text>')
            free = at + half + 5
    free = -math.inf
    for value, text in marks:
        at = across(value)
        drawn.append(f'<path class=step d="M{at:.1f} {TOP}V{floor}"/>')
        if at >= free:
            drawn.append(f'<text x="{at:.1f}" y="{TOP - 7}">{text}</text>')
            free = at + 7 * len(text) + 5
    middle = (floor + TOP) / 2
    drawn.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{x.label}</text>')
    drawn.append(f'<text transform="rotate(-90 13 {middle})" x="13" y="{middle}" text-anchor="middle">{y.label}</text>')
    for line in series:
        xs = [across(value) for value in line.x]
        ys = [None if value is None else down(value) for value in line.y]
        drawn.append("<g class=series>")
        if line.band is not None and any(line.band):
            pairs = list(zip(line.y, line.band, strict=True))
            upper, lower = ([down(v + s * b) for v, b in pairs if v is not None] for s in (1, -1))
            area = path([*xs, *xs[::-1]], [*upper, *lower[::-1]])
            drawn.append(f'<path d="{area}Z" fill="{line.style.colour}" opacity=".15"/>')
        behind = "".join(path(xs, [None if v is None else down(v) for v in other]) for other in line.thin)
        if behind:
            faint = f'stroke="{line.style.colour}" opacity="{min(0.35, 10 / len(line.thin)):.2f}"'
            drawn.append(f'<path class=thin {faint} d="{behind}"/>')
        d = path(xs, ys)
        drawn.append(f'<path class=line d="{d}" {line.style.stroke}/><path class=target d="{d}"/>')
        for at, height, title in zip(xs, ys, line.titles, strict=True):
            if title and height is not None:
                place = f'cx="{at:.1f}" cy="{height:.1f}"'
                drawn.append(f'<circle {place} r="3.5" fill="{line.style.colour}"/>')
                drawn.append(f'<circle class=target {place} r="6"><title>{escape(title)}</title></circle>')
        drawn.append("</g>")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{"".join(drawn)}</svg>'


def path(xs: Sequence[float], ys: Sequence[float | None]) -> str:
    """The d of an SVG path; None begins a new piece."""
    pieces, command = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            pieces.append(f"{command}{x:.1f} {y:.1f}")
        command = "M" if y is None else "L"
    return "".join(pieces)
