"""The report as one HTML page that needs no other file, no network and no script."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil.errors import UserError
from fastil.reporting.chart import WIDTH, Axis, Series, Style, chart, legend, log_axis
from fastil.reporting.rows import rows, seed_spread, spread
from fastil.reporting.run_files import read_timings
from fastil.reporting.runs import Run, alpha_paths, geometric_mean

COLOURS = ("#3b7fd0", "#d9701e", "#2a9a58", "#d1495b", "#8d63c8", "#93705c", "#cf5ba6", "#7d848d", "#8f9022", "#1f98a8")
DASHES = ("", "7 4", "2 3")  # of the lines beyond the tenth, and beyond the twentieth
CURVES = {"top1": "All classes seen", "top1_old": "Classes of earlier steps", "top1_new": "Classes of this step"}
VIRIDIS = "#440154, #3b528b, #21918c, #5ec962, #fde725"  # for the bar beside the matrices; they have all its shades

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --paper: #fff; --line: #d5d9de; --soft: #626a74; --tint: #f1f3f5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --paper: #16191d; --line: #3a4048; --soft: #9aa3ad; --tint: #22272d; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --line: #bbb; --soft: #444; --tint: #eee; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3, legend { font-size: 1rem; font-weight: 600; margin: 0; padding: 0; } h3.run { margin-top: 1.8rem; }
.soft { color: var(--soft); font-size: .9rem; margin: .3rem 0 .8rem; max-width: 50rem; }
.scroll { overflow-x: auto; margin: .5rem 0; } table { border-spacing: 0; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; } td { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } tbody th { font-weight: 400; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
.runs th:first-child { min-width: 9rem; max-width: 24rem; overflow-wrap: break-word; }
@media (max-width: 40rem) {
  .runs th:first-child { min-width: 8rem; max-width: 9rem; } th, td { padding: .25rem .4rem; } }
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem;
  align-items: end; }
.cells > * { min-width: 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 13px; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .step { stroke: var(--soft); stroke-dasharray: 2 3; }
svg .line { fill: none; stroke-width: 2; } svg .thin { fill: none; stroke-width: .7; }
svg .target { fill: none; stroke: transparent; stroke-width: 11; }
svg circle.target { fill: transparent; stroke: none; }
svg:has(.series:hover) .series:not(:hover) { opacity: .15; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; margin: .3rem 0 1rem; list-style: none;
  font-size: .9rem; }
.legend li { display: flex; gap: .4rem; } .legend svg { flex: none; width: 1.9rem; height: .7rem; margin-top: .4rem; }
fieldset { border: 0; margin: 0; padding: 0; max-width: 24rem; }
.steps { display: flex; flex-wrap: wrap; gap: .2rem; margin-top: .4rem; }
.steps input { position: absolute; opacity: 0; }
.steps label { min-width: 1.65rem; padding: .1rem .3rem; text-align: center; border: 1px solid var(--line);
  border-radius: 4px; background: var(--tint); cursor: pointer; font-size: .85rem; }
.steps input:checked + label { background: var(--ink); color: var(--paper); border-color: var(--ink); }
.steps input:focus-visible + label { outline: 2px solid #3b7fd0; outline-offset: 2px; }
figure { display: none; order: 1; width: 100%; margin: .3rem 0 0; }
.steps input:checked + label + figure { display: block; }
figcaption { font-size: .9rem; margin-bottom: .3rem; }
figure img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); display: block; }
.bar { display: inline-block; width: 5rem; height: .7rem; margin: 0 .4rem; background: linear-gradient(90deg, VIRIDIS);
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
details { margin: .4rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .8rem; background: var(--tint); padding: .6rem; border-radius: 4px; }
@media print { body { max-width: none; margin: 0; font-size: 12px; } .cells > *, tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .steps label { display: none; } .scroll { overflow: visible; }
  th, td { padding: .15rem .3rem; } th:first-child { position: static; } pre { white-space: pre-wrap; } }
""".replace("VIRIDIS", VIRIDIS)


