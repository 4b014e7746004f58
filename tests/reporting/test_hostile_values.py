"""Values that want to be markup or to command a terminal, in every place of a run's files and in names of files."""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import unicodedata
from html.parser import HTMLParser

import pytest
import typer
import yaml
from conftest import SOAK, make_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from fastil import cli
from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.reporting.html import page
from fastil.reporting.report import write_report
from fastil.reporting.runs import Run, group_runs
from fastil.text import Bar, format_table, one_line, plain, say
from fastil.training.experiment import Experiment
from fastil.training.progress import StepBar
from fastil.training.step_plan import StepWork

HOSTILE = (
    '"><script>alert(1)</script>',
    "'><img src=x onerror=alert(1)> onmouseover=alert(1) x='",
    "</pre></style></title></summary>--><svg onload=alert(1)>",
    "&lt;script&gt; &amp; {{ 7 * 7 }} {% raw %} {#",
    "\x1b[31mred\x1b[2J\x1b]0;title\x07",
    "\x9b31m \x00 \x08\x08\x08 \x7f \x85 \u2028",
    "a\rb\nstep 9: 10 classes, top-1 100.00\n",
    "\u202egnp.exe \u2066 \u200f \u061c",
    "$\\frac{1$ %s {0} \\n",
)
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # what Unicode calls them
MARKS = ("LEFT-TO-RIGHT MARK", "RIGHT-TO-LEFT MARK", "ARABIC LETTER MARK", "LINE SEPARATOR", "PARAGRAPH SEPARATOR")


def commands(text):
    """The characters of a text that a terminal or a page may obey instead of showing them."""
    return {
        c
        for c in text
        if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n")
        or unicodedata.bidirectional(c) in TURNS
        or unicodedata.name(c, "") in MARKS
    }


@settings(max_examples=5000 if SOAK else 100, deadline=None, database=None, derandomize=True)
@given(st.text() | st.text(st.sampled_from("".join(HOSTILE))))
def test_the_filter_leaves_no_command_and_changes_nothing_else(text):
    shown = plain(text)
    assert not commands(shown)
    assert shown.encode().decode() == shown
    if not commands(text):
        assert shown == text
    assert "\n" not in one_line(text)
    assert plain(shown) == shown
    assert UserError(text).args == (one_line(text),)


@settings(max_examples=1000 if SOAK else 50, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(), st.text()))
def test_json_stays_the_same_json(content):
    for ascii_only in (False, True):
        assert json.loads(plain(json.dumps(content, ensure_ascii=ascii_only))) == content


@pytest.mark.parametrize("name", HOSTILE)
def test_bars_tables_and_lines_are_plain(monkeypatch, capsys, name):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = StepBar()
    bar.work = [StepWork({"train": 100.0}, 1.0)]
    bar.begin_phase(0, "train", 1, 2)
    bar.epoch(name, 1, 2)
    bar.advance(50)
    bar.begin(name, 100)
    bar.bar.refresh()
    bar.say(name)
    written = sys.stderr.getvalue()
    bar.end()
    assert plain(name).split()[0] in written
    assert commands(written) <= {"\r"}  # the bar's own
    table = format_table(("x", name), [(name, "y"), ("z", name)])
    assert len(table.splitlines()) == 4
    assert not commands(table)
    say(name)
    Bar().say(name)
    assert not commands(capsys.readouterr().out)


class Reader(HTMLParser):
    """Tags with the names of their attributes, and texts, of a page."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.texts = set(), []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add((tag, *sorted(name for name, _ in attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory, without_figures):
    """A small run that has everything a page shows: two steps, and alpha per class."""
    path = tmp_path_factory.mktemp("runs") / "run"
    tiny = ["epochs=1", "base_epochs=1", "batch_size=64", "base_classes=6", "increment=4"]
    Experiment(load("digits", tiny), path, resume=False).run()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["alpha"] = [1.5] * 6
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


FILES = {
    "recipe.yaml": (yaml.safe_load, lambda content: yaml.safe_dump(content, sort_keys=False)),
    "results.json": (json.loads, json.dumps),
    "protocol.json": (json.loads, json.dumps),
    "timings.json": (json.loads, json.dumps),
    "metrics.jsonl": (
        lambda text: [json.loads(line) for line in text.splitlines()],
        lambda lines: "".join(json.dumps(line) + "\n" for line in lines),
    ),
}


def places(content, at=()):
    """The way to every value, and to every key."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(key, str):
                yield (*at, key), True
            yield from places(value, (*at, key))
    else:
        yield at, False


