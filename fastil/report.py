"""Tables and figures from run directories, beside the published numbers."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastil import checkpoint
from fastil.errors import UserError
from fastil.recipe import Recipe, read_effective
from fastil.summary import format_table

HEADER = ("run", "seeds", "average incremental", "paper", "base", "final", "final old", "final new")


@dataclass(frozen=True)
class Run:
    """One finished run directory."""

    path: Path
    recipe: Recipe
    results: dict[str, Any]
    total_steps: int
    dataset: str
    images: tuple[str, ...]  # hashes of what it was run on

    @property
    def curve(self) -> list[float]:
        return [step["top1"] for step in self.results["steps"]]


def read_run(path: Path) -> Run:
    """A run directory; an error says what is missing."""
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    recipe = read_effective(path / "recipe.yaml")
    try:
        results = json.loads((path / "results.json").read_text())
        protocol = json.loads((path / "protocol.json").read_text())
        dataset = protocol["dataset"]
        images = tuple(dataset[split]["sha256"] for split in ("train", "val"))
        run = Run(path, recipe, results, len(protocol["steps"]), dataset["name"], images)
        _ = run.curve[0], results["seed"], results["loss"], results["average_incremental_accuracy"]
    except FileNotFoundError:
        raise UserError(f"{path}: no results yet; let the run finish a step (--resume goes on)") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path}: results.json or protocol.json is damaged; run again with --resume") from None
    return run


def read_confusion(run: Run, step: int) -> NDArray[np.int64]:
    """The matrix of one step of a run."""
    path = run.path / f"confusion/step_{step}.npy"
    try:
        matrix: NDArray[np.int64] = np.load(path)
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or damaged; run again in a new --out") from None
    return matrix


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, under a label that says what sets the group apart."""
    groups: dict[str, list[Run]] = {}
    identities = [run.recipe.identity(seed=False) | {"images": f"{run.dataset} {run.images[0][:6]}"} for run in runs]
    for run, identity in zip(runs, identities, strict=True):
        same_recipe = [i for i, other in zip(identities, runs, strict=True) if other.recipe.name == run.recipe.name]
        differing = [key for key in identity if key != "loss" and any(i[key] != identity[key] for i in same_recipe)]
        label = ", ".join([run.recipe.name, run.results["loss"], *(f"{key}={identity[key]}" for key in differing)])
        group = groups.setdefault(label, [])
        twin = next((other for other in group if other.results["seed"] == run.results["seed"]), None)
        if twin is not None:
            raise UserError(
                f"{run.path}: the same run as {twin.path} (same settings, images and seed); give one of them"
            )
        group.append(run)
    return groups


def rows(groups: dict[str, list[Run]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and a row per group; mean and, over several seeds, the sample standard deviation. Percent."""
    lines: list[tuple[str, ...]] = []
    for label, runs in groups.items():
        last = [run.results["steps"][-1] for run in runs]
        unfinished = [run for run in runs if len(run.curve) < run.total_steps]
        published = runs[0].recipe.published if runs[0].recipe.as_shipped() else None
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


def alpha_paths(run: Run) -> list[tuple[int, float]]:
    """Step and alpha of each epoch of a run that learned alpha; of an alpha per class the geometric mean."""
    try:
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        found = [(line["step"], line["alpha"]) for line in lines if "alpha" in line]
        each = [(step, alpha if isinstance(alpha, list) else [alpha]) for step, alpha in found]
        return [(step, math.exp(statistics.mean(map(math.log, alphas)))) for step, alphas in each]
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{run.path}/metrics.jsonl: damaged; run again with --resume") from None


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
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(text + "\n")
        draw_accuracy(groups, out / "accuracy.png")
        draw_last_confusions(groups, out / "confusion.png")
        if as_html:
            from fastil.page import page

            (out / "report.html").write_text(page(groups, notes))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    html = f"\npage: {out}/report.html" if as_html else ""
    return text + f"\n\nfigures: {out}/accuracy.png, {out}/confusion.png{html}"


def draw_run(path: Path) -> None:
    """The figures of one run directory: accuracy.png and confusion_step_K.png."""
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
    for label, runs in groups.items():
        length = min(len(run.curve) for run in runs)
        curves = np.array([run.curve[:length] for run in runs])
        classes = [step["classes_seen"] for step in runs[0].results["steps"][:length]]
        mean = curves.mean(axis=0)
        (line,) = axes[0].plot(classes, mean, marker="o", label=f"{label} ({curves.mean():.1f})")
        if len(runs) > 1:
            deviation = curves.std(axis=0, ddof=1)
            axes[0].fill_between(classes, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())
    axes[0].set_xticks(
        sorted({step["classes_seen"] for group in groups.values() for step in group[0].results["steps"]})
    )
    axes[0].set(xlabel="classes seen", ylabel="top-1 accuracy (%)", ylim=(0, 100))
    axes[0].grid(alpha=0.3)
    axes[0].legend(title="average incremental accuracy in brackets", fontsize="small", title_fontsize="small")
    save_figure(figure, path)


def draw_alpha(alphas: Sequence[tuple[int, float]], path: Path) -> None:
    """Alpha (eq. 5) after each epoch of the incremental steps; dotted lines where a step begins."""
    figure, axes = new_figure(1)
    axes[0].plot(range(1, len(alphas) + 1), [alpha for _, alpha in alphas])
    for epoch, (step, _) in enumerate(alphas):
        if epoch and step != alphas[epoch - 1][0]:
            axes[0].axvline(epoch + 0.5, color="grey", linestyle=":")
    axes[0].set(xlabel="epoch of the incremental steps", ylabel="alpha", yscale="log")
    axes[0].grid(alpha=0.3, which="both")
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
        axis.set(title=title, xlabel="predicted class", ylabel="true class")
        axis.title.set_fontsize("small")
        figure.colorbar(image, ax=axis, shrink=0.8, label="log(1 + images)")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    checkpoint.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure outside pyplot's registry, so that nothing has to be closed and no display is asked for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * panels, 4.8), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]
