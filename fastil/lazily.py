"""Names of a package that are imported when somebody asks for them: torch takes seconds, which `fastil --help` should
not.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


def names_from(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package. homes: the module of each name, within the package. The
    package's modules need not be imported either.
    """

    def find(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package} has no attribute {name}")

    return find, lambda: sorted({*vars(sys.modules[package]), *homes})
