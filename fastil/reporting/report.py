"""Tables and figures from run directories, beside the published numbers."""

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil import files
from fastil.errors import UserError
from fastil.fidelity import MODIFIED, had_published, labelled
from fastil.recipe import Recipe, load, read_effective
from fastil.training.step_plan import format_table

HEADER = ("run", "seeds", "average incremental", "paper", "base", "final", "final old", "final new")


@dataclass(frozen=True)
class Run:
    """A run directory with at least one finished step."""

    path: Path
    recipe: Recipe  # with a published number only if that may stand beside the run: see fastil.fidelity
    results: dict[str, Any]  # results.json
    protocol: dict[str, Any]  # protocol.json

    @property
    def curve(self) -> list[float]:
        """Top-1 over all classes seen after each finished step, percent."""
        return [step["top1"] for step in self.results["steps"]]

    @property
    def total_steps(self) -> int:
        return len(self.protocol["steps"])

    @property
    def dataset(self) -> str:
        return str(self.protocol["dataset"]["name"])

    @property
    def images(self) -> tuple[str, ...]:
        """Hashes of the training and the test images."""
        return tuple(self.protocol["dataset"][split]["sha256"] for split in ("train", "val"))


def read_run(path: Path) -> Run:
    """A run directory; an error says what is missing."""
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    recipe = read_effective(path / "recipe.yaml")
    try:
        results = json.loads((path / "results.json").read_text())
        protocol = json.loads((path / "protocol.json").read_text())
        run = Run(path, labelled(recipe, protocol), results, protocol)
        # Everything that a report reads without looking.
        _ = run.curve[0], run.images[0][:6], run.dataset, results["seed"], results["loss"]
        _ = f"{results['average_incremental_accuracy']:.2f}"
        for step in results["steps"]:
            _ = [f"{step[key] or 0:.2f}" for key in ("step", "classes_seen", "top1", "top1_old", "top1_new")]
        _ = [run.protocol["class_names"][c] for classes in run.protocol["steps"] for c in classes]
        _ = [first for first, *_ in map(dict.values, run.protocol.get("effective", []))]
    except FileNotFoundError:
        raise UserError(f"{path}: no results yet; let the run finish a step (--resume goes on)") from None
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); mend that or leave the run out"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: results.json or protocol.json is damaged; run again with --resume") from None
    return run


def read_confusion(run: Run, step: int) -> NDArray[np.int64]:
    """The matrix of one step of a run: int64 [seen, seen], rows are true classes in incremental order."""
    path = run.path / f"confusion/step_{step}.npy"
    try:
        matrix: NDArray[np.int64] = np.load(path)
        whole = matrix.shape == (run.results["steps"][step]["classes_seen"],) * 2 and matrix.dtype == np.int64
    except (OSError, EOFError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path}: missing or damaged; run again in a new --out")
    return matrix


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, under a label that says what sets the group apart: all that was
    modified, if a number was published for the recipe, and otherwise, of the keys in which runs of a recipe differ,
    those that are not as the recipe has them."""
    groups: dict[str, list[Run]] = {}
    identities = [run.recipe.identity(seed=False) | {"images": f"{run.dataset} {run.images[0][:6]}"} for run in runs]
    for run, identity in zip(runs, identities, strict=True):
        same_recipe = [i for i, other in zip(identities, runs, strict=True) if other.recipe.name == run.recipe.name]
        usual = _shipped(run.recipe.name)
        differing = [
            key
            for key, value in identity.items()
            if key != "loss"
            and value is not None
            and any(i[key] != value for i in same_recipe)
            and (key not in usual or usual[key] != value)
        ]
        parts = [run.recipe.name, run.results["loss"]]
        if run.recipe.fidelity.startswith(MODIFIED) and had_published(run.recipe):
            parts.append(run.recipe.fidelity)
            differing = [key for key in differing if key not in (run.recipe.differences() or {})]
        label = ", ".join([*parts, *(f"{key}={identity[key]}" for key in differing)])
        group = groups.setdefault(label, [])
        twin = next((other for other in group if other.results["seed"] == run.results["seed"]), None)
        if twin is not None:
            raise UserError(
                f"{run.path}: the same run as {twin.path} (same settings, images and seed); give one of them"
            )
        group.append(run)
    return groups


def _shipped(name: str) -> dict[str, Any]:
    """The keys of a recipe that comes with fastil; none of another."""
    try:
        return load(name).keys()
    except UserError:
        return {}


def rows(groups: dict[str, list[Run]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and a row per group; mean and, over several seeds, the sample standard deviation. Percent."""
    lines: list[tuple[str, ...]] = []
    for label, runs in groups.items():
        last = [run.results["steps"][-1] for run in runs]
        unfinished = [run for run in runs if len(run.curve) < run.total_steps]
        published = runs[0].recipe.published
        lines.append(
            (
                label + (f" (unfinished: {len(unfinished)})" if unfinished else ""),
                str(len(runs)),
                spread([run.results["average_incremental_accuracy"] for run in runs]),
                "" if published is None else f"{published:.2f}",
                spread([run.curve[0] for run in runs]),
                spread([step["top1"] for step in last]),
                spread([step["top1_old"] for step in last]),
                spread([step["top1_new"] for step in last]),
            )
        )
    return HEADER, lines


