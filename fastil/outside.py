"""Code from outside the package that a command names: module:attribute or path/to/file.py:attribute."""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from fastil.errors import UserError


def attribute(setting: str) -> Any:
    """What a setting KEY=module:attribute or KEY=path/to/file.py:attribute names; its module is imported. Raises
    UserError for what is not there and for whatever the code raises."""
    place, _, name = setting.partition("=")[2].rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"{setting}: no file {place}")
    module = imported(setting, partial(_module, place))
    if not hasattr(module, name):
        raise UserError(f"{setting}: {place} has no {name}")
    return getattr(module, name)


def imported(setting: str, load: Callable[[], Any]) -> Any:
    """What `load` returns. Whatever the user's code raises becomes one line, with the place where it happened."""
    try:
        return load()
    except SyntaxError as error:
        raise UserError(f"{setting}: {error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        module = setting.partition("=")[2].rpartition(":")[0]
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{setting}: no module {module}; for a file write path/to/file.py:NAME") from None
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{setting}: {last.filename}, line {last.lineno}: {said}") from None


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        here = str(Path.cwd())
        if here not in sys.path and "" not in sys.path:  # as `python -m` has it, for the `fastil` script
            sys.path.append(here)
        return importlib.import_module(place)
    path = Path(place).resolve()
    name = f"fastil_outside_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
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
