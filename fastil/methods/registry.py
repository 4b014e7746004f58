"""Which methods there are: those of the files here, of installed packages, and those that a command names.

A method from outside is a subclass of `Method`. What makes it known: `register` in one's own script, the entry point
group `fastil.methods` in an installed package, `method=module:Class` or `method=path/to/file.py:Class` in a command.
"""

import contextlib
import difflib
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from fastil import outside
from fastil.errors import UserError
from fastil.methods.method import Method

M = TypeVar("M", bound=type[Method])

METHODS: dict[str, type[Method]] = {}
GROUP = "fastil.methods"


def register(method: M) -> M:
    """Make a method known as `method=NAME`, by its `name` or the name of its class in lower case. Also a decorator.
    A class that is defined again, as in a notebook, takes the place of the old one. Raises ValueError for what is no
    method, and if another class has that name."""
    name = method.__dict__.get("name") or method.__name__.lower()
    _checked(name, method)
    place, before = f"{method.__module__}.{method.__qualname__}", METHODS.get(name, method)
    if f"{before.__module__}.{before.__qualname__}" != place:
        raise ValueError(f"register: method={name} is {before.__module__}.{before.__qualname__} already")
    method.name = name
    METHODS[name] = method
    return method


def find(name: str, *, named: bool = True) -> type[Method] | None:
    """The method that a recipe names. named: by the user, just now; otherwise by a run directory, for which nothing is
    imported but installed entry points: None if the method is not there. Raises UserError otherwise."""
    if name in METHODS:
        return METHODS[name]
    entry = next((entry for entry in entry_points(group=GROUP) if entry.name == name), None)
    if entry is not None:
        with contextlib.nullcontext() if named else contextlib.suppress(UserError):
            return known_as(name, outside.imported(f"method={name}", entry.load))
        return None
    if not named:
        return None
    if ":" in name:
        return known_as(name, outside.attribute(f"method={name}"))
    near = difflib.get_close_matches(name.lower(), METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"methods are {', '.join(sorted(METHODS))}"
    if name.endswith(".py"):
        hint = f"write {name}:NAME, with the name of the class"
    raise UserError(f"method={name}: unknown; {hint}")


def _checked(name: str, found: Any) -> type[Method]:
    if not isinstance(found, type) or not issubclass(found, Method):
        raise UserError(f"method={name}: is not a subclass of fastil.Method")
    if found.Config is not None and not is_dataclass(found.Config):
        raise UserError(f"method={name}: its Config is not a dataclass")
    if found.weigh is Method.weigh:
        raise UserError(f"method={name}: write weigh(self, context), the weights of cross-entropy and of distillation")
    return found


def known_as(name: str, found: Any) -> type[Method]:
    """Make a class known under the name that a recipe has for it."""
    method = _checked(name, found)
    if not method.__dict__.get("name"):
        method.name = name
    METHODS[name] = method
    return method
