"""Recipe files, and the recipe.yaml of a run directory.

A recipe is a YAML file of keys with a `base:` parent, `description`, `published` (average incremental accuracy in
percent) and `fidelity`. Every key of every part is set at the top level, in the file or as KEY=VALUE. Recipes that
train from scratch have no file: recipes/protocols.yaml derives them from others.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastil import advice, outside, settings
from fastil.device import Precision
from fastil.errors import UserError
from fastil.files import Damaged
from fastil.methods import BUILT_IN, MethodConfig, check_parts, configs_of, find, installed, name_of
from fastil.models import ModelConfig, find_factory
from fastil.recipe import PARTS, About, Keys, Recipe, method_of, values_of
from fastil.settings import shown

DEEPEST = 10  # parents of a recipe
EFFECTIVE = "recipe.yaml"  # in a run directory
MEMORY_KEYS = ("exemplars_per_class", "memory_budget")


def names() -> list[str]:
    """Return the recipes that come with fastil."""
    return sorted([*file_names(), *in_protocols()])


@cache
def file_names() -> list[str]:
    """Return the recipes that have a file."""
    files = resources.files("fastil.recipes").iterdir()
    found = [f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")]
    return sorted(set(found) - {"tables", "protocols"})


@cache
def protocols() -> Keys:
    """Return the content of protocols.yaml."""
    text = resources.files("fastil.recipes").joinpath("protocols.yaml").read_text("utf-8")
    return settings.parse_mapping(text, "protocols")


@cache
def in_protocols() -> dict[str, tuple[str, str]]:
    """Return, for each recipe without a file, the recipe and the protocol that it is made of."""
    parents = [name for name in file_names() if name.partition("_")[0] in protocols()["datasets"]]
    return {
        f"{name.removesuffix('_5')}_{protocol}": (name, protocol)
        for name in parents
        if name.endswith("_5")
        for protocol in protocols()["protocols"]
        if not (protocol.endswith("_r20") and name.split("_")[1] in protocols()["without_memory"])
    }


def published_elsewhere(name: str) -> str | None:
    """Return the average incremental accuracy that others published for a recipe without a file, as text, percent."""
    found: str | None = protocols()["elsewhere"].get(name)
    return found


def shipped(name: str) -> Recipe | None:
    """Return the recipe of this name that comes with fastil. A name from a run directory may be anything, even the path
    of a file that names code; that is not read.
    """
    return load(name) if name in names() else None


def differences(recipe: Recipe) -> dict[str, Any] | None:
    """Return the settings in which a recipe differs from fastil's own of this name. None: fastil has no such recipe."""
    before = shipped(recipe.name)
    return None if before is None else recipe.differences(before)


def run_named(name: str) -> Path | None:
    """Return the run directory that is given in place of a recipe: by its path, or by that of its recipe.yaml."""
    path = Path(name)
    try:
        folder = path if name and path.is_dir() else path.parent if path.name == EFFECTIVE else None
        parts = ("protocol.json", "lock") if folder != path else ("protocol.json", "lock", EFFECTIVE)
        is_run = folder is not None and name not in names() and any((folder / part).exists() for part in parts)
    except (OSError, ValueError):  # a name that no file can have
        return None
    return folder if is_run else None


def load(name: str, overrides: Iterable[str] | Keys = (), **paths: str | None) -> Recipe:
    """Return a recipe by its name, the path of a YAML file, or a run directory, with KEY=VALUE overrides or a
    dictionary of them.

    paths: the keys `data` and `val`. What `method` and `model` name outside the package is imported, unless only a run
    directory names it. A dictionary may hold the class and the function themselves.
    """
    if isinstance(overrides, dict):
        given = {key: settings.from_python(value) for key, value in overrides.items()}
    else:
        given = dict(map(settings.parse_override, overrides))
    run = run_named(name)
    stem, values = Path(name).stem, _read(name) if run is None else {}
    if run is not None or "recipe" in values:  # only a run's recipe.yaml, or a copy of it, has this key
        stem, values = _of_run(Path(name) if run is None else run / EFFECTIVE, given)
    values |= given | {key: path for key, path in paths.items() if path is not None}
    method = values.get("method", MethodConfig.method)
    procedure = find(method)
    values["method"] = name_of(procedure) if isinstance(method, type) else method
    given_model, factory = find_factory(values.get("model", ModelConfig.model))
    values["model"] = given_model
    outer: dict[str, Any] = {"method": procedure} if values["method"] not in BUILT_IN else {}
    outer |= {} if factory is None else {"model": factory}
    code = {values[key]: thing for key, thing in outer.items()}
    sources = {key: outside.source_hash(thing) for key, thing in outer.items()}
    keys = _parts_of(PARTS | configs_of(values["method"], procedure))
    for key in given:
        _known(key, keys)
    recipe = _build(stem, values, code, sources)
    try:
        if recipe.method.method not in BUILT_IN:
            recipe.dump()
    except yaml.YAMLError as error:
        raise UserError(f"method={recipe.method.method}: a key cannot be written as YAML: {error.args[0]}") from None
    for key, value in given.items():
        reader = recipe.reader(key)
        if reader:
            raise UserError(f"{key}={shown(value)}: nothing reads it here; set {reader} as well, or leave it out")
    return recipe


