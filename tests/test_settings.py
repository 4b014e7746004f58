"""Settings as text: what is read as what, and that nothing a user may write ends in a traceback or another value."""

import collections
import dataclasses
import enum
import json
import random
import re
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from conftest import SOAK, make_folder
from hypothesis import given
from hypothesis import settings as configured
from hypothesis import strategies as st
from pydantic import Field, PositiveInt

from fastil import recipe_file
from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.settings import (
    MOST_DEPTH,
    MOST_TEXT,
    allowed,
    build,
    dump,
    from_python,
    parse_mapping,
    parse_override,
    shown,
    split_values,
)
from fastil.text import one_line
from fastil.training import estimate
from fastil.training.speed import Rates, Speeds

DRAWN = configured(deadline=None, database=None, derandomize=True, max_examples=2000 if SOAK else 100)
NUMBERS = st.integers(-(10**18) + 1, 10**18 - 1) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("0123456789eE+-._:'"))


# What is read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None), ("~", None), ("true", True), ("FALSE", False), ("5", 5), ("+5", 5), ("-0", 0), ("0", 0),
        ("1e-3", 0.001), ("1E3", 1000.0), ("5.", 5.0), (".5", 0.5), ("-1.5e+2", -150.0), ("[1, 2.5]", [1, 2.5]),
        ("'5'", "5"), ('"a\\tb"', "a\tb"), ("''", ""), ("[a, 'null', null]", ["a", "null", None]), ("[]", []),
        # These are numbers, dates or truth values to YAML 1.1, and some of them to Python.
        *((text, text) for text in (
            "yes", "no", "on", "Off", "y", "12:30:45", "1_000", "0o7", "0x1F", "0b11", "007", "010", "08", "08.5",
            "2020-01-01", "2020-13-45", ".inf", "-.nan", "inf", "nan", "1e", "e5", "1.2.3", "--1", "+-1", "=", "<<",
            "None", "tRue", "\u0663", "\uff15", "1 000", "1,5", "/a/path=with signs", "C:\\x", "a#b", "cuda:1",
        )),
    ],
)  # fmt: skip
def test_a_plain_word_is_null_true_false_a_decimal_number_or_text(text, value):
    key, found = parse_override(f"lr={text}")
    assert (key, found, type(found)) == ("lr", value, type(value))
    assert parse_mapping(f"lr: {text}\nx: 1\n", "x.yaml") == {"lr": value, "x": 1}


