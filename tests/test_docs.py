"""README and docs/: every command parses, every setting exists, every link leads somewhere, all Python compiles.

Commands are parsed by the parser of `fastil` itself and recipes are loaded, in this process; nothing is trained.
"""

import ast
import re
import shlex

import pytest
import typer
import yaml
from conftest import ROOT

from fastil.cli import app
from fastil.errors import UserError
from fastil.methods import METHODS
from fastil.recipe import PARTS, values_of
from fastil.recipe_file import load
from fastil.reproduce import sweep, tables
from fastil.reproduce.scheduler import seeds_of

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/api").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
CLICK = typer.main.get_command(app)
USAGE_ERROR = typer.BadParameter.__mro__[1]
OF_PYTHON = {  # keyword arguments in the text that are no settings
    "resume", "create_graph", "fullgraph", "num_classes", "callback", "n_experiences", "first_exp_with_half_classes",
    "exist_ok", "base",
}  # fmt: skip
PLACE = re.compile(r"[A-Z_]+|\.\.\.|path(/to)?/file\.py:\w+|path\.py:\w+|module:\w+|mine\.py:\w+|DATASET\w*")
OF_OTHERS = ("python main.py", "python script.py")  # commands of other toolboxes, and of the reader


def prose(text):
    """The text without its blocks of code."""
    return FENCE.sub("", text)