def page(groups: dict[str, list[Run]], notes: Sequence[str]) -> str:
    """The whole document. groups: runs that differ in the seed only, by label; notes: lines of plain text below the
    table. Raises UserError for a damaged file."""
    parts_of_data = by_images(groups)
    styles = {
        label: Style(COLOURS[i % 10], DASHES[i // 10 % 3])
        for of_dataset in parts_of_data.values()
        for i, label in enumerate(of_dataset)
    }
    alphas = {label: {run.results.seed: alpha_paths(run) for run in runs} for label, runs in groups.items()}
    parts = [
        "<h1>fastil report</h1>",
        "<p class=soft>Top-1 in percent over all classes seen; mean ± standard deviation over seeds.</p>",
        table(*rows(groups)),
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Accuracy after each step</h2>",
        "<p class=soft>Mean over seeds, with a band of one standard deviation; point at a dot for its value, or open "
        "the table.</p>",
        *(accuracy(dataset, of_dataset, styles) for dataset, of_dataset in parts_of_data.items()),
        alpha_section(alphas, styles),
        "<h2>Confusion matrices</h2>",
        "<p class=soft>Images as log(1 + x), summed over seeds; rows are true classes, columns predictions, both in "
        "the order in which they were learned. The buttons choose the step.</p>",
        f"<div class=cells>{''.join(confusions(i, *group) for i, group in enumerate(groups.items()))}</div>",
        "<h2>Effective protocols</h2>",
        *(protocol(label, runs) for label, runs in groups.items()),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>fastil report</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are plain text; the first of a row is its heading."""
    labels = " class=runs" if any(len(line[0]) > 20 for line in lines) else ""
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in lines
    )
    return f"<div class=scroll><table{labels}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def by_images(groups: dict[str, list[Run]]) -> dict[str, dict[str, list[Run]]]:
    """The groups apart by what they were run on: accuracies on other images have no place in one chart."""
    found: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for label, runs in groups.items():
        found.setdefault(runs[0].image_hashes, {})[label] = runs
    names = [next(iter(part.values()))[0].dataset_name for part in found.values()]
    return {
        name if names.count(name) == 1 else f"{name} {images[0][:6]}, {images[1][:6]}": part
        for name, (images, part) in zip(names, found.items(), strict=True)
    }


def accuracy(dataset: str, groups: dict[str, list[Run]], styles: dict[str, Style]) -> str:
    """Charts and values of the runs on one data set."""
    seen = sorted({step.classes_seen for runs in groups.values() for run in runs for step in run.results.steps})
    charts, lines = [], []
    for key, title in CURVES.items():
        series, highest = [], 1.0
        for label, runs in groups.items():
            # zip: as far as the shortest run is.
            steps = list(zip(*(run.results.steps for run in runs), strict=False))
            values = {step[0].classes_seen: [getattr(result, key) for result in step] for step in steps}
            values = {classes: of_seeds for classes, of_seeds in values.items() if None not in of_seeds}
            lines.append([f"{label}: {title.lower()}", *(spread(values.get(classes, [])) for classes in seen)])
            if values:
                means, bands = zip(*map(seed_spread, values.values()), strict=True)
                highest = max(highest, *map(sum, zip(means, bands, strict=True)))
                titles = [f"{label}: {spread(v)} % at {classes} classes" for classes, v in values.items()]
                series.append(Series(styles[label], list(values), means, titles, bands))
        x = Axis("classes seen", (seen[0], seen[-1]), [(c, str(c)) for c in seen])
        top = min(100, 20 * math.ceil(highest / 20))
        y = Axis("top-1 (%)", (0, top), [(v, str(v)) for v in range(0, top + 1, 10 if top <= 60 else 20)])
        charts.append(f"<div><h3>{title}</h3>{chart(f'{title}: top-1 after each step', series, x, y)}</div>")
    values_table = table([f"Top-1 (%) at … classes of {dataset}", *map(str, seen)], lines)
    return (
        f"<h3 class=run>Data set {escape(dataset)}</h3>{legend({label: styles[label] for label in groups})}"
        f"<div class=cells>{''.join(charts)}</div><details><summary>Values as a table</summary>{values_table}</details>"
    )


def alpha_section(alphas: dict[str, dict[int, dict[int, NDArray[np.float64]]]], styles: dict[str, Style]) -> str:
    """A chart for each group that learned alpha, all on one scale. alphas: by label, seed and step."""
    learned = {label: {seed: path for seed, path in seeds.items() if path} for label, seeds in alphas.items()}
    learned = {label: seeds for label, seeds in learned.items() if seeds}
    if not learned:
        return ""
    everything = [values for seeds in learned.values() for path in seeds.values() for values in path.values()]
    y = log_axis("alpha", min(v.min() for v in everything), max(v.max() for v in everything))
    charts = (
        f"<div><h3>{escape(label)}</h3>{alpha_chart(label, seeds, styles[label], y)}</div>"
        for label, seeds in learned.items()
    )
    return (
        "<h2>Alpha</h2><p class=soft>Weight of the old classes in the Balanced Softmax (eq. 5) after each epoch of "
        "the incremental steps, on a logarithmic axis; a line per seed. Each step begins at 1. An alpha per class: "
        f"thin lines, and their geometric mean.</p><div class=cells>{''.join(charts)}</div>"
    )


def alpha_chart(label: str, seeds: dict[int, dict[int, NDArray[np.float64]]], style: Style, y: Axis) -> str:
    """Steps begin at the same epoch for every seed: where the longest path has them."""
    lengths: dict[int, int] = {}
    for path in seeds.values():
        lengths |= {step: max(len(values), lengths.get(step, 0)) for step, values in path.items()}
    begins, total = {}, 0
    for step, length in sorted(lengths.items()):
        begins[step] = total
        total += length
    series = []
    for seed, path in seeds.items():
        classes = max(values.shape[1] for values in path.values())
        xs: list[float] = []
        means: list[float | None] = []
        titles: list[str] = []
        thin: list[list[float | None]] = [[] for _ in range(classes if classes > 1 else 0)]
        for step, values in path.items():
            mean = geometric_mean(values)
            # Not more points than pixels; always the last one, and a break after it.
            kept = sorted({*range(0, len(values), max(1, total // WIDTH)), len(values) - 1})
            xs += [begins[step] + epoch + 1 for epoch in [*kept, len(values) - 1]]
            means += [*(math.log10(mean[epoch]) for epoch in kept), None]
            title = f"seed {seed}, step {step}, epoch {len(values)}: {mean[-1]:.3g}"
            titles += [*([""] * (len(kept) - 1)), title, ""]
            for c, line in enumerate(thin):
                known = c < values.shape[1]
                line += [*(math.log10(values[epoch, c]) if known else None for epoch in kept), None]
        series.append(Series(style, xs, means, titles, thin=thin))
    every = max(1, total // 6)
    nice = next(n * 10**e for e in range(9) for n in (1, 2, 5) if n * 10**e >= every)
    x = Axis("epoch of the incremental steps", (0, total), [(e, f"{e:g}") for e in range(0, total + 1, nice)])
    return chart(f"alpha of {label}", series, x, y, [(begin, f"step {step}") for step, begin in begins.items()])


def confusions(index: int, label: str, runs: Sequence[Run]) -> str:
    """The matrices of a group; a button per step shows one at a time, at first the last."""
    length = min(len(run.curve) for run in runs)
    figures = []
    for step in range(length):
        matrix = np.sum([run.confusion(step) for run in runs], axis=0)
        caption = f"step {step}: {len(matrix)} classes, top-1 {spread([run.curve[step] for run in runs])} %"
        figures.append(
            f'<input type=radio name="m{index}" id="m{index}-{step}"{" checked" if step == length - 1 else ""}>'
            f'<label for="m{index}-{step}">{step}</label><figure><figcaption>{caption}</figcaption>'
            f'<img alt="confusion matrix of step {step}" src="data:image/png;base64,{as_png(matrix)}">'
            f"<figcaption>0<span class=bar></span>{matrix.max():,} images</figcaption></figure>"
        )
    return f"<fieldset><legend>{escape(label)}</legend><div class=steps>{''.join(figures)}</div></fieldset>"


def as_png(matrix: NDArray[np.int64]) -> str:
    """One pixel per cell, log(1 + images), 256 shades of viridis from 0 to the largest cell; base64."""
    from matplotlib import colormaps
    from PIL import Image

    shades = np.log1p(matrix) / max(float(np.log1p(matrix.max())), 1e-9)
    image = Image.fromarray((shades * 255).round().astype(np.uint8))
    image.putpalette(colormaps["viridis"](np.arange(256), bytes=True)[:, :3].tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def protocol(label: str, runs: Sequence[Run]) -> str:
    """What was trained, step by step, on which classes, and how long it took."""
    described, seeds = runs[0].protocol, ", ".join(str(run.results.seed) for run in runs)
    effective, names = described.effective, described.class_names
    lines = [[shown(value) for value in step.values()] for step in effective]
    plan = table([key.replace("_", " ") for key in effective[0]], lines) if effective else ""
    classes = [", ".join(names[c] for c in members) for members in described.steps]
    listed = "".join(f"<li>step {k}: {escape(text)}</li>" for k, text in enumerate(classes))
    return (
        f"<h3 class=run>{escape(label)}</h3><p class=soft>{escape(runs[0].dataset_name)}, class list "
        f"{escape(described.class_list_hash)}, seeds {seeds}</p>{plan}"
        f"<details><summary>Classes of each step</summary><ul>{listed}</ul></details>"
        f"<details><summary>Effective recipe</summary><pre>{escape(runs[0].recipe.dump())}</pre></details>"
        f"{timings(runs)}"
    )


def timings(runs: Sequence[Run]) -> str:
    """Seconds per step, versions and machines, of the runs whose timings.json can be read."""
    header: list[str] = []
    lines: list[list[str]] = []
    notes: list[str] = []
    for run in runs:
        seed = str(run.results.seed)
        try:
            content = read_timings(run.path)
        except UserError:
            notes.append(f"seed {seed}: timings.json is missing or damaged")
            continue
        header = ["seed and step", *(key.replace("_", " ") for key in next(iter(content.steps.values())))]
        lines += [[f"{seed}, step {k}", *map(shown, step.values())] for k, step in content.steps.items()]
        notes.append(f"seed {seed}: " + ", ".join(f"{k} {v}" for k, v in (content.versions | content.machine).items()))
    body = (table(header, lines) if lines else "") + "".join(f"<p class=soft>{escape(note)}</p>" for note in notes)
    return f"<details><summary>Seconds per step, versions, machine</summary>{body}</details>"


def shown(value: Any) -> str:
    """A value of protocol.json or timings.json as text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)
