"""The structure of the code at some commits: rooms, floors, arrows, circles, the longest file and function, lines.

python -m bench.house [COMMIT ...]        default: the commit before the house was rebuilt, and the files as they are

A room is a child of `fastil`, module or package; the two halves of `data` are rooms of their own. An arrow leads from a
room to one that it imports; a room stands one floor above the highest one that it imports. Tools are rooms of one file
that import nothing but other such rooms: errors, text, the losses. Everything may use them.
"""

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grimp

BEFORE = "6bfc9df"
ROOT = Path(__file__).parent.parent
PARTS = ("fastil", "kernels", "tools")


def room(module: str) -> str:
    """Return the room of a module."""
    parts = module.split(".")
    halves = parts[1:3] in (["data", "formats"], ["data", "loaders"])
    return ".".join(parts[: 3 if halves else 2])


def measure(root: Path) -> dict[str, int | str]:
    """Return the figures of a tree. root: a checkout, importable from here."""
    sys.path.insert(0, str(root))
    graph = grimp.build_graph("fastil", cache_dir=None, exclude_type_checking_imports=True)
    arrows: dict[str, set[str]] = {room(module): set() for module in graph.modules if module != "fastil"}
    for a, below in arrows.items():
        inside = (module for module in graph.modules if room(module) == a)
        below |= {room(other) for module in inside for other in graph.find_modules_directly_imported_by(module)}
        below -= {a, "fastil"}
    floors, circle = floors_of(arrows)
    single = {a for a in arrows if not graph.find_children(a)}
    helpers = tools_of({a: below for a, below in arrows.items() if a in single})
    files = [path for part in PARTS for path in (root / part).rglob("*.py") if not path.is_symlink()]
    files = sorted({path.resolve() for path in files})
    lines = {path.relative_to(root.resolve()): path.read_text().count("\n") for path in files}
    functions = [function for path in files for function in functions_of(path)]
    longest_file, longest = max(lines, key=lambda path: lines[path]), max(functions)
    return {
        "modules": len(graph.modules),
        "rooms": len(arrows),
        "floors": floors,
        "arrows": sum(map(len, arrows.values())),
        "rooms that are no tools": len(arrows) - len(helpers),
        "arrows between those": sum(len(below - helpers) for a, below in arrows.items() if a not in helpers),
        "rooms in or above a circle": circle,
        "longest file": f"{longest_file} {lines[longest_file]}",
        "longest function": f"{longest[1]} {longest[0]}",
        "lines": sum(lines.values()),
    }


def floors_of(arrows: dict[str, set[str]]) -> tuple[int, int]:
    """Return the number of floors, and of rooms that have none because they are in a circle or above one."""
    floor: dict[str, int] = {}
    while True:
        found = {
            a: max((floor[b] for b in below), default=-1) + 1 for a, below in arrows.items() if below <= set(floor)
        }
        if found == floor:
            return max(floor.values()) + 1, len(arrows) - len(floor)
        floor = found


def tools_of(arrows: dict[str, set[str]]) -> set[str]:
    """The rooms that import nothing but each other. arrows: of the rooms of one file."""
    found: set[str] = set()
    while more := {a for a, below in arrows.items() if below <= found} - found:
        found |= more
    return found


def functions_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield length and name of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{path.stem}.{node.name}"


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["--measure"]:  # in a process of its own, which has imported no fastil yet
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    from fastil.text import format_table

    found: dict[str, dict[str, int | str]] = {}
    for commit in sys.argv[1:] or [BEFORE, "."]:
        with tempfile.TemporaryDirectory() as folder:
            root = ROOT
            if commit != ".":
                root = Path(folder)
                archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
                subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            command = [sys.executable, "-m", "bench.house", "--measure", str(root)]
            found[commit] = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    rows = [(what, *(str(tree[what]) for tree in found.values())) for what in next(iter(found.values()))]
    print(format_table(("", *("as it is" if commit == "." else commit for commit in found)), rows))


if __name__ == "__main__":
    main()