def commands(text):
    """Every command in blocks of code and in the text, as one line; whether it is in a block."""
    for language, block in FENCE.findall(text):
        if language in ("", "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield re.sub(r"\s+#( .*)?$", "", line).strip(), True
    for span in SPAN.findall(prose(text)):
        yield " ".join(span.split()), False
    for line in re.findall(r"^    (\w[^\n]*)", prose(text), re.M):  # a block by its indent
        yield re.sub(r"\s+#( .*)?$", "", line).strip(), True


def fastil_of(command):
    """The arguments of `fastil` in a command, or None. torchrun starts it as a module."""
    found = re.search(r"(?:^|-m )fastil (.*)", command)
    return None if found is None else shlex.split(re.sub(r'"\$\w+"|\$\w+', "X", found[1].strip("' &")))


def is_place(value):
    return PLACE.fullmatch(value) is not None


def recipe_of(name):
    """The name of a recipe, or of one that has the keys which files and runs of the reader's have."""
    ours = is_place(name) or name.startswith("runs/") or name.endswith(".yaml") or "/" in name
    return "digits" if ours and not name.startswith("first30") else name.replace("first30.yaml", "cifar100_balanced_5")


def settings_of(given):
    return [setting for setting in given if not is_place(setting) and not is_place(setting.partition("=")[2])]


def check_fastil(arguments, whole):
    """Parse a command. whole: it is in a block, so nothing may be missing."""
    if not arguments or arguments[0].startswith("-"):
        assert arguments in ([], ["--version"], ["--help"]), arguments
        return
    name, *rest = arguments
    if name in ("run", "plan", "sweep") and not rest and not whole:
        return
    command = CLICK.commands[name]
    try:
        context = command.make_context(name, list(rest), resilient_parsing=not whole)
    except USAGE_ERROR as error:
        pytest.fail(f"fastil {shlex.join(arguments)}: {error.format_message()}")
    given = context.params
    if name in ("run", "plan") and given["recipe"]:
        load(recipe_of(given["recipe"]), settings_of(given["overrides"] or ()))
    if name == "recipes" and given["name"] and not is_place(given["name"]):
        load(given["name"])
    if name == "sweep" and given["recipe"] and not is_place(given["recipe"]):
        sweep.table_of(given["recipe"], settings_of(given["settings"] or ()), None)
    if name == "reproduce" and given["table"]:
        tables.only(
            tables.table_of(tables.read_tables(), given["table"], given["scale"]), given["only"] or [], given["steps"]
        )
    if name == "download" and given["name"] and not is_place(given["name"]):
        assert given["name"] in ("cifar10", "cifar100")
    if given.get("seeds"):
        seeds_of(given["seeds"])


def check_module(name, rest):
    """A module of bench/, or of the kernels, and the options that it is given."""
    path = ROOT / (name.removeprefix("fastil.").replace(".", "/") + ".py")
    assert path.is_file(), f"python -m {name}: no {path}"
    texts = "".join(p.read_text() for p in (path, ROOT / "bench/harness.py", ROOT / "bench/house.py"))
    for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
        assert option in texts, f"python -m {name}: no {option}"


def check(command, whole):
    """Check a command, if it is one of fastil's. Returns whether it is."""
    arguments = None if command.startswith("fastil.") else fastil_of(command)
    if command.startswith(OF_OTHERS):
        return False
    if arguments is not None or command == "fastil":
        check_fastil(arguments or [], whole)
        return True
    module = re.search(r"python3? -m ((?:bench|fastil)\.[\w.]+)(.*)", command)
    if module is not None:
        if module[1] == "bench.NAME":
            return False
        check_module(*module.groups())
        return True
    script = re.match(r"python3? ([\w./]+\.py)", command)
    if script is not None:
        assert (ROOT / script[1]).is_file(), command
        return True
    target = re.match(r"make ([a-z-]+)(?: |$)", command)
    if target is not None:
        assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.M), command
        return True
    return False


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Where the paths of examples are from."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page):
    wrong = []
    for command, whole in commands(page.read_text()):
        try:
            check(command, whole)
        except (UserError, AssertionError, KeyError, ValueError, pytest.fail.Exception) as error:
            wrong.append(f"{command}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_wrong_command_is_found():
    """What the test above is made of fails where it should, and sees the commands that are there."""
    for command in (
        "fastil run digits exemplars=5", "fastil run digitz", "fastil report runs/* --htlm", "fastil runn digits",
        "fastil reproduce table5", "fastil sweep digits los=softmax,balanced", "fastil download cifar DIR",
        "fastil run digits method=examples/your_own_method.py:Nothing", "python -m bench.nothing", "make everything",
        "python -m bench.kernels --no-such-option", "python examples/none.py", "fastil convert SOURCE",
    ):  # fmt: skip
        with pytest.raises((UserError, AssertionError, KeyError, ValueError, pytest.fail.Exception)):
            check(command, True)
    text = (ROOT / "README.md").read_text()
    assert sum(check(*found) for found in commands(text)) >= 15


def known_keys():
    configs = [*PARTS.values(), *(method.Config for method in METHODS.values() if method.Config is not None)]
    return {key for config in configs for key in values_of(config())} | {"fixed_share", "smoothing"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_in_the_text_is_a_key(page):
    known = known_keys() | OF_PYTHON
    spans = [span for span in SPAN.findall(prose(page.read_text())) if "(" not in span and "python main.py" not in span]
    keys = {key for span in spans for key in re.findall(r"(?:^| )([a-z][a-z_]*)=", span)}
    assert keys <= known, keys - known


def anchors(path):
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    found = re.findall(r"^#+ (.*)", FENCE.sub("", path.read_text()), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in found)
    return {re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target
        in_site = page.is_relative_to(ROOT / "docs")
        assert not in_site or file.is_relative_to((ROOT / "docs").resolve()), f"{target}: not in the site"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles(page):
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(block)


@pytest.mark.parametrize("example", ["your_own_method", "label_smoothing"])
def test_a_method_in_the_docs_is_the_example_that_runs(example):
    code = (ROOT / f"examples/{example}.py").read_text().partition('"""\n\n')[2]
    assert code in (ROOT / "docs/extending.md").read_text()


def test_the_method_in_the_readme_is_one(tmp_path):
    (code,) = (b for _, b in FENCE.findall((ROOT / "README.md").read_text()) if "class FixedShare" in b)
    (tmp_path / "mine.py").write_text(code)
    method = f"{tmp_path}/mine.py:FixedShare"
    assert load("digits", [f"method={method}"]).procedure.name == method


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 8000


def test_every_page_is_in_the_site():
    config = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())

    def listed(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in listed(part)]

    pages = set(listed(yaml.safe_load(config)["nav"]))
    docs = ROOT / "docs"
    assert pages == {str(p.relative_to(docs)) for p in docs.rglob("*.md") if not p.is_relative_to(docs / "runs")}


def test_the_citation_names_this_version_and_the_papers_third():
    import fastil

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == fastil.__version__
    assert "2103.12532v3" in cited["preferred-citation"]["url"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


def test_the_hooks_of_the_table_are_those_of_the_class():
    """Each public function and declaration of Method is told in docs/extending.md, and nothing else is."""
    from fastil.methods import Method

    shared = {"begin_step", "loss", "backward", "formula", "kernel_arguments", "unfused_loss", "freeze_old_rows"}
    own = {name for name in vars(Method) if not name.startswith("_")} - shared
    text = (ROOT / "docs/extending.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", text.partition("### All hooks")[2].partition("### How it is found")[0], re.M)
    told = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert own - {"ranking_weight"} == told
    assert "`ranking_weight`" in text