@given(NUMBERS | st.booleans() | st.none())
@DRAWN
def test_what_json_writes_is_read_as_json_reads_it(value):
    found = parse_override(f"x={json.dumps(value)}")[1]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no value; nothing is written null"), ("#x", "no value"), ("x #y", "quote it"), (" x", "quote it"),
        ("x ", "quote it"), ("5 # five", "quote it"), ("'x' #y", "quote it"), ("--- 5", "quote it"),
        ("a\nb", "quote it"),
        ("\ufeff5", "quote it"), ("!!int 5", "tags"), ("!!python/none x", "tags"),
        ("! 5", "tags"), ("&a 5", "anchors"), ("*a", "anchors"), ("[&a 1, *a]", "anchors"),
        ("{a: 1, a: 2}", "a is given twice"),
        ("{1: 2, 1: 3}", "1 is given twice"), ("{[a]: 1}", "a key is a word"), ("9" * 19, "more than 18 digits"),
        ("-" + "1" * 5000, "more than 18 digits"), ("[" * 20_000, "nested"), ("- " * 30_000, "nested"),
        ("{a: " * 30_000, "nested"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "nested"), ("x" * (MOST_TEXT + 1), "longer than"),
        ("@x", "not valid YAML"), ("a: b: c", "not valid YAML"), ("[1", "not valid YAML"), ("'", "not valid YAML"),
        ("\x00", "not valid YAML"), ("\x1b", "not valid YAML"), ("\udcff", "not valid YAML"),
        ("%YAML " + "9" * 5000 + ".1", "not valid YAML"),
        ('"\\UFFFFFFFF"', "not valid YAML"), ('"\\U00110000"', "not valid YAML"), ('"\\xZZ"', "not valid YAML"),
    ],
)  # fmt: skip
def test_what_would_be_read_as_something_else_is_refused_in_one_short_line(text, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        parse_override(f"data={text}")
    assert str(error.value).startswith("data=")
    assert str(error.value) == one_line(str(error.value))
    assert len(str(error.value)) < 600


def test_what_is_nested_as_deep_as_allowed_and_as_long_is_read():
    assert parse_override("x=" + "[" * MOST_DEPTH + "]" * MOST_DEPTH)[1]
    assert len(parse_override(f"x='{'y' * (MOST_TEXT - 2)}'")[1]) == MOST_TEXT - 2


@DRAWN
@given(st.lists(st.recursive(st.none() | st.integers(-9, 9) | st.text("a,' []{}\\\""), st.lists), min_size=1))
def test_what_json_writes_is_split_at_its_own_commas(values):
    assert [json.loads(text) for text in split_values(",".join(map(json.dumps, values)))] == values
    assert [json.loads(text) for text in split_values(" , ".join(map(json.dumps, values)))] == values


@pytest.mark.parametrize("text", ["a", "", ",", "a,", "a,,b", "[1,2", "1],[2", "'a,b", "{a", "a # b,c", "/p/[x],y/{z"])
def test_what_is_no_list_of_values_is_one_value(text):
    assert split_values(text) == [text]


def test_plain_words_are_split_too():
    assert split_values("own.py:Class, 'it''s',[a, [b,c]],1e-3") == ["own.py:Class", "'it''s'", "[a, [b,c]]", "1e-3"]


def test_aliases_within_aliases_are_refused_before_they_multiply():
    text = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(UserError, match=r"mine.yaml: anchors and aliases"):
        parse_mapping(text, "mine.yaml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lr: 1\nlr: 2\n", "line 2, lr is given twice"), ("lr: 1\nepochs:\n", "line 2, there is no value"),
        ("a: 1\n  b: 2\n", "line 2, not valid YAML"), ("a: 1\n---\nb: 2\n", "line 2, not valid YAML"),
        ("? [a]\n: 1\n", "a key is a word"), ("<<: {a: 1}\n? [a]\n: 1", "a key is a word"), ("5", "a mapping"),
        ("", "a mapping"),
        ("# nothing", "a mapping"), ("[a]", "a mapping"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_told_with_its_line(text, complaint):
    with pytest.raises(UserError, match=f"^mine.yaml: .*{complaint}"):
        parse_mapping(text, "mine.yaml")


def test_a_key_is_text_whatever_it_looks_like():
    assert parse_mapping("1: 2\nnull: 3\nyes: 4\n1e3: 5\n", "x") == {"1": 2, "null": 3, "yes": 4, "1e3": 5}


# What is written is read again


@given(st.dictionaries(st.sampled_from("abc"), NUMBERS | TEXTS | st.none() | st.booleans() | st.lists(NUMBERS | TEXTS)))
@DRAWN
def test_what_is_dumped_is_read_again(values):
    found = parse_mapping(dump(values | {"last": 1}), "x")
    assert found == values | {"last": 1}
    assert list(map(type, found.values())) == [*map(type, values.values()), int]


@given(st.dictionaries(st.sampled_from("abc"), NUMBERS | TEXTS | st.none() | st.booleans() | st.lists(NUMBERS)))
@DRAWN
def test_what_older_versions_dumped_is_read_as_they_read_it(values):
    """All but text that only YAML 1.2 takes for a number, such as a folder called 1e3."""
    text = yaml.safe_dump(values | {"last": 1}, sort_keys=False)
    before, now = yaml.safe_load(text), parse_mapping(text, "x")
    for key, value in before.items():
        exponent = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]*\.?[0-9]*[eE][-+]?[0-9]+", value)
        assert now[key] == value or exponent
        assert type(now[key]) is type(value) or exponent


# What a key allows

IN_FLOAT32 = "training computes in float32, which holds numbers from 1.2e-38 to 3.4e+38, and 0"


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Own:
    """As a method from outside may have it."""

    count: PositiveInt
    pair: tuple[float, float] = (0.0, 1.0)
    switch: bool = False
    colour: Colour = Colour.RED
    place: Path = Path()
    mode: Literal["auto", True, False] = "auto"
    shares: Annotated[list[float], Field(min_length=2, max_length=2)] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.count == 13:
            raise ValueError("13 is\nunlucky")


def test_values_have_the_types_of_their_keys():
    found = build(Own, {"count": 3, "pair": [1, 2.5], "colour": "red", "place": "x/y", "mode": True, "shares": [0, 1]})
    assert found == Own(3, (1.0, 2.5), False, Colour.RED, Path("x/y"), True, [0.0, 1.0])
    assert [type(value) for value in (*found.pair, *found.shares)] == 4 * [float]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("count", "3", "count=3: must be an integer above 0"), ("count", 3.0, "count=3.0: must be an integer above 0"),
        ("count", True, "count=true: must be an integer above 0"), ("count", 0, "count=0: must be an integer above 0"),
        ("count", None, "count=null: must be an integer above 0"),
        ("count", 10**18, "count=1000000000000000000: must have at most 18 digits"),
        ("pair", [1], "pair=[1]: must be a list of 2: a number, a number"),
        ("pair", "ab", "pair=ab: must be a list of 2: a number, a number"),
        ("pair", [1, True], "pair=[1, true]: must be a list of 2: a number, a number"),
        ("switch", 1, "switch=1: must be true or false"), ("switch", "yes", "switch=yes: must be true or false"),
        ("colour", "blue", "colour=blue: must be Colour"), ("mode", 1, "mode=1: must be 'auto', true or false"),
        ("mode", 1.0, "mode=1.0: must be 'auto', true or false"),
        ("mode", "x\x1b\n", "mode=x\\u001b : must be 'auto', true or false"),
        ("shares", [1, 2, 3], "shares=[1, 2, 3]: must be a list of 2, each item a number"),
        ("shares", [1, "a"], 'shares=[1, "a"]: must be a list of 2, each item a number'),
        ("shares", [1, 1e39], f"shares=[1, 1e+39]: {IN_FLOAT32}"),
        ("shares", [1, float("nan")], f"shares=[1, NaN]: {IN_FLOAT32}"),
        ("count", 13, "Own: 13 is unlucky"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_the_key_the_value_and_what_is_allowed(key, value, said):
    with pytest.raises(UserError) as error:
        build(Own, {"count": 3, key: value})
    assert str(error.value) == said


def test_a_key_without_a_default_is_asked_for():
    with pytest.raises(UserError, match="count: has no default; set count=VALUE, an integer above 0"):
        build(Own, {})


@pytest.mark.parametrize("key", list(load("digits").keys()))
def test_a_value_that_no_key_takes_is_told_by_each_with_what_it_takes(key):
    with pytest.raises(UserError) as error:
        load("digits", [f"{key}={{a: [b]}}"])
    said = str(error.value)
    assert said.startswith(f'{key}={{"a": ["b"]}}: ')
    assert re.search(r": must be \S|: unknown; .*(use|are) |: is not a subclass of fastil.Method", said)
    assert "Annotated" not in said
    assert "<" not in said


@pytest.mark.parametrize("value", [[1, 2, 0], (1, 2, 0)])
def test_values_of_python_are_taken_as_those_of_a_text(value):
    import numpy as np

    wanted = load("digits", ["mean=[1, 2, 0]", "epochs=3", "lr=0.5", "data='x'"]).keys()
    given = {"mean": np.array(value), "epochs": np.int64(3), "lr": np.float64(0.5), "data": Path("x")}
    assert load("digits", given).keys() == load("digits", given | {"mean": value}).keys() == wanted
    assert from_python("x") == "x"
    with pytest.raises(UserError, match=r"^epochs=3: must be an integer above 0$"):
        load("digits", {"epochs": "3"})


def test_what_a_type_allows_is_said_in_words():
    assert allowed(PositiveInt | None) == "an integer above 0 or null"
    assert allowed(Annotated[float, Field(ge=0, lt=1)]) == "a number of at least 0 and below 1"
    assert allowed(list[Annotated[int, Field(le=3)]]) == "a list, each item an integer of at most 3"
    assert allowed(str | bool) == "text or true or false"
    assert allowed(Annotated[int, Field(description="a prime")]) == "a prime"


def test_a_long_value_is_cut_in_a_message():
    assert len(shown("x" * 10_000)) <= 200
    assert len(shown(list(range(1000)))) <= 200


# Everything at once

# Text that YAML 1.1, Python or a user's eye may take for something else.
TRAPS = [
    "12:30:45", "1_000", "0o7", "0x1F", "0b1", "007", "010", "yes", "no", "on", "off", "Yes", "NO", "y", "n", "1e3",
    "1e-3", "1.5e3", "1E+2", ".5", "5.", "+3", "-0", "--1", "1e999", "-1e999", "1e39", "1e-46", "1e30", ".inf",
    "-.inf", ".nan", "NaN", "inf", "nan", "2020-01-01", "2020-13-45", "2001-12-14t21:59:43.10-05:00", "=", "<<", "~",
    "Null", "NULL", "None", "none", "True", "TRUE", "tRue", "truth", "", " ", " 5", "5 ", "5 # five", "#5", "x #y",
    "'5'", '"5"',
    "'yes'", "''", '""', "'a''b'", '"a\\nb"', '"\\0"', '"\\uD800"', '"\\UFFFFFFFF"', '"\\x"', "!!int 5", "!!int abc",
    "!!float x", "!!timestamp 5", "!!binary x", "!!python/object/apply:os.getcwd []", "!x 5", "! 5", "&a 5", "*a", "&a",
    "? a", "? [a]", "- 5", "- - 5", "a: b", "a: b: c", "--- 5", "...", "%YAML 1.1", "%YAML " + 5000 * "9" + ".1", "@x",
    "`x", "{a: 1}", "{1: 2}", "{a: 1, a: 2}", "{? [a]: 1}", "[1, 2", "[1]]", "[]", "[[1]]", "[null]", "[true, false]",
    "[a, b]", "[0.6, 0.4]", "[0.2, 0.4]", "[1_0, 0o7]", "[3, 3, 3, 1]", "[0, 0]", "[yes, no]", "[1e400]", "[2, 0, 1]",
    "'", '"', "[", "{", "}", ",", ":", "a:", ":b", "a\nb", "a\r\nb", "a\tb", "\t", "a\u2028b", "a\x85b", "a\x00b",
    "\ufeff5", "\x1b[31m5", "\u0663", "\uff15", "5\u00a0", "\udcff", "\U0001f40d", 5000 * "9", "0." + 5000 * "3",
    "1e" + 30 * "9", "-" + 400 * "1", 20_000 * "[", 20_000 * "{a: ", 3000 * "- ", "[" + 20_000 * "1," + "1]",
    3000 * "x",
    300 * "x" + ".py:y", "a" * 300 + ":b", "/" + 5000 * "y", "9" * 18, "9" * 19, "1" + 30 * "0", "4294967296", "1e18",
    "1000000000", "999999999999999999", "-1", "0", "1", "2", "3.0", "0.1", "-0.5", "100000", "true", "false", "null",
    "lucir", "lucir2", "lucir3", "lucir4", "natural", "seed7", "seed-1", "seed07", "seed4294967296", "alphabetical",
    "nowhere:x", "nowhere.py:x", "fastil.nowhere:x", ":x", "x:", "..:x", "cuda", "cuda:99999999999999999999", "cpu:1",
    "meta", "null ", "~x", "a=b", "=", "\\", "$x", "%x", "|\n 5", ">\n 5", "|", "''' '''", "5,", ",5", "1,5", "1 000",
]  # fmt: skip
ALPHABET = "0123456789.eE+-_xo:,[]{}#&*!|>'\"%@` \n\tabnulytrfs~=/\\"
USUAL = {int: ["1", "2", "3", "5", "20"], float: ["0.5", "1", "2.0", "1e-3", "0"], bool: ["true", "false"]}


def drawn_value(draw, before):
    """The text of a value for a key whose value was `before`."""
    kind = draw.random()
    if kind < 0.45:
        return draw.choice(USUAL.get(type(before), [str(before), "null"]))
    if kind < 0.8:
        return draw.choice(TRAPS)
    text = list(draw.choice([*TRAPS[:60], json.dumps(before)]))
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(text))
        text[place : place + draw.randint(0, 2)] = draw.choice(ALPHABET)
    return "".join(text)


def meant(text, value):
    """Whether the text says this value, told without a YAML parser."""
    if value is None:
        return text in ("null", "Null", "NULL", "~")
    if isinstance(value, bool):
        return text in (str(value), str(value).lower(), str(value).upper())
    if isinstance(value, list | tuple):
        parts = re.split(r",\s*", text.strip()[1:-1].strip().rstrip(",")) if text[0] == "[" else text.split("- ")[1:]
        parts = [part.strip() for part in parts if part.strip()]
        return len(parts) == len(value) and all(map(meant, parts, value))
    if isinstance(value, int | float):
        digits = r"(0|[1-9][0-9]*)"
        number = digits if isinstance(value, int) else rf"({digits}?\.[0-9]+|{digits}\.?)([eE][-+]?[0-9]+)?"
        return re.fullmatch(f"[-+]?{number}", text) is not None and type(value)(text) == value
    if not isinstance(value, str):
        return False
    if text[:1] == "'" == text[-1:]:
        return text[1:-1].replace("''", "'") == value
    if text[:1] == '"' == text[-1:]:
        return json.loads(text) == value
    if text[:1] in "|>":
        return text[1:].strip() == value
    return text == value


def drawn_input(draw, names, folder, number):
    """A recipe, KEY=VALUE settings, and what is meant by each key that a single text says."""
    name = draw.choice(names)
    keys = load(name).keys()
    chosen = draw.choices([*keys, *keys, "unknown", "lr ", "", "base", "1"], k=draw.choice([1, 1, 1, 2, 3]))
    said = {key: drawn_value(draw, keys.get(key)) for key in chosen}
    data = [f"data={folder}"] if keys["dataset"] == "folder" and "data" not in said else []
    if draw.random() < 0.6:
        return name, [*data, *(f"{key}={text}" for key, text in said.items())], said
    lines = [f"{key}: {text}" for key, text in said.items()] + [f"base: {name}"]
    if draw.random() < 0.1:
        lines += [draw.choice(["- a", "x", "epochs: 1\nepochs: 2", "1: 2", "? [a]\n: b", "a: &a [*a]", "<<: {lr: 3}"])]
    draw.shuffle(lines)
    path = folder.parent / f"mine{number}.yaml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape", newline="")
    # In a file a comment may follow, blanks do not count, and a text with line breaks says more than one value.
    one_line = {key: text for key, text in said.items() if not re.search("[\n\r\x85\u2028]", text)}
    return str(path), data, {key.strip(): text.partition(" #")[0].strip() for key, text in one_line.items()}