def paired_gain(groups: dict[str, list[Run]]) -> list[str]:
    """What the Balanced Softmax adds to the softmax where both ran with the same seeds and settings otherwise."""
    lines = []
    for label, balanced in groups.items():
        for other, softmax in groups.items():
            if not _differ_in_loss_only(balanced[0], softmax[0]):
                continue
            by_seed = {run.results["seed"]: run for run in softmax}
            gains = [
                run.results["average_incremental_accuracy"]
                - by_seed[run.results["seed"]].results["average_incremental_accuracy"]
                for run in balanced
                if run.results["seed"] in by_seed
            ]
            if gains:
                lines.append(f"{label} minus {other}: {spread(gains, sign=True)} points on average, paired over seeds")
    return lines


def _differ_in_loss_only(balanced: Run, softmax: Run) -> bool:
    a, b = balanced.recipe.identity(seed=False), softmax.recipe.identity(seed=False)
    return (
        balanced.images == softmax.images
        and (a["loss"], b["loss"]) == ("balanced", "softmax")
        and all(a[key] == b[key] for key in a if key != "loss")
    )


def alpha_paths(run: Run) -> dict[int, NDArray[np.float64]]:
    """Alpha (eq. 5) of the incremental steps of a run that learned it, by step: [epochs, 1], or [epochs, old classes]
    with an alpha per class. Empty for other runs. A last line that is being written is left out."""
    path = run.path / "metrics.jsonl"
    found: dict[int, list[NDArray[np.float64]]] = {}
    try:
        for line in path.read_text().splitlines(keepends=True):
            record = json.loads(line) if line.endswith("\n") else {}
            if "alpha" in record and record["phase"] == "train":
                found.setdefault(int(record["step"]), []).append(np.atleast_1d(np.array(record["alpha"], dtype=float)))
        steps = {step: np.stack(alphas) for step, alphas in sorted(found.items())}
        if not all(
            alphas.ndim == 2 and alphas.size and (alphas > 0).all() and np.isfinite(alphas).all()
            for alphas in steps.values()
        ):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path}: damaged; repeat the run in a new --out, or leave it out of the report") from None
    return steps


def geometric_mean(alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the classes: [epochs, classes] to [epochs]."""
    mean: NDArray[np.float64] = np.exp(np.log(alphas).mean(axis=1))
    return mean


def seed_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float | None], sign: bool = False) -> str:
    """Mean, with the sample standard deviation where there is more than one value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):{'+' if sign else ''}.2f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.2f}"


