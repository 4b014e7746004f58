"""`fastil recipes`: what can be trained, as data sets and methods, and all keys of one recipe."""

import re

from fastil import settings
from fastil.recipe import Recipe
from fastil.recipe_file import (
    EFFECTIVE,
    file_names,
    load,
    names,
    protocols,
    published_elsewhere,
    read_effective,
    run_named,
)
from fastil.reporting.fidelity import SOURCES
from fastil.text import columns, one_line, paragraph

DATASETS = ("cifar100", "subimagenet", "imagenet")
STEPS = ("5", "10")
ORDER = (
    "icarl", "icarl_bce", "bic", "wa", "lucir", "mnemonics", "podnet", "tpcil", "il_baseline", "balanced", "meta",
    "lucir_balanced", "podnet_balanced", "finetune", "joint",
)  # fmt: skip


def catalogue() -> str:
    """Return the recipes with their published average incremental accuracy and how faithful they are, in the columns of
    a terminal."""
    recipes = {name: load(name) for name in file_names()}
    places = [f"{dataset}_{{}}_{steps}" for dataset in DATASETS for steps in STEPS]
    rows, named = [], []
    for method in ORDER:
        first = recipes[places[0].format(method)]
        numbers = (published(recipes.get(place.format(method))) for place in places)
        rows.append((method, *numbers, in_short(first)))
        what = first.description.rpartition(", ")[2]
        named += [] if what.lower() == method else [f"{method}: {what}"]
    header = ("METHOD", *(steps for _ in DATASETS for steps in STEPS), "fidelity")
    table = columns(header, rows, right=range(1, 7))
    of_table = re.compile(rf"({'|'.join(DATASETS)})_({'|'.join(ORDER)})_({'|'.join(STEPS)})")
    others = [name for name in recipes if not of_table.fullmatch(name)]
    return "\n\n".join((
        paragraph(
            f"DATASET_METHOD_STEPS, such as {places[0].format('lucir')}: Table 1 of the paper, average incremental "
            "accuracy in percent as published (`-`: not in the paper)"
        ) + f"\n{_above(table)}\n{table}",
        paragraph("; ".join(named)),
        from_scratch(),
        "Others:\n" + "\n".join(_about(recipes[name], max(map(len, others))) for name in others),
        paragraph(
            "`fastil recipes NAME` prints all keys of a recipe, and its fidelity in full; `fastil plan NAME` says what "
            "it would train"
        ),
    ))  # fmt: skip


def in_short(recipe: Recipe) -> str:
    """Return the first words of a recipe's fidelity."""
    return re.split("[;,]", recipe.fidelity)[0]


def _above(table: str) -> str:
    """The line above the header: each data set above its two columns."""
    line = ""
    for dataset, last in zip(DATASETS, re.finditer(f" {STEPS[-1]}", table.partition("\n")[0]), strict=True):
        line = line.ljust(last.end() - len("57.17  52.57")) + dataset
    return line


def _about(recipe: Recipe, width: int) -> str:
    """The lines of a recipe that is of no table. width: of its name."""
    return f"{recipe.name.ljust(width)}  {recipe.description}\n{' ' * width}  {in_short(recipe)}"


def from_scratch() -> str:
    """Return the protocols without a base of half the classes, and what others published of methods in them."""
    datasets = protocols()["datasets"]
    listed = [(name, protocol["what"]) for name, protocol in protocols()["protocols"].items()]
    places = [(dataset, name) for dataset in datasets for name, _ in listed]
    numbers = {
        method: [published_elsewhere(f"{dataset}_{method}_{name}") or "" for dataset, name in places]
        for method in ORDER
    }
    used = [i for i in range(len(places)) if any(of_method[i] for of_method in numbers.values())]
    header = ("METHOD", *(" ".join(places[i]) for i in used))
    rows = [(method, *(cells[i] for i in used)) for method, cells in numbers.items() if any(cells)]
    pattern = paragraph(
        f"DATASET_METHOD_PROTOCOL, such as cifar100_icarl_b0_10: from scratch, with any METHOD above, on "
        f"{' and '.join(datasets)}; {' and '.join(protocols()['without_memory'])} have no _r20"
    )
    elsewhere = paragraph(f"Published elsewhere, with other networks and schedules ({SOURCES}):")
    return f"{pattern}\n{columns(('PROTOCOL', 'what'), listed)}\n\n{elsewhere}\n{columns(header, rows)}"


def published(recipe: Recipe | None) -> str:
    """Return the published number of a recipe as a cell; nothing where there is no such recipe."""
    if recipe is None:
        return ""
    return "-" if recipe.published is None else f"{recipe.published:.2f}"


def all_keys(name: str) -> str:
    """Return all keys of a recipe, those of its parents and the defaults included, as a recipe file that trains the
    same. Keys that nothing reads with the others as they are stand at the end, with what would make them read.

    name: as `load` takes it. The method of a run directory need not be there. The published number and the fidelity are
    comments, as they belong to the recipe and not to a file that is made of it. Raises UserError as `load` does.
    """
    run = run_named(name)
    recipe = load(name) if run is None else read_effective(run / EFFECTIVE)
    number = "none" if recipe.published is None else f"{recipe.published:.2f} average incremental accuracy, percent"
    fidelity = f"# fidelity: {one_line(recipe.fidelity)}\n" if name in names() else ""
    keys = recipe.keys()
    readers = {key: recipe.reader(key) for key in keys}
    unread = "".join(
        _with_remark(settings.dump({key: keys[key]}), f"with {reader}") for key, reader in readers.items() if reader
    )
    return "".join((
        f"# fastil run {name}\n# published: {number}\n{fidelity}",
        settings.dump({"description": recipe.description}),
        settings.dump({key: value for key, value in keys.items() if not readers[key]}),
        f"# Unused, unless the setting in the comment is made.\n{unread}" if unread else "",
    )).rstrip("\n")  # fmt: skip


def _with_remark(lines: str, remark: str) -> str:
    """The YAML of one key, with a comment in its first line."""
    first, _, rest = lines.partition("\n")
    return f"{first}  # {remark}\n{rest}"