def put(content, way, is_key, value):
    for key in way[:-1]:
        content = content[key]
    if is_key:
        content[value] = content.pop(way[-1])
    else:
        content[way[-1]] = value


def damage(run, to, changes):
    """A copy of the run with these (file, way, is_key, value) put into its files."""
    if not to.exists():
        shutil.copytree(run, to, ignore=lambda *_: ["checkpoints", "figures"])
    for name, (read, written) in FILES.items():
        content = read((run / name).read_text())
        for _, way, is_key, value in sorted((c for c in changes if c[0] == name), key=lambda c: -len(c[1])):
            put(content, way, is_key, value)
        (to / name).write_text(written(content))
    return to


def shown(path, benign):
    """The page of a run and the text of its report, None if it is refused. The page has no other tags and attributes
    than that of the run it was copied from, and nothing that is said or written commands a terminal."""
    refused = ""
    try:
        groups = group_runs([Run(path)])
        document = page(groups, ["a note"])
        text, _ = write_report([path], None, False)
    except UserError as error:
        refused = str(error)
    assert not commands(refused.replace("\n", "\r"))  # and it is one line
    if refused:
        return None
    assert not commands(document)
    assert not commands(text)
    found = Reader(document)
    assert found.tags <= benign.tags, found.tags - benign.tags
    return found, text


@pytest.fixture(scope="module")
def benign(run, tmp_path_factory):
    """The page of a run whose class names are harmless, and as long as others: they stand upright along an axis."""
    names = [("protocol.json", ("class_names", c), False, f"a class called {c}") for c in range(10)]
    path = damage(run, tmp_path_factory.mktemp("benign") / "run", names)
    return Reader(page(group_runs([Run(path)]), ["a note"]))


def test_every_value_of_a_runs_files_is_text_wherever_it_is_shown(run, benign, tmp_path):
    draw, shows = random.Random(0), []
    contents = {name: read((run / name).read_text()) for name, (read, _) in FILES.items()}
    known = [(name, way, is_key) for name, content in contents.items() for way, is_key in places(content)]
    for place in known if SOAK else draw.sample(known, 25):
        path = damage(run, tmp_path / "run", [(*place, f"1{draw.choice(HOSTILE)}2")])
        shows.append(shown(path, benign) is not None)
    assert set(shows) == {True, False}


SHOWN = [  # on the page, as they are
    ("recipe.yaml", ("recipe",), False),
    ("results.json", ("loss",), False),
    *(("protocol.json", ("class_names", c), False) for c in range(10)),
    ("protocol.json", ("class_list_hash",), False),
    ("protocol.json", ("dataset", "name"), False),
    *(("protocol.json", ("effective", 0, key), is_key) for key in ("visits", "epochs") for is_key in (False, True)),
    *(("timings.json", ("steps", "0", key), is_key) for key in ("train", "memory") for is_key in (False, True)),
    ("timings.json", ("steps", "1"), True),
    ("timings.json", ("versions", "torch"), False),
    ("timings.json", ("machine", "device"), True),
]  # fmt: skip
UNSEEN = [
    *(("recipe.yaml", (key,), False) for key in ("description", "fidelity", "data", "val")),
    *(("results.json", (key,), False) for key in ("recipe", "method")),
    *(
        ("protocol.json", ("dataset", split, key), False)
        for split in ("train", "val")
        for key in ("sha256", "identity")
    ),
    *(("metrics.jsonl", (line, "phase"), False) for line in range(2)),
]