def read_effective(path: Path, code: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe in the recipe.yaml of a run directory. code: code from outside, by its name in the recipe;
    nothing is imported.
    """
    name, values, sources = _effective(path)
    with contextlib.suppress(UserError):  # the run must stay readable even if that code is broken
        installed(str(values.get("method")))
    try:
        return _build(name, values, code or {}, sources)
    except UserError as error:
        raise _damaged(path, str(error)) from None


def _effective(path: Path) -> tuple[str, Keys, dict[str, str]]:
    """Return the name, the keys and the hashes of code in a recipe.yaml."""
    try:
        text = _file_text(path)
        values = settings.parse_mapping(text, path.name)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; give a run directory of fastil, or the name of a recipe") from None
    except (OSError, ValueError) as error:  # ValueError: UserError and UnicodeDecodeError, too
        raise _damaged(path, getattr(error, "strerror", None) or str(error)) from None
    name = values.pop("recipe", None)
    if not isinstance(name, str):
        raise _damaged(path, "recipe: must be text, the name of the recipe" if name is not None else "no key recipe")
    missing = [key for key in ("precision", "device", "checkpoint_every") if key not in values]
    if missing or not text.endswith("\n"):  # defaults must not fill it up
        raise _damaged(path, f"cut off{f', no key {missing[0]}' if missing else ''}")
    if values["precision"] == "auto":  # older runs, from before a run settled it at its start
        values["precision"] = _older_auto(path.parent, str(values["device"]))
    sources = {key: values.pop(f"{key}_source", None) for key in ("method", "model")}
    return name, values, {key: str(value) for key, value in sources.items() if value is not None}


def _of_run(path: Path, given: Keys) -> tuple[str, Keys]:
    """Return the name and the keys of a run that is trained again or resumed. Raises UserError for code that it names
    and the command does not, because it would be imported.
    """
    name, values, _ = _effective(path)
    if name != Path(name).name or not name.isprintable():  # it names a folder
        raise _damaged(path, "recipe: no name of a recipe")
    method, model = (str(values.get(key)) for key in ("method", "model"))
    for key, value, unknown in (("method", method, ":" in method), ("model", model, ":" in model)):
        if unknown and key not in given:
            raise UserError(
                f"{path}: names code ({key}={shown(value)}), which is imported only where the command names it; "
                f"read that code, and add {key}={shown(value)}"
            )
    return name, values


def _damaged(path: Path, reason: str) -> Damaged:
    return Damaged(path, f"damaged ({reason})", "is this the recipe.yaml of a run? Take it from a copy of the run")


def _older_auto(run: Path, device: str) -> Precision:
    """Return what precision=auto meant before it was stored: bf16 on CUDA. For device=auto, timings.json tells the
    device once a step is done.
    """
    if device != "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    try:
        name = json.loads((run / "timings.json").read_bytes())["machine"]["device"]
    except (OSError, ValueError, LookupError, TypeError):
        return "fp32"
    return "fp32" if str(name).startswith("CPU") else "bf16"


def _read(name: str, children: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the keys of a recipe file on top of its parents' keys."""
    if name in children:
        raise UserError(f"{name}: is its own parent; change a base")
    if len(children) > DEEPEST:
        raise UserError(f"{children[0]}: has more than {DEEPEST} parents, {shown(name)} among them; change a base")
    made_of = in_protocols().get(name)
    values = settings.parse_mapping(_text_of(name), name) if made_of is None else _in_protocol(*made_of)
    for key, kinds in (("base", (".yaml", ".yml")), ("method", (".py",)), ("model", (".py",))):
        place, colon, attribute = str(values.get(key)).partition(":")
        if place.endswith(kinds) and name not in names():  # a path, relative to the folder of this file
            values[key] = f"{Path(name).parent / place}{colon}{attribute}"
    parent = values.pop("base", None)
    if parent is None:
        return values
    # A published number belongs to the recipe that states it, not to those that derive from it.
    parent = str(parent)
    return {key: value for key, value in _read(parent, (*children, name)).items() if key != "published"} | values


def _in_protocol(parent: str, protocol: str) -> Keys:
    """Return the keys that a recipe without a file sets on top of the recipe whose method it has."""
    of_parent, found = _read(parent), protocols()["protocols"][protocol]
    dataset, _, method = of_parent["description"].partition(", ")
    own: Keys = found["settings"] | protocols()["datasets"][parent.partition("_")[0]]
    what = found["what"]
    if of_parent.get("exemplars_per_class") == 0:  # with a memory it would be another method
        own, what = {key: value for key, value in own.items() if key not in MEMORY_KEYS}, what.partition(" with ")[0]
    return own | {
        "base": parent,
        "description": f"{dataset}, {what}, {method.partition(', ')[2]}",
        "fidelity": f"not in the paper; the settings of {parent}: {of_parent['fidelity']}",
    }


def _text_of(name: str) -> str:
    """Return the text of a recipe file, fastil's or the user's own."""
    if name in file_names():
        return resources.files("fastil.recipes").joinpath(f"{name}.yaml").read_text("utf-8")
    if not name.endswith((".yaml", ".yml")):
        if "/" in name:
            raise UserError(
                f"{shown(name)}: no run directory; give one, a recipe (fastil recipes lists them) or a YAML file"
            )
        raise UserError(f"unknown recipe {shown(name)}: {advice.on_recipe(name, names())}")
    try:
        return _file_text(Path(name))
    except (OSError, ValueError) as error:  # ValueError: no text, or a name that no file can have
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"{shown(name)}: {reason}; give a recipe's name (fastil recipes lists them) or a YAML file"
        ) from None


