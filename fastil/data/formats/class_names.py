"""Names of classes: their order, which decides their ids, and whether two lists of them are the same."""

import re
from collections.abc import Iterable

from fastil.errors import UserError

NAMED = 5  # classes that a message names; it counts the rest
NUMBER = re.compile("[0-9]{1,18}")


def check_classes(where: str, found: Iterable[str]) -> list[str]:
    """Return the names of classes in their order. Raises UserError if there are fewer than two."""
    names = in_order(found)
    if len(names) < 2:
        only = f"only one class folder ({names[0]})" if names else "no class folder"
        raise UserError(f"{where}: {only}; incremental training needs two classes or more, one folder each")
    return names


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of classes sorted: by value if all are numbers, as labels are, otherwise as text."""
    found = sorted(names)
    return sorted(found, key=int) if all(NUMBER.fullmatch(name) for name in found) else found


def order_note(names: list[str]) -> str | None:
    """Return a line if names are numbers in another order than that of text, which other toolboxes use for folders."""
    as_text = sorted(names)
    if names == as_text or names != in_order(names):
        return None
    odd = next(i for i, name in enumerate(as_text) if names[i] != name)
    return (
        f"class names are numbers and are taken by their value: id {odd} is class {names[odd]}, where text is sorted "
        f"(torchvision) it is class {as_text[odd]}"
    )


def check_same_classes(train: str, names: list[str], val: str, val_names: list[str]) -> None:
    """Raise UserError, naming all classes that only one of the two has, if their classes differ."""
    sides = ((train, val, sorted(set(names) - set(val_names))), (val, train, sorted(set(val_names) - set(names))))
    odd = [f"{some(only)} {'are' if len(only) > 1 else 'is'} in {here} but not in {there}"
           for here, there, only in sides if only]  # fmt: skip
    if odd:
        raise UserError(f"class {'; '.join(odd)}; both need the same classes")
    if names != val_names:
        raise UserError(f"{val}: has the classes of {train} in another order; take both from one data set")


def some(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
