"""The report as one HTML page that needs no other file and no network."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil.report import Run, alpha_paths, read_confusion, rows, seed_spread

COLOURS = ("#3b78c3", "#e07b28", "#2f9e5b", "#c8434a", "#8a63c0", "#8c6d5a", "#d56bb0", "#7a7f87", "#a3a528", "#22a5b5")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 540, 320, 56, 44, 16

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --paper: #fff; --line: #d5d9de; --soft: #6a727c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #16191d; --line: #3a4048; --soft: #9aa3ad; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
svg { max-width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 13px; }
.axis { stroke: var(--soft); } .grid { stroke: var(--line); } .soft { color: var(--soft); font-size: .9rem; }
.legend span { display: inline-block; margin-right: 1.2rem; } .legend i { display: inline-block; width: .8em;
  height: .8em; border-radius: 2px; margin-right: .4em; }
.maps { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figcaption { font-size: .85rem; }
.maps img { width: 15rem; max-width: 80vw; image-rendering: pixelated; border: 1px solid var(--line); }
pre { overflow-x: auto; font-size: .8rem; } details { margin: .4rem 0; } summary { cursor: pointer; }
@media print { body { max-width: none; } details { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Series:
    """A line of a chart: [n] x and y, and half the width of its band, percent or plain numbers."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] | None = None
    dots: bool = True


def page(groups: dict[str, list[Run]], notes: Sequence[str]) -> str:
    """The whole document. groups: runs that differ in the seed only, by label; notes: lines of plain text below the
    table."""
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(groups)}
    paths = {label: [path for run in runs if (path := alpha_paths(run))] for label, runs in groups.items()}
    parts = [
        "<h1>fastil report</h1>",
        "<p class=soft>Top-1 in percent over all classes seen; mean ± standard deviation over seeds.</p>",
        table(*rows(groups)),
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Accuracy after each step</h2>",
        legend(colours),
        "<div class=maps>",
        *(accuracy_chart(groups, colours, key, title) for key, title in CURVES.items()),
        "</div>",
    ]
    if any(paths.values()):
        parts += [
            "<h2>Alpha</h2>",
            "<p class=soft>Weight of the old classes in the Balanced Softmax (eq. 5) over the epochs of the "
            "incremental steps, one line per seed (with an alpha per class: their geometric mean). It starts each step "
            "at 1.</p>",
            legend({label: colours[label] for label in paths if paths[label]}),
            alpha_chart(paths, colours),
        ]
    parts.append("<h2>Confusion matrices</h2>")
    parts.append(
        "<p class=soft>log(1 + images), summed over seeds; rows are true classes, columns predictions, both in the "
        "order in which they are learned.</p>"
    )
    parts += [confusions(label, runs) for label, runs in groups.items()]
    parts.append("<h2>Effective protocols</h2>")
    parts += [protocol(label, runs[0]) for label, runs in groups.items()]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>fastil report</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


CURVES = {"top1": "all classes seen", "top1_old": "classes of earlier steps", "top1_new": "classes of this step"}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def legend(colours: dict[str, str]) -> str:
    items = (f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in colours.items())
    return f"<p class=legend>{''.join(items)}</p>"


def accuracy_chart(groups: dict[str, list[Run]], colours: dict[str, str], key: str, title: str) -> str:
    lines = []
    for label, runs in groups.items():
        length = min(len(run.curve) for run in runs)
        steps = [[run.results["steps"][k] for run in runs] for k in range(length)]
        steps = [step for step in steps if all(result[key] is not None for result in step)]
        if steps:
            means, bands = zip(*(seed_spread([result[key] for result in step]) for step in steps), strict=True)
            lines.append(Series(label, colours[label], [step[0]["classes_seen"] for step in steps], means, bands))
    ticks = sorted({x for line in lines for x in line.x})
    drawn = chart(lines, (0, 100), ticks, [0, 20, 40, 60, 80, 100], "classes seen", "top-1 (%)")
    return f"<div><h3>{escape(title)}</h3>{drawn}</div>"


def alpha_chart(paths: dict[str, list[list[tuple[int, float]]]], colours: dict[str, str]) -> str:
    """Alpha on a logarithmic axis; a vertical line where a step begins."""
    lines, begins = [], []
    for label, of_seeds in paths.items():
        for path in of_seeds:
            logs = [math.log10(alpha) for _, alpha in path]
            lines.append(Series(label, colours[label], range(1, len(path) + 1), logs, dots=False))
            begins = [i + 1 for i in range(len(path)) if i == 0 or path[i][0] != path[i - 1][0]]
    low = min(-0.31, *(min(line.y) for line in lines))
    high = max(0.05, *(max(line.y) for line in lines))
    marks = [
        v for v in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2) if low - 0.05 <= math.log10(v) <= high + 0.05
    ]
    ticks = [math.log10(v) for v in marks]
    names = [f"{v:g}" for v in marks]
    return chart(lines, (low - 0.05, high + 0.05), begins, ticks, "epoch (ticks: a step begins)", "alpha", names)