def _file_text(path: Path) -> str:
    """Return the beginning of a text file, as long as a recipe may be."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise OSError(None, "not a file")
    with open(path, encoding="utf-8-sig") as file:
        return file.read(settings.MOST_TEXT + 1)


def _parts_of(configs: Mapping[str, type]) -> dict[str, str]:
    """Return the part that each key belongs to. Raises UserError if a method from outside has a key that is taken."""
    heads = ("recipe", "description", "published", "fidelity", "base", "method_source", "model_source")
    parts = dict.fromkeys(heads, "")
    for part, config in configs.items():
        for field in dataclasses.fields(config):
            if parts.setdefault(field.name, part) != part:
                raise UserError(f"method={part}: its key {field.name} is taken; rename it in {config.__name__}")
    return {key: part for key, part in parts.items() if part}


def _known(key: str, keys: Mapping[str, str]) -> str:
    if key in keys:
        return key
    raise UserError(f"unknown key {shown(key)}: {advice.on_key(key, keys)}")


def _build(name: str, values: Keys, code: Mapping[str, Any], sources: Mapping[str, str | None]) -> Recipe:
    """Return the recipe. code: what is loaded of it; without the method's code, unknown keys may be its own."""
    about = settings.build(About, {key: values.pop(key) for key in values_of(About()) if key in values})
    method = str(values.get("method", MethodConfig.method))
    procedure = method_of(method, code)
    configs = PARTS | configs_of(method, procedure)
    keys = _parts_of(configs)
    unknown = {key: values.pop(key) for key in list(values) if procedure is None and key not in keys}
    parts: dict[str, Keys] = {part: {} for part in configs}
    for key, value in values.items():
        parts[keys[_known(key, keys)]][key] = value
    built: dict[str, Any] = {part: settings.build(config, parts[part]) for part, config in configs.items()}
    own = {part: built.pop(part) for part in configs if part not in PARTS}
    if procedure is not None:
        check_parts(method, procedure, built["loss"], built["model"].head)
    code = {name: thing for name, thing in code.items() if name in (method, built["model"].model)}
    return Recipe(name, **values_of(about), of_methods=own, foreign=unknown, code=code, sources=sources, **built)
