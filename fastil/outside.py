"""Code from outside the package: module:NAME or path/to/file.py:NAME in a command, or an object in the user's
script.
"""

import ast
import hashlib
import importlib
import inspect
import json
import os
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fastil.errors import UserError
from fastil.settings import shown

T = TypeVar("T")

# Code in these places is not the user's own.
LIBRARIES = (
    *{f"{sysconfig.get_path(kind)}{os.sep}" for kind in ("stdlib", "platstdlib", "purelib", "platlib")},
    f"{Path(__file__).parent}{os.sep}",
    "<frozen",
)


def attribute(setting: str) -> Any:
    """Return what a setting KEY=module:NAME or KEY=path/to/file.py:NAME names.

    Its module is imported; a file that has changed is read again. Raises UserError if it does not exist, and for any
    error that the code raises.
    """
    key, _, written = setting.partition("=")
    place, _, name = written.rpartition(":")
    if not name.isidentifier() or not (place.endswith(".py") or all(map(str.isidentifier, place.split(".")))):
        raise UserError(f"{shown(setting)}: write {key}=module:NAME or {key}=path/to/file.py:NAME")
    if place.endswith(".py") and not os.path.isfile(place):
        raise UserError(f"{shown(setting)}: no file {shown(place)}")
    try:
        module = imported(setting, partial(_module, place))
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{place}.".startswith(f"{cause.name}."):
            raise UserError(
                f"{shown(setting)}: no module {shown(place)}; for a file write path/to/file.py:NAME"
            ) from cause
        raise
    if not hasattr(module, name):
        raise UserError(f"{shown(setting)}: {shown(place)} has no {name}")
    return getattr(module, name)


def imported(setting: str, load: Callable[[], T]) -> T:
    """Return what `load` returns. An error in the user's code becomes one line with the last place in that code."""
    try:
        return load()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{setting}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(LIBRARIES)]
        place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{setting}: {place}{said}") from error


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        here = str(Path.cwd())
        if here not in sys.path and "" not in sys.path:  # `python -m` does this, the `fastil` script does not
            sys.path.append(here)
        return importlib.import_module(place)
    path = Path(place).resolve()
    content = path.read_bytes()
    name = f"fastil_outside_{path.stem}_{hashlib.sha256(bytes(path) + content).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = ModuleType(name)  # dataclasses look up their module there
    module.__file__ = str(path)
    try:
        exec(compile(content, path, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def source_hash(thing: Any) -> str | None:
    """Return the sha256 of the source of a class or function, and of the user's functions, classes and constants that
    it names, so that a run knows the code that made it. None if there is no source, as with `python -c`.
    """
    found: dict[str, str] = {}
    if isinstance(thing, partial):
        found["arguments"], thing = repr((thing.args, thing.keywords)), thing.func
    try:
        _add_source("", thing, found)
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _add_source(name: str, thing: Any, found: dict[str, str]) -> None:
    text = found[name] = textwrap.dedent(inspect.getsource(thing))
    nodes = list(ast.walk(ast.parse(text)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    around = dict(vars(sys.modules[thing.__module__]))
    for function in filter(inspect.isfunction, (thing, *vars(thing).values())):
        around |= inspect.getclosurevars(function).nonlocals
    for word in {node.id for node in names} - bound:
        value = around.get(word)
        parts = value if isinstance(value, tuple) else (value,)
        if word in found:
            continue
        if (inspect.isclass(value) or inspect.isfunction(value)) and _is_users(value):
            _add_source(word, value, found)
        elif all(isinstance(part, bool | int | float | str) for part in parts):
            found[word] = repr(value)


def _is_users(thing: Any) -> bool:
    try:
        return not str(inspect.getsourcefile(thing) or LIBRARIES[0]).startswith(LIBRARIES)
    except TypeError:  # written in C
        return False