def write_report(paths: Sequence[Path], out: Path | None, as_html: bool) -> str:
    """The text of the report; with `out`, also report.md, the figures and, as_html, one self-contained page there
    (default folder: report)."""
    out = Path("report") if as_html and out is None else out
    started = [path for path in paths if not (path / "recipe.yaml").exists() or (path / "results.json").exists()]
    skipped = [f"{path}: no results yet, left out" for path in paths if path not in started] if started else []
    groups = group_runs([read_run(path) for path in started or paths])
    notes = [*paired_gain(groups), *skipped]
    text = "\n\n".join(
        [
            "Top-1 in percent over all classes seen; mean ± standard deviation over seeds.",
            format_table(*rows(groups)),
            *notes,
        ]
    )
    if out is None:
        return text
    document = ""
    if as_html:
        from fastil.reporting.html import page

        document = page(groups, notes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A name that is no valid text, as a folder's can be, must not keep the report from being written.
        (out / "report.md").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        draw_accuracy(groups, out / "accuracy.png")
        draw_last_confusions(groups, out / "confusion.png")
        if document:
            (out / "report.html").write_text(document, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    html = f"\npage: {out}/report.html" if as_html else ""
    return text + f"\n\nfigures: {out}/accuracy.png, {out}/confusion.png{html}"


def draw_run(path: Path) -> None:
    """The figures of one run directory: accuracy.png, confusion_step_K.png and, where alpha was learned, alpha.png."""
    run = read_run(path)
    groups = {f"{run.recipe.name}, {run.results['loss']}": [run]}
    draw_accuracy(groups, path / "figures/accuracy.png")
    for step in run.results["steps"]:
        matrix = read_confusion(run, step["step"])
        title = f"{run.recipe.name}, {run.results['loss']}, step {step['step']}: top-1 {step['top1']:.2f} %"
        draw_confusions([(title, matrix)], path / f"figures/confusion_step_{step['step']}.png")
    alphas = alpha_paths(run)
    if alphas:
        draw_alpha(alphas, path / "figures/alpha.png")


def draw_accuracy(groups: dict[str, list[Run]], path: Path) -> None:
    """Top-1 over the classes seen, mean over seeds, with a band of one standard deviation."""
    figure, axes = new_figure(1)
    for i, (label, runs) in enumerate(groups.items()):
        length = min(len(run.curve) for run in runs)
        curves = np.array([run.curve[:length] for run in runs])
        classes = [step["classes_seen"] for step in runs[0].results["steps"][:length]]
        mean = curves.mean(axis=0)
        shown = textwrap.fill(f"{label} ({curves.mean():.1f})", 60)  # all that was modified can be long
        (line,) = axes[0].plot(classes, mean, marker="o", linestyle=("-", "--", ":")[i // 10 % 3], label=shown)
        if len(runs) > 1:
            deviation = curves.std(axis=0, ddof=1)
            axes[0].fill_between(classes, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())
    axes[0].set_xticks(
        sorted({step["classes_seen"] for group in groups.values() for step in group[0].results["steps"]})
    )
    axes[0].set(xlabel="classes seen", ylabel="top-1 accuracy (%)", ylim=(0, 100))
    axes[0].grid(alpha=0.3)
    place, where = axes[0], "best"
    if len(groups) > 5:  # would hide the curves
        figure.set_size_inches(11, 4.8)
        place, where = figure, "outside right upper"
    place.legend(loc=where, title="average incremental accuracy in brackets", fontsize="small", title_fontsize="small")
    save_figure(figure, path)


def draw_alpha(steps: dict[int, NDArray[np.float64]], path: Path) -> None:
    """Alpha after each epoch of the incremental steps, as alpha_paths has it; a dotted line where a step begins. With
    an alpha per class, thin lines and their geometric mean."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = new_figure(1)
    begin = 0
    for step, alphas in steps.items():
        epochs = range(begin + 1, begin + len(alphas) + 1)
        if alphas.shape[1] > 1:
            axes[0].plot(epochs, alphas, color="tab:blue", linewidth=0.5, alpha=0.4)
        axes[0].plot(epochs, geometric_mean(alphas), color="tab:blue", linewidth=2)
        axes[0].axvline(begin + 0.5, color="grey", linestyle=":")
        axes[0].text(begin + 1, 1.01, f"step {step}", transform=axes[0].get_xaxis_transform(), fontsize="small")
        begin += len(alphas)
    several = ": per class, and their geometric mean" if any(a.shape[1] > 1 for a in steps.values()) else ""
    axes[0].set(xlabel="epoch of the incremental steps", ylabel=f"alpha{several}", yscale="log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].grid(alpha=0.3)
    save_figure(figure, path)


def draw_last_confusions(groups: dict[str, list[Run]], path: Path) -> None:
    """The last confusion matrix of each group, summed over its seeds, side by side."""
    panels = []
    for label, runs in groups.items():
        last = min(len(run.curve) for run in runs) - 1
        panels.append((label, np.sum([read_confusion(run, last) for run in runs], axis=0)))
    draw_confusions(panels, path)


def draw_confusions(panels: Sequence[tuple[str, NDArray[np.int64]]], path: Path) -> None:
    """Confusion matrices as log(1 + x), "for better visibility" (Figure 2), classes in incremental order."""
    figure, axes = new_figure(len(panels))
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        image = axis.imshow(np.log1p(matrix), cmap="viridis")
        axis.set(title=textwrap.fill(title, 48), xlabel="predicted class", ylabel="true class")
        axis.title.set_fontsize("small")
        figure.colorbar(image, ax=axis, shrink=0.8, label="log(1 + images)")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    files.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure of panels, four to a row, and its axes, outside pyplot's registry, so that nothing has to be closed and
    no display is asked for."""
    from matplotlib.figure import Figure

    across, rows = min(panels, 4), -(-panels // 4)
    figure = Figure(figsize=(6.4 * across, 4.8 * rows), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]
