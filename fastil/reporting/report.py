"""`fastil report`: runs side by side, compared with the published numbers."""

from collections.abc import Sequence
from pathlib import Path

from fastil.errors import UserError
from fastil.reporting.fidelity import MODIFIED
from fastil.reporting.figures import draw_accuracy, draw_last_confusions, draw_triangles
from fastil.reporting.heatmaps import triangle_of
from fastil.reporting.html import page
from fastil.reporting.rows import MEASURED, heading, measured, paired_gain, rows
from fastil.reporting.runs import Run, alpha_paths, group_runs
from fastil.text import format_table, plain

LONGEST = 80  # characters of a label in tables and figures
IMAGES = (
    "images=...: the data set, and the first six digits of the sha256 of its training images; runs with other digits "
    "were trained on other images."
)
AGAIN = "write the report again, or choose another --out"  # once a file can be written


def write_report(paths: Sequence[Path], out: Path | None, as_html: bool) -> tuple[str, bool]:
    """The text of the report, and whether all runs could be read; those that could not are left out and named. With
    `out`, also report.md, the figures and, as_html, one self-contained page there (default folder: report)."""
    out = Path("report") if as_html and out is None else out
    found: list[Run] = []
    errors, left_out, whole = [], [], True
    for path in paths:
        begun = (path / "recipe.yaml").exists() and not (path / "results.json").exists()
        try:
            found.append(read_whole(path, figures=out is not None, page=as_html))
        except UserError as error:
            errors.append(error)
            left_out.append(f"{path}: no results yet, left out" if begun else f"left out: {error}")
            whole = whole and begun
    if not found:
        raise errors[0]
    runs, twice = distinct(found)
    groups, cut = shortened(group_runs(runs))
    explained = [IMAGES] if any("images=" in text for text in [*groups, *cut]) else []
    header, measures, unmeasured = measured(groups)
    notes = [*cut, *explained, *paired_gain(groups), *unmeasured, *twice, *left_out]
    forgotten = [MEASURED, format_table(header, measures)] if measures else []
    text = plain("\n\n".join([heading(groups), format_table(*rows(groups)), *forgotten, *notes]))
    if out is None:
        return text, whole
    document = page(groups, notes) if as_html else ""
    triangles = {label: triangle for label, runs in groups.items() if (triangle := triangle_of(runs))}
    figures = ["accuracy.png", "confusion.png", *(["groups.png"] if triangles else [])]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(text + "\n", encoding="utf-8")
        draw_accuracy(groups, out / "accuracy.png", AGAIN, cut)
        draw_last_confusions(groups, out / "confusion.png", AGAIN, cut)
        if triangles:
            draw_triangles(triangles, out / "groups.png", AGAIN, cut)
        if document:
            (out / "report.html").write_text(document, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    html = f"\npage: {out}/report.html" if as_html else ""
    text += f"\n\nfigures: {', '.join(f'{out}/{name}' for name in figures)}{html}"
    return text, whole


def read_whole(path: Path, figures: bool, page: bool) -> Run:
    """A run, with all that figures and a page show of it read once, so that a run with a damaged file can be left out
    of them."""
    run = Run(path)
    for step in run.results.steps if figures else ():
        run.confusion(step.step)
    if page:  # which says so itself where the timings are damaged
        alpha_paths(run)
    return run


def distinct(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Each run once, and a line for each that is left out: a directory that is given twice, or a copy of another."""
    kept: list[Run] = []
    lines: list[str] = []
    for run in runs:
        same = next((other for other in kept if _same(run, other)), None)
        if same is None:
            kept.append(run)
        else:
            what = "given twice" if run.path.samefile(same.path) else f"the same run as {same.path}"
            lines.append(f"{run.path}: {what}, used once")
    return kept, lines


def _same(a: Run, b: Run) -> bool:
    return a.path.samefile(b.path) or (
        (a.image_hashes, a.results) == (b.image_hashes, b.results) and a.recipe.identity() == b.recipe.identity()
    )


def shortened(groups: dict[str, list[Run]]) -> tuple[dict[str, list[Run]], list[str]]:
    """The groups under labels that are not too long for a table, and a line with the whole label of each that was."""
    short: dict[str, list[Run]] = {}
    lines: list[str] = []
    for label, runs in groups.items():
        if len(label) > LONGEST:
            lines.append(f"[{len(lines) + 1}] {label}")
            parts = label.split(", ")
            while len(parts) > 2 and len(", ".join(parts)) > LONGEST:
                parts.pop()
            kept = ", ".join(parts)  # method and loss at least
            if MODIFIED in label and MODIFIED not in kept:
                kept += f", {MODIFIED.rstrip()}"
            label = f"{kept}, … [{len(lines)}]"
        short[label] = runs
    return short, lines