@pytest.mark.parametrize("turn", range(len(HOSTILE)))
def test_all_texts_at_once(run, benign, tmp_path, turn):
    values = [f"{n}x{HOSTILE[(n + turn) % len(HOSTILE)]}x{n}" for n in range(len(SHOWN + UNSEEN))]
    changes = [(*place, value) for place, value in zip(SHOWN + UNSEEN, values, strict=True)]
    changes = [(*c[:3], c[3].replace("\0", "")) if c[1] in (("data",), ("val",)) else c for c in changes]  # paths
    found, text = shown(damage(run, tmp_path / "run", changes), benign)
    page_text = "".join(found.texts)
    for (_, _, is_key, value), _ in zip(changes, SHOWN, strict=False):
        wanted = value.replace("_", " ") if is_key else value
        assert plain(wanted) in page_text or one_line(wanted) in page_text
    for value in values[:2]:
        assert one_line(value) in text


def test_report_prints_and_writes_them_plainly(run, tmp_path, capsys):
    names = ["$\\frac{1$", *HOSTILE, "z"][:10]
    changes = [("protocol.json", ("class_names", c), False, name) for c, name in enumerate(names)]
    loss = "".join(HOSTILE)
    changes += [("results.json", ("loss",), False, loss), ("recipe.yaml", ("recipe",), False, loss)]
    path, out = damage(run, tmp_path / "\x1b[2Jrun", changes), tmp_path / "\u202etuo"
    cli.app(["report", str(path), "--out", str(out), "--html"], standalone_mode=False)
    printed = capsys.readouterr()
    assert one_line(loss) in printed.out
    assert "\\u202etuo/report.html" in printed.out
    for text in (*printed, *((out / name).read_text() for name in ("report.md", "report.html"))):
        assert not commands(text)
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png", "confusion.png", "groups.png", "report.html", "report.md"
    ]  # fmt: skip
    assert not commands(repr(Run(path)))


def test_names_in_a_data_set_are_printed_plainly(tmp_path, capsys):
    folder, out = make_folder(tmp_path / "sou\x1b[2Jrce", classes=3), tmp_path / "out\x1b.beton"
    shutil.copy(folder / "train/class0/0.png", folder / "train/class0/a\x1b[31m\u202e\nb.png")
    (folder / "train/class0/damaged\x9b2J\r.png").write_bytes(b"x")

    def printed(*command):
        with contextlib.suppress(SystemExit, typer.Exit):
            cli.app([*map(str, command)], standalone_mode=False)
        said = capsys.readouterr()
        assert not commands(said.out + said.err), command
        return said.out

    def as_json(*command):
        return [json.loads(line) for line in printed(*command, "--json").splitlines()]

    with pytest.raises(UserError, match="damaged") as error:
        printed("convert", folder, out, "--workers", 1)
    assert not commands(str(error.value))
    assert "out\\u001b" in printed("convert", folder, out, "--workers", 1, "--on-corrupt", "skip")
    manifest = tmp_path / "out\x1b.manifest.json"
    content = json.loads(manifest.read_text())
    content["class_names"] = HOSTILE[4:7]
    content["source"]["path"] = content["tool"] = HOSTILE[4]
    content["notes"] = list(HOSTILE)
    manifest.write_text(json.dumps(content))
    told = printed("info", out)
    assert all(one_line(name) in told for name in (*HOSTILE[4:7], *HOSTILE))
    assert len(told.splitlines()) == 7 + len(HOSTILE)
    (found,) = as_json("info", out)
    assert (found["class_names"], found["notes"], found["file"]) == ([*HOSTILE[4:7]], [*HOSTILE], str(out))
    assert "FAILED" not in printed("verify", out, "--workers", 1)
    os.truncate(out, out.stat().st_size - 5000)
    assert "FAILED" in printed("verify", out, "--workers", 1)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", ["report", "plan", "download"])
def test_a_mistake_is_told_in_one_plain_line(monkeypatch, capsys, command, name):
    monkeypatch.setattr(sys, "argv", ["fastil", command, name.replace("\0", "")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert not commands(printed)
