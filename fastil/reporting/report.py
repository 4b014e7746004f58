"""`fastil report`: runs side by side, compared with the published numbers."""

from collections.abc import Sequence
from pathlib import Path

from fastil.errors import UserError
from fastil.reporting.figures import draw_accuracy, draw_last_confusions
from fastil.reporting.html import page
from fastil.reporting.rows import paired_gain, rows
from fastil.reporting.runs import Run, group_runs
from fastil.text import format_table, plain


def write_report(paths: Sequence[Path], out: Path | None, as_html: bool) -> str:
    """The text of the report; with `out`, also report.md, the figures and, as_html, one self-contained page there
    (default folder: report)."""
    out = Path("report") if as_html and out is None else out
    started = [path for path in paths if not (path / "recipe.yaml").exists() or (path / "results.json").exists()]
    skipped = [f"{path}: no results yet, left out" for path in paths if path not in started] if started else []
    groups = group_runs([Run(path) for path in started or paths])
    notes = [*paired_gain(groups), *skipped]
    text = plain(
        "\n\n".join(
            [
                "Top-1 in percent over all classes seen; mean ± standard deviation over seeds.",
                format_table(*rows(groups)),
                *notes,
            ]
        )
    )
    if out is None:
        return text
    document = ""
    if as_html:
        document = page(groups, notes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(text + "\n", encoding="utf-8")
        draw_accuracy(groups, out / "accuracy.png")
        draw_last_confusions(groups, out / "confusion.png")
        if document:
            (out / "report.html").write_text(document, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    html = f"\npage: {out}/report.html" if as_html else ""
    return text + f"\n\nfigures: {out}/accuracy.png, {out}/confusion.png{html}"