def chart(
    lines: Sequence[Series],
    limits: tuple[float, float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    y_names: Sequence[str] | None = None,
) -> str:
    """Lines with bands as inline SVG; pointing at a dot shows its value."""
    first = min((min(line.x) for line in lines), default=0)
    last = max((max(line.x) for line in lines), default=1)
    low, high = limits

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1)
        up = (min(max(y, low), high) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - 20), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    marks = []
    for value, name in zip(y_ticks, y_names or [f"{v:g}" for v in y_ticks], strict=True):
        y = place(first, value)[1]
        marks.append(f'<line class=grid x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    for value in x_ticks:
        x = place(value, low)[0]
        marks.append(f'<line class=axis x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 5}"/>')
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{value:g}</text>')
    middle = (HEIGHT - BOTTOM) / 2
    marks.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    marks.append(f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">{y_label}</text>')
    for line in lines:
        points = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        if line.band is not None and any(line.band):
            upper = [place(x, y + b) for x, y, b in zip(line.x, line.y, line.band, strict=True)]
            lower = [place(x, y - b) for x, y, b in zip(line.x, line.y, line.band, strict=True)]
            marks.append(f'<polygon points="{joined(upper + lower[::-1])}" fill="{line.colour}" opacity=".18"/>')
        marks.append(f'<polyline points="{joined(points)}" fill="none" stroke="{line.colour}" stroke-width="2"/>')
        for (x, y), at, value in zip(points, line.x, line.y, strict=True) if line.dots else ():
            title = f"<title>{escape(line.label)}: {value:.2f} at {at:g} classes</title>"
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{line.colour}">{title}</circle>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(marks)}</svg>'


def joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def confusions(label: str, runs: Sequence[Run]) -> str:
    """Every step's matrix of a group; the last one is open."""
    length = min(len(run.curve) for run in runs)
    figures = []
    for step in range(length):
        matrix = np.sum([read_confusion(run, step) for run in runs], axis=0)
        top1 = seed_spread([run.curve[step] for run in runs])[0]
        figures.append(
            f'<figure><img alt="confusion matrix of step {step}" src="data:image/png;base64,{as_png(matrix)}">'
            f"<figcaption>step {step}: {len(matrix)} classes, top-1 {top1:.2f}</figcaption></figure>"
        )
    earlier = f"<details><summary>earlier steps</summary><div class=maps>{''.join(figures[:-1])}</div></details>"
    return f"<h3>{escape(label)}</h3><div class=maps>{figures[-1]}</div>{earlier if length > 1 else ''}"


def as_png(matrix: NDArray[np.int64]) -> str:
    """One pixel per cell, log(1 + images), viridis; base64."""
    from matplotlib import colormaps
    from PIL import Image

    shade = np.log1p(matrix) / max(1e-9, float(np.log1p(matrix.max())))
    pixels = (colormaps["viridis"](shade)[:, :, :3] * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def protocol(label: str, run: Run) -> str:
    """What was trained, step by step, on which classes, and how long it took."""
    described = json.loads((run.path / "protocol.json").read_text())
    effective: list[dict[str, Any]] = described.get("effective", [])
    names = described["class_names"]
    header = [key.replace("_", " ") for key in effective[0]] if effective else []
    lines = [[f"{v:.4g}" if isinstance(v, float) else f"{v:,}" for v in step.values()] for step in effective]
    classes = "".join(
        f"<li>step {k}: {escape(', '.join(names[c] for c in members))}</li>"
        for k, members in enumerate(described["steps"])
    )
    return (
        f"<h3>{escape(label)}</h3><p class=soft>{escape(run.dataset)}, class list "
        f"{escape(str(described.get('class_list_hash', '')))}</p>{table(header, lines)}"
        f"<details><summary>classes of each step</summary><ul>{classes}</ul></details>"
        f"<details><summary>effective recipe</summary><pre>{escape((run.path / 'recipe.yaml').read_text())}</pre>"
        f"</details>{timings(run)}"
    )


def timings(run: Run) -> str:
    """Seconds per step, versions and machine of a run, if they were written."""
    try:
        content = json.loads((run.path / "timings.json").read_text())
        steps = [
            [step, *(f"{v:,.1f}" if v is not None else "" for v in s.values())] for step, s in content["steps"].items()
        ]
        header = ["step", *(key.replace("_", " ") for key in next(iter(content["steps"].values())))]
        machine = ", ".join(f"{k} {v}" for part in ("versions", "machine") for k, v in content[part].items())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, StopIteration):
        return "<p class=soft>No timings.</p>"
    return (
        f"<details><summary>seconds, machine (seed {run.results['seed']})</summary>{table(header, steps)}"
        f"<p class=soft>{escape(machine)}</p></details>"
    )
