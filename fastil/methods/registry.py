"""Which methods there are: one for each file here, those of installed packages, and those that a command names.

A method from outside is a subclass of `Method`. What makes it known: `register` in one's own script, the entry point
group `fastil.methods` in an installed package, `method=module:Class` or `method=path/to/file.py:Class` in a command.
"""

import difflib
import importlib
import importlib.util
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from fastil.errors import UserError
from fastil.methods.method import Method

M = TypeVar("M", bound=type[Method])

METHODS: dict[str, type[Method]] = {}
GROUP = "fastil.methods"


def register(method: M) -> M:
    """Make a method known as `method=NAME`, by its `name` or the name of its class in lower case. Also a decorator.
    Raises ValueError if another class has that name."""
    name = method.__dict__.get("name") or method.__name__.lower()
    method.name = name
    if METHODS.setdefault(name, method) is not method:
        raise ValueError(f"register: method={name} is {METHODS[name].__module__}.{METHODS[name].__qualname__} already")
    return method


def find(name: str, *, by_path: bool = True) -> type[Method] | None:
    """The method that a recipe names. by_path: import module:Class and file.py:Class too, where the user has just named
    them; otherwise None for those that are not loaded. Raises UserError for one that is not there."""
    if name in METHODS:
        return METHODS[name]
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _known_as(name, _checked(name, entry.load()))
    place, colon, attribute = name.rpartition(":")
    if colon:
        return _known_as(name, _checked(name, _attribute(name, place, attribute))) if by_path else None
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"methods are {', '.join(sorted(METHODS))}"
    raise UserError(f"method={name}: unknown; {hint}")


def _known_as(name: str, method: type[Method]) -> type[Method]:
    method.name = name
    METHODS[name] = method
    return method


def _checked(name: str, found: object) -> type[Method]:
    if not isinstance(found, type) or not issubclass(found, Method):
        raise UserError(f"method={name}: is no subclass of fastil.methods.Method")
    return found


def _attribute(name: str, place: str, attribute: str) -> object:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UserError(f"method={name}: no file {place}")
    try:
        module = _from_file(Path(place)) if is_file else importlib.import_module(place)
    except Exception as error:  # whatever the user's code raises
        if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            raise UserError(f"method={name}: no module {place}; for a file write path/to/file.py:Class") from None
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"method={name}: {last.filename}, line {last.lineno}: {type(error).__name__}: {error}"
        ) from None
    if not hasattr(module, attribute):
        raise UserError(f"method={name}: {place} has no {attribute}")
    return getattr(module, attribute)


def _from_file(path: Path) -> ModuleType:
    name = f"fastil_method_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
