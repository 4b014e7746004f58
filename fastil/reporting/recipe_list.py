"""`fastil recipes`: Table 1 of the paper as recipes, and the others."""

import re

from fastil.recipe import Recipe
from fastil.recipe_file import file_names, load, protocols, published_elsewhere
from fastil.reporting.fidelity import SOURCES
from fastil.text import format_table

DATASETS = ("cifar100", "subimagenet", "imagenet")
STEPS = ("5", "10")
ORDER = (
    "icarl", "icarl_bce", "bic", "wa", "lucir", "mnemonics", "podnet", "tpcil", "il_baseline", "balanced", "meta",
    "lucir_balanced", "podnet_balanced", "finetune", "joint",
)  # fmt: skip


def catalogue() -> str:
    """Every recipe, its published average incremental accuracy and how faithful it is."""
    recipes = {name: load(name) for name in file_names()}
    columns = [f"{dataset}_{{}}_{steps}" for dataset in DATASETS for steps in STEPS]
    header = ("METHOD", "what", *(f"{dataset} {steps}" for dataset in DATASETS for steps in STEPS), "fidelity")
    rows = []
    for method in ORDER:
        first = recipes[columns[0].format(method)]
        known = (published(recipes.get(column.format(method))) for column in columns)
        rows.append((method, first.description.rpartition(", ")[2], *known, first.fidelity))
    of_table = re.compile(rf"({'|'.join(DATASETS)})_({'|'.join(ORDER)})_({'|'.join(STEPS)})")
    others = [(r.name, r.description, r.fidelity) for name, r in recipes.items() if not of_table.fullmatch(name)]
    return (
        "Table 1 of the paper, average incremental accuracy in percent as published; a recipe is called "
        f"DATASET_METHOD_STEPS, such as {columns[0].format('lucir')}; `-` is a recipe without a published number:\n\n"
        f"{format_table(header, rows)}\n\n{from_scratch()}\n\n"
        f"Others:\n\n{format_table(('recipe', 'what', 'fidelity'), others)}"
    )


def from_scratch() -> str:
    """The protocols without a base of half the classes, and what others published of methods in them."""
    datasets = protocols()["datasets"]
    listed = [(name, protocol["what"]) for name, protocol in protocols()["protocols"].items()]
    columns = [(dataset, name) for dataset in datasets for name, _ in listed]
    numbers = {
        method: [published_elsewhere(f"{dataset}_{method}_{name}") or "" for dataset, name in columns]
        for method in ORDER
    }
    used = [i for i in range(len(columns)) if any(of_method[i] for of_method in numbers.values())]
    header = ("METHOD", *(" ".join(columns[i]) for i in used))
    rows = [(method, *(cells[i] for i in used)) for method, cells in numbers.items() if any(cells)]
    return (
        f"From scratch, with any METHOD above: DATASET_METHOD_PROTOCOL, such as cifar100_icarl_b0_10, on "
        f"{' and '.join(datasets)}:\n\n{format_table(('PROTOCOL', 'what'), listed)}\n\n"
        f"Published elsewhere, by other networks and schedules ({SOURCES} has the sources):\n\n"
        f"{format_table(header, rows)}"
    )


def published(recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    return "-" if recipe.published is None else f"{recipe.published:.2f}"