def test_whatever_is_written_is_a_plan_or_one_line_and_no_value_is_taken_for_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "speeds", lambda *_: Speeds(Rates(1000.0, 500.0)))  # which a plan measures
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "data", classes=20, train=3, val=1)
    count, draw, outcomes, slowest = 5000 if SOAK else 250, random.Random(17), collections.Counter(), (0.0, "")
    for number in range(count):
        name, overrides, said = drawn_input(draw, recipe_file.names(), folder, number)
        began = time.process_time()
        try:
            loaded = load(name, overrides)
            estimate.plan_text(loaded)
            outcomes["planned"] += 1
            for key, text in said.items():
                assert meant(text, loaded.keys()[key]), (key, text, loaded.keys()[key])
        except UserError as error:
            line = str(error)
            assert line == one_line(line), (name, overrides)
            assert len(line) < 6000, (name, overrides)  # a path is not cut
            outcomes["refused in one line"] += 1
        slowest = max(slowest, (time.process_time() - began, f"{name} {overrides}"[:200]))
    with capsys.disabled():
        print(f"\n{count} drawn settings: {dict(outcomes)}, 0 tracebacks, 0 values taken for another; ", end="")
        print(f"the slowest took {slowest[0]:.1f} s of CPU")
    assert outcomes["planned"] > count / 50
    assert not SOAK or slowest[0] < 10, slowest
