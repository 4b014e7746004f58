"""Which methods there are: those of the files here, of installed packages, and those that a command names.

A method from outside is a subclass of `Method`. What makes it known: `register` in one's own script, the entry point
group `fastil.methods` in an installed package, `method=module:Class` or `method=path/to/file.py:Class` in a command.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

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


def find(name: str, *, named: bool = True) -> type[Method] | None:
    """The method that a recipe names. named: by the user, just now; otherwise by a run directory, for which nothing is
    imported but installed entry points: None if the method is not there. Raises UserError otherwise."""
    if name in METHODS:
        return METHODS[name]
    entry = next((entry for entry in entry_points(group=GROUP) if entry.name == name), None)
    place, colon, attribute = name.rpartition(":")
    if entry is not None:
        with contextlib.nullcontext() if named else contextlib.suppress(UserError):
            return _known_as(name, _imported(name, entry.load))
        return None
    if not named:
        return None
    if colon:
        if place.endswith(".py") and not Path(place).is_file():
            raise UserError(f"method={name}: no file {place}")
        module = _imported(name, partial(_module, place))
        if not hasattr(module, attribute):
            raise UserError(f"method={name}: {place} has no {attribute}")
        return _known_as(name, getattr(module, attribute))
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"methods are {', '.join(sorted(METHODS))}"
    raise UserError(f"method={name}: unknown; {hint}")


def _known_as(name: str, found: Any) -> type[Method]:
    if not isinstance(found, type) or not issubclass(found, Method):
        raise UserError(f"method={name}: is not a subclass of fastil.methods.Method")
    if found.Config is not None and not is_dataclass(found.Config):
        raise UserError(f"method={name}: its Config is not a dataclass")
    if not found.__dict__.get("name"):
        found.name = name
    METHODS[name] = found
    return found


def _imported(name: str, load: Callable[[], Any]) -> Any:
    """What `load` returns. Whatever the user's code raises becomes one line, with the place where it happened."""
    try:
        return load()
    except SyntaxError as error:
        raise UserError(f"method={name}: {error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        module = name.rpartition(":")[0]
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"method={name}: no module {module}; for a file write path/to/file.py:Class") from None
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"method={name}: {last.filename}, line {last.lineno}: {said}") from None


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    name = f"fastil_method_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
