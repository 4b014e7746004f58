"""Settings as text and as values: the parser of KEY=VALUE and recipe files, and the check of a value against its key.

The text is YAML without its surprises. A plain word is null, true, false, a decimal number, or else text: `yes`,
`1_000`, `0o7`, `007`, `12:30:45` and `2020-01-01` are text, and a key that wants a number refuses text. Tags, anchors,
a key given twice, and text that is too long or nested too deep are refused.
"""

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import pydantic
import yaml
from pydantic import Field
from pydantic.fields import FieldInfo

from fastil.errors import UserError

MOST_TEXT = 2**18  # characters of a value or a recipe, which parse in seconds
MOST_DEPTH = 8  # of lists in lists
MOST_DIGITS = 18  # of an integer, so that 64 bits hold it
FLOAT32 = (1.17549435e-38, 3.4028234e38)  # smallest and largest positive magnitude that training computes with
MOST_SHOWN = 200  # characters of a value in a message

WORDS = {
    **dict.fromkeys(("null", "Null", "NULL", "~"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
EMPTY = "there is no value; nothing is written null"
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")

Share = Annotated[float, Field(gt=0, lt=1)]
Moment = Annotated[float, Field(gt=0, lt=1, description="a part of training above 0 and below 1, such as 0.5")]
C = TypeVar("C")


class _Refused(yaml.MarkedYAMLError):
    """Something that YAML allows and settings do not."""

    def __init__(self, problem: str, place: Any = None) -> None:
        super().__init__(None, None, problem, getattr(place, "start_mark", None))


class _Parser(yaml.SafeLoader):
    """Composes nodes. The values of scalars are made here, not by YAML 1.1's rules."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:  # an alias has one too
            raise _Refused("anchors and aliases (& and *) are not read; write the value out or quote it", event)
        if getattr(event, "tag", None) is not None:
            raise _Refused("tags (!) are not read; leave the tag out or quote the value", event)
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _Refused(f"nested more than {MOST_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as a number, here or by YAML 1.1."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"{NUMBER.pattern}$"), list("-+.0123456789"))


def parse_override(override: str) -> tuple[str, Any]:
    """Return the key and the value of KEY=VALUE. Raises UserError for anything that is not written so or is no YAML,
    and if YAML would read only a part of the text, such as what precedes a comment.
    """
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"{shown(override)}: settings are written KEY=VALUE")
    try:
        node = _composed(text)
        if node is None:
            raise _Refused(EMPTY)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if text[node.start_mark.index : node.end_mark.index] != text or (plain and node.value != text):
            raise _Refused("a part of the value would not be read (blanks around it, or a comment); quote it")
        return key, _value(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{shown(override)}: {_problem(error, '; quote the value')}") from None


def split_values(text: str) -> list[str]:
    """Return the texts of the values in A,B,C; commas inside brackets and quotes do not separate. A text that is not
    such a list is one value.
    """
    try:
        found = _composed(f"[{text}]").value
    except (yaml.YAMLError, AttributeError):
        return [text]
    places = [(node.start_mark.index - 1, node.end_mark.index - 1) for node in found]
    whole = places and not text[places[-1][1] :].strip()  # else a last comma or text behind a bracket would be lost
    return [text[begin:end] for begin, end in places] if whole else [text]


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """Return the keys and values of a recipe file. Raises UserError, with the line, if it is no YAML or no mapping."""
    try:
        node = _composed(text)
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = _value(node)
            return found
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{shown(where)}: {_problem(error)}") from None
    raise UserError(f"{shown(where)}: a recipe is a mapping of keys to values")


def dump(values: Mapping[str, Any]) -> str:
    """Return text that `parse_mapping` reads as these values. Raises yaml.YAMLError if there is none."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)
    return text


def _composed(text: str) -> Any:
    if len(text) > MOST_TEXT:
        raise _Refused(f"longer than the {MOST_TEXT:,} characters that are read")
    parser = _Parser(text)
    try:
        return parser.get_single_node()
    finally:
        parser.dispose()


def _value(node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(part) for part in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key is a word, not a list or a mapping", key)
            if key.value in found:
                raise _Refused(f"{shown(key.value)} is given twice", key)
            found[key.value] = _value(value)
        return found
    text: str = node.value
    if node.style is not None:  # quoted
        return text
    if not text:
        raise _Refused(EMPTY, node)
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        if len(text.lstrip("+-")) > MOST_DIGITS:
            raise _Refused(f"an integer of more than {MOST_DIGITS} digits", node)
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text


def _problem(error: Exception, fix: str = "") -> str:
    """Return what is wrong with a text. fix: the advice for a text that is no YAML at all."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, " if mark is not None and mark.line else ""
    said = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"{place}{said}" if isinstance(error, _Refused) else f"{place}not valid YAML ({said}){fix}"


def shown(value: Any) -> str:
    """Return a value for a message: shortened, and as JSON if it is not text."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def from_python(value: Any) -> Any:
    """Return a value as text would give it: numpy's numbers and arrays become Python's, paths become text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def listed(value: Any) -> Any:
    """Split a list that was written as text with commas; return any other value as it is."""
    return value.split(",") if isinstance(value, str) else value


def build(config: type[C], values: Mapping[str, Any]) -> C:
    """Return a dataclass of settings, each value checked against the type of its field: text is never taken for a
    number, nor a number for a truth value. Raises UserError, one line with the key, the value and what is allowed.
    """
    kind: Any = config
    adapters, given = _adapters(kind), {}
    for field in dataclasses.fields(kind):
        name = field.name
        if name in values:
            given[name] = _checked(name, values[name], *adapters[name])
        elif field.init and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{name}: has no default; set {name}=VALUE, {adapters[name][1]}")
    try:
        return config(**given)
    except UserError:
        raise
    except (ValueError, AssertionError) as error:  # raised by a method from outside
        raise UserError(f"{config.__name__}: {' '.join(str(error).split())}") from None


@cache
def _adapters(config: type) -> dict[str, tuple[pydantic.TypeAdapter[Any], str]]:
    """Return, by key, what checks its values, and in words what it allows."""
    hints = typing.get_type_hints(config, include_extras=True)
    keys = [field.name for field in dataclasses.fields(config)]
    return {key: (pydantic.TypeAdapter(hints[key]), allowed(hints[key])) for key in keys}


def _checked(key: str, value: Any, adapter: pydantic.TypeAdapter[Any], words: str) -> Any:
    try:
        found = adapter.validate_python(value, strict=True)
    except pydantic.ValidationError:
        try:  # read as JSON, a list may become a tuple, and text the path or the choice that it names
            found = adapter.validate_json(json.dumps(value), strict=True)
        except (pydantic.ValidationError, TypeError, ValueError):
            scalar = isinstance(value, bool | int | float)
            quote = f"; as text it is quoted: \"{key}='{shown(value)}'\"" if scalar and "text" in words else ""
            raise UserError(f"{key}={shown(value)}: must be {words}{quote}{_several(key, value, adapter)}") from None
    if isinstance(found, bool) and not isinstance(value, bool):  # 1 equals True, also among the choices of a Literal
        raise UserError(f"{key}={shown(value)}: must be {words}")
    for part in found if isinstance(found, list | tuple) else [found]:
        problem = _no_number(part)
        if problem:
            raise UserError(f"{key}={shown(value)}: {problem}")
    return found


def _several(key: str, value: Any, adapter: pydantic.TypeAdapter[Any]) -> str:
    """Return what to do about several values where one is allowed, or nothing."""
    parts = value if isinstance(value, list) else split_values(value) if isinstance(value, str) else []
    try:
        for part in parts:
            adapter.validate_python(parse_override(f"{key}={shown(part)}")[1], strict=True)
    except (pydantic.ValidationError, UserError):
        return ""
    if len(parts) < 2:
        return ""
    listed = ",".join(shown(part) for part in parts)
    what = f"--seeds {listed}" if key == "seed" else f"`fastil sweep RECIPE {key}={listed}`"
    return f"; for a run with each of them, {what}"


def _no_number(part: Any) -> str | None:
    """Return what makes a number unusable, if anything."""
    if isinstance(part, float) and part and not FLOAT32[0] <= abs(part) <= FLOAT32[1]:
        return f"training computes in float32, which holds numbers from {FLOAT32[0]:.2g} to {FLOAT32[1]:.2g}, and 0"
    if isinstance(part, int) and abs(part) >= 10**MOST_DIGITS:
        return f"must have at most {MOST_DIGITS} digits"
    return None


def allowed(hint: Any) -> str:
    """Return what a type allows, in words: "an integer above 0 or null"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _annotated(*parts)
    if origin is Literal:
        return _either([repr(part) if isinstance(part, str) else shown(part) for part in parts])
    if origin in (typing.Union, types.UnionType):
        return _either([allowed(part) for part in parts])
    if origin is list:
        return f"a list, each item {allowed(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}: {', '.join(allowed(part) for part in parts)}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _annotated(hint: Any, *extras: Any) -> str:
    for extra in extras:
        if isinstance(extra, FieldInfo) and extra.description:
            return extra.description
    words, limits = allowed(hint), [limit for extra in extras for limit in getattr(extra, "metadata", [extra])]
    texts = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    bounds = [
        f"{text} {getattr(limit, name)}" for name, text in texts.items() for limit in limits if hasattr(limit, name)
    ]
    length = next((limit.min_length for limit in limits if hasattr(limit, "min_length")), None)
    if length is not None:
        words = words.replace("a list", f"a list of {length}", 1)
    return f"{words} {' and '.join(bounds)}".strip().replace("and of at", "and at")


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
