"""The known methods: those in this folder, those of installed packages, and those that a command names.

A method from outside is a subclass of `Method`. It becomes known by `register` in a script, by the entry point group
`fastil.methods` of an installed package, or by `method=module:Class` or `method=path/to/file.py:Class` in a command.
"""

from dataclasses import is_dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from fastil import outside
from fastil.advice import on_method
from fastil.errors import UserError
from fastil.methods.method import Method
from fastil.settings import shown

M = TypeVar("M", bound=type[Method])

METHODS: dict[str, type[Method]] = {}
GROUP = "fastil.methods"


def register(method: M) -> M:
    """Make a method known as `method=NAME`, by its `name` or the name of its class in lower case. Also a decorator. A
    class that is defined again, as in a notebook, replaces the old one. Raises UserError if it is not a method, or if
    another class has that name.
    """
    METHODS[name_of(find(method))] = method
    return method


def name_of(method: type[Method]) -> str:
    """Return the name of a method that was given as a class. Raises UserError if another class has that name."""
    known = METHODS.get(method.name, method)
    if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise UserError(
            f"method={method.name}: is {known.__module__}.{known.__qualname__} already; give yours another `name`"
        )
    return method.name


def find(given: Any) -> type[Method]:
    """Return the method named by NAME, module:Class or path/to/file.py:Class, or the class itself if one is given.
    Raises UserError if there is none, or if it is not a method.
    """
    if not isinstance(given, str):
        return _checked(given.__name__.lower() if isinstance(given, type) else shown(given), given)
    known = installed(given)
    if known is not None:
        return known
    if ":" in given:
        return _checked(given, outside.attribute(f"method={given}"))
    hint = on_method(given, METHODS)
    if given.endswith(".py"):
        hint = f"write {shown(given)}:NAME, with the name of the class"
    raise UserError(f"method={shown(given)}: unknown; {hint}")


def installed(name: str) -> type[Method] | None:
    """Return a method of fastil, of `register` or of an entry point, or None: a run directory may name these, and no
    other code is imported for it. Raises UserError for a broken entry point."""
    if name not in METHODS:
        entry = next((entry for entry in entry_points(group=GROUP) if entry.name == name), None)
        if entry is None:
            return None
        METHODS[name] = _checked(name, outside.imported(f"method={name}", entry.load))
    return METHODS[name]


def _checked(name: str, found: Any) -> type[Method]:
    """Return the class, as the method of this name if it has none. Raises UserError if it is not a method."""
    if not isinstance(found, type) or not issubclass(found, Method):
        raise UserError(f"method={name}: is not a subclass of fastil.Method")
    if found.Config is not None and not is_dataclass(found.Config):
        raise UserError(f"method={name}: its Config is not a dataclass")
    if found.loss_weights is Method.loss_weights:
        raise UserError(
            f"method={name}: write loss_weights(self, context), which returns the weights of cross-entropy "
            "and of distillation"
        )
    if not vars(found).get("name"):
        found.name = name
    return found
