"""The rows of a report: a line per group of runs, and what one loss gains over another."""

import statistics
from collections.abc import Collection, Iterable, Sequence

from fastil.errors import UserError
from fastil.recipe_file import differences
from fastil.reporting.measures import Measures
from fastil.reporting.runs import Run
from fastil.text import one_line

HEADER = ("run", "seeds", "average incremental", "paper", "base", "final", "final old", "final new")


def heading(groups: dict[str, list[Run]]) -> str:
    """What the numbers of a report are, and of which recipes."""
    recipes = list(dict.fromkeys(one_line(run.recipe.name) for runs in groups.values() for run in runs))
    precisions = sorted({run.recipe.precision for runs in groups.values() for run in runs})
    return (
        f"Recipe{'s' if len(recipes) > 1 else ''} {', '.join(recipes)}{changed_in_all(groups)}. "
        f"Top-1 in percent over all classes seen; {deviation(groups.values())}. "
        f"All runs were trained in {' and '.join(precisions)}."
    )


def changed_in_all(groups: dict[str, list[Run]]) -> str:
    """The settings that all runs have and no recipe of theirs has, which no label names."""
    changed = [differences(run.recipe) or {} for runs in groups.values() for run in runs]
    same = [
        key for key in changed[0] if key not in SAID and all(key in c and c[key] == changed[0][key] for c in changed)
    ]
    unnamed = [f"{key}={changed[0][key]}" for key in same if not any(f"{key}=" in label for label in groups)]
    return one_line(f" with {', '.join(unnamed)}") if unnamed else ""


def deviation(groups: Iterable[Collection[Run]]) -> str:
    """What the numbers are over the seeds of each row."""
    most = max(map(len, groups), default=0)
    return "one seed each, so no deviation" if most == 1 else "mean ± standard deviation over seeds"


def rows(groups: dict[str, list[Run]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and a row per group; mean and, over several seeds, the sample standard deviation. Percent."""
    lines: list[tuple[str, ...]] = []
    for label, runs in groups.items():
        last = [run.results.steps[-1] for run in runs]
        unfinished = [run for run in runs if not run.finished]
        published = None if unfinished else runs[0].recipe.published  # which is over all steps
        lines.append(
            (
                label + (f" (unfinished: {len(unfinished)})" if unfinished else ""),
                str(len(runs)),
                spread([run.results.average_incremental_accuracy for run in runs]),
                "" if published is None else f"{published:.2f}",
                spread([run.curve[0] for run in runs]),
                spread([step.top1 for step in last]),
                spread([step.top1_old for step in last]),
                spread([step.top1_new for step in last]),
            )
        )
    return HEADER, lines


MEASURED = (
    "What was kept and forgotten after the last step, by group of classes that came together; percent, and points "
    "between two percentages (docs/measures.md)."
)
SAID = ("method", "loss", "precision", "seed")  # elsewhere in a report
MEASURES = ("run", "average over groups", "classes after the base step", "forgetting", "backward transfer")


def readable_measures(runs: Iterable[Run]) -> tuple[list[Measures], list[str]]:
    """The measures of the runs whose predictions can be read, and a line for each other one."""
    found: list[Measures] = []
    left_out: list[str] = []
    for run in runs:
        try:
            found.append(run.measures)
        except UserError as error:
            left_out.append(f"measures of {error}")
    return found, left_out


def measured(groups: dict[str, list[Run]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]:
    """Header and a row per group of what its runs forgot, after the last step; and a line for each run whose
    predictions cannot be read, which is left out."""
    lines: list[tuple[str, ...]] = []
    left_out: list[str] = []
    for label, runs in groups.items():
        found, unreadable = readable_measures(runs)
        left_out += unreadable
        if any(len(measures.groups) > 1 for measures in found):
            columns = ("average_over_groups", "non_base", "forgetting", "backward_transfer")
            lines.append((label, *(spread([getattr(measures, key)[-1] for measures in found]) for key in columns)))
    return MEASURES, lines, left_out


def paired_gain(groups: dict[str, list[Run]]) -> list[str]:
    """What the Balanced Softmax adds to the softmax where both ran with the same seeds and settings otherwise."""
    lines = []
    for label, balanced in groups.items():
        for other, softmax in groups.items():
            if not _differ_in_loss_only(balanced[0], softmax[0]):
                continue
            by_seed = {run.results.seed: run for run in softmax}
            gains = [
                run.results.average_incremental_accuracy
                - by_seed[run.results.seed].results.average_incremental_accuracy
                for run in balanced
                if run.results.seed in by_seed
            ]
            if gains:
                over = (
                    "on average, paired over seeds" if len(gains) > 1 else "with the same seed (one seed, no deviation)"
                )
                lines.append(f"{label} minus {other}: {spread(gains, sign=True)} points {over}")
    return lines


def _differ_in_loss_only(balanced: Run, softmax: Run) -> bool:
    a, b = balanced.recipe.identity(seed=False), softmax.recipe.identity(seed=False)
    return (
        balanced.image_hashes == softmax.image_hashes
        and (a["loss"], b["loss"]) == ("balanced", "softmax")
        and all(a.get(key) == b.get(key) for key in a | b if key != "loss")
    )


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
