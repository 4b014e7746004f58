"""What every kernel compiles to, without a GPU: registers, spills, barriers, and how wide it reads and writes.

python -m fastil.kernels.aot            the figures of every case (aot_cases.py) on sm_80, sm_90 and sm_100
python -m fastil.kernels.aot --check    exit 1 if a limit is violated or a figure is worse than in aot_table.json
python -m fastil.kernels.aot --update   write the figures of the installed version of Triton into that table

The launchers of fastil.kernels.jit run as they are, on CPU tensors, with a `launch` that compiles only: no launch
configuration is written twice. Registers and stack are cuobjdump's, spills, barriers and the number of instructions
nvdisasm's (both tools are part of Triton's wheel), and the widths are read from the PTX.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastil.errors import UserError

if TYPE_CHECKING:
    from fastil.kernels.aot_cases import Case

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
TABLE = Path(__file__).with_name("aot_table.json")
COUNTS = ("registers", "stack", "spill_stores", "spill_loads", "barriers")  # the fewer the better

Figures = dict[str, Any]  # COUNTS, "instructions", and "loads" and "stores": bytes per access by argument
Results = dict[str, dict[str, Figures]]  # by architecture, then case


class Target:
    """A driver for a GPU that is not there: it answers what Triton asks in order to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> object:
        """Return the compile target."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Return a device number."""
        return self.arch  # Triton remembers a target per device, so every architecture is another device

    def get_current_stream(self, device: int) -> int:
        """Return 0."""
        return 0


@contextmanager
def only_compiling(arch: int) -> Iterator[list[Any]]:
    """Make launches of fastil.kernels.jit only compile, for an architecture, inside the block. Yields the list of
    compiled kernels, to which each launch appends.
    """
    import triton

    from fastil.kernels.jit import launching

    real_launch: Any = launching.launch
    compiled: list[Any] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
        def compile_only(*args: object, **options: object) -> None:
            if "UPCAST" in options:  # the interpreter's detour, which launchers take for tensors on the CPU
                options["UPCAST"] = False
            compiled.append(kernel.warmup(*args, grid=grid, **options))

        real_launch({grid: compile_only}, grid, *args, **options)

    modules: list[Any] = [module for name, module in sys.modules.items() if name.startswith("fastil.kernels.jit.")]
    modules = [module for module in modules if hasattr(module, "launch")]
    triton.runtime.driver.set_active(Target(arch))
    for module in modules:
        module.launch = launch
    try:
        yield compiled
    finally:
        for module in modules:
            module.launch = real_launch


def figures(kernel: Any) -> Figures:
    """Return the figures of a compiled kernel. Raises RuntimeError if the tools print something unexpected."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        # Without -ndf nvdisasm takes half as long again to analyse branches, which nothing here needs.
        usage, listing = (
            subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout
            for command in ((tools / "cuobjdump", "-res-usage"), (tools / "nvdisasm", "-c", "-ndf"))
        )
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    # A line reads "        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;".
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", listing, re.MULTILINE)
    if used is None or not opcodes:
        raise RuntimeError("cuobjdump or nvdisasm prints something else than it used to")
    count = Counter(opcodes)
    arguments = [(name, kind) for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    loads, stores = access_widths(kernel.asm["ptx"], arguments)
    return {
        "registers": int(used[1]),
        "stack": int(used[2]),
        "spill_stores": count["STL"],
        "spill_loads": count["LDL"],
        "barriers": count["BAR"],
        "instructions": len(opcodes),
        "loads": loads,
        "stores": stores,
    }


STATEMENT = re.compile(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*)")
ACCESS = re.compile(r"(ld|st|atom|red)\.(?:[\w:]+\.)*?global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[a-z]+(\d+)(?:x(\d))?$")
REGISTER = re.compile(r"%[a-z]+\d*")  # matches %tid of %tid.x


def access_widths(ptx: str, arguments: list[tuple[str, str]]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes that a thread moves at once: the least over all loads, and over all stores, by argument.

    arguments: name and Triton type ("*bf16", "i32") of those left after specialisation, which are the first parameters
    of the PTX. An address is followed back, through the arithmetic that made it, to the pointers it came from. If a
    kernel reads tiles of a matrix and also one value per program (the target's logit, at the same address in all
    lanes), only the tiles count. Raises RuntimeError if parameters and arguments do not match.
    """
    found = re.findall(r"^\s*\.param \.\w+( \.ptr)?.*_param_\d+", ptx, re.MULTILINE)
    is_pointer = [bool(mark) for mark in found][: len(arguments)]
    if is_pointer != [kind.startswith("*") for _, kind in arguments]:
        raise RuntimeError(f"these arguments are not the parameters of the PTX: {arguments}")
    values: dict[str, set[str]] = defaultdict(set)  # by register: registers and parameters that its value depends on
    origins: dict[str, set[str]] = defaultdict(set)  # the same, without conditions and what leads to a load
    accesses: list[tuple[str, int, str]] = []
    for text in re.split(r"[;\n]", re.sub(r"//.*", "", ptx)):
        statement = STATEMENT.match(text.strip())
        if statement is None:
            continue
        opcode, operands = statement.groups()
        if access := ACCESS.match(opcode):
            width = int(access[2] or 1) * int(access[3]) * int(access[4] or 1) // 8
            accesses.append(("loads" if access[1] == "ld" else "stores", width, operands[operands.index("[") :]))
        elif opcode.startswith("cp.async") and "shared.global" in opcode:
            _, source, size = operands.split(",")[:3]
            accesses.append(("loads", int(size, 0), source))
        if opcode.startswith(("st.", "red.", "cp.", "bar.", "bra")):
            continue
        target, rest = re.match(r"(\{[^}]*\}|[^,]+)(.*)", operands).groups()  # type: ignore[union-attr]
        sources = set(REGISTER.findall(rest)) | set(re.findall(r"_param_(\d+)", rest))
        for register in REGISTER.findall(target):
            values[register] |= sources
            if opcode.startswith("ld.param") or not opcode.startswith(("ld.", "atom.")):
                origins[register] |= {source for source in sources if not source.startswith("%p")}
    widths: dict[tuple[str, str], dict[bool, int]] = defaultdict(dict)  # by kind and argument, then per lane or not
    for kind, width, operands in accesses:
        address = REGISTER.findall(operands)[0]
        per_lane = not _reached(address, values).isdisjoint(("%tid", "%laneid"))
        for source in _reached(address, origins):
            if source.isdigit() and is_pointer[int(source)]:
                known = widths[kind, arguments[int(source)][0]]
                known[per_lane] = min(width, known.get(per_lane, width))
    least = {key: known.get(True, known.get(False, 0)) for key, known in widths.items()}
    names = [name for name, _ in arguments]
    loads, stores = ({n: least[kind, n] for n in names if (kind, n) in least} for kind in ("loads", "stores"))
    return loads, stores


def _reached(start: str, sources: dict[str, set[str]]) -> set[str]:
    seen, todo = {start}, [start]
    while todo:
        new = sources.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def measure(case: "Case", arch: int) -> tuple[dict[str, Figures], list[str]]:
    """Return the figures of a case's binaries by name (several are numbered), and lines that say what is wrong."""
    try:
        with only_compiling(arch) as kernels:
            case.call()
    except Exception as error:  # of many types, from the front end to ptxas; the first cause says most
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return {}, [f"{case.name} sm_{arch}: does not compile: {reason}"]
    measured, problems = {}, [] if kernels else [f"{case.name} sm_{arch}: launches nothing"]
    for number, kernel in enumerate(kernels, 1):
        name = f"{case.name} #{number}" if len(kernels) > 1 else case.name
        measured[name] = figures(kernel)
        problems += [f"{name} sm_{arch}: {problem}" for problem in case.violations(kernel, measured[name])]
    return measured, problems


def _measure(job: tuple[str, int]) -> tuple[dict[str, Figures], list[str]]:
    from fastil.kernels.aot_cases import CASES

    name, arch = job
    return measure(next(case for case in CASES if case.name == name), arch)


def compare(results: Results, table: Results) -> tuple[list[str], list[str], int]:
    """Return lines on figures worse than the table's, lines on better ones, and how many binaries it lacks."""
    worse: list[str] = []
    better: list[str] = []
    missing = 0
    for arch, cases in results.items():
        for name, new in cases.items():
            old = table.get(arch, {}).get(name)
            if old is None:
                missing += 1
                continue
            pairs = [(figure, old[figure], new[figure], new[figure] - old[figure]) for figure in COUNTS]
            for kind in ("loads", "stores"):
                both = [argument for argument in new[kind] if argument in old[kind]]
                pairs += [(f"{kind} {a}", old[kind][a], new[kind][a], old[kind][a] - new[kind][a]) for a in both]
            for figure, before, now, loss in pairs:
                if loss:
                    (worse if loss > 0 else better).append(f"{name} {arch}: {figure} {now}, in the table {before}")
    return worse, better, missing


def show(results: Results) -> None:
    """Print the figures as a table, a line per binary."""
    names = dict.fromkeys(name for cases in results.values() for name in cases)
    size = max(map(len, names), default=0)
    print(f"{'case':{size}}  arch    regs stack  STL  LDL  BAR  SASS  bytes per load; per store")
    for name in names:
        for arch in results:
            if f := results[arch].get(name):
                counts = "".join(f"{f[figure]:5}" for figure in (*COUNTS, "instructions"))
                widths = "; ".join(", ".join(f"{k} {v}" for k, v in f[kind].items()) for kind in ("loads", "stores"))
                print(f"{name:{size}}  {arch:6} {counts}  {widths}")


def write(table: dict[str, Results]) -> None:
    """Write the table, one line per binary, so that a changed binary is one changed line."""
    text = json.dumps(table, indent=1)
    TABLE.write_text(re.sub(r"\n {4,}", " ", re.sub(r"\n {3}\}", " }", text)) + "\n")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are fastil's."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(message)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 for a violated limit or, with --check, a figure worse than the table's; else 0."""
    parser = Parser(prog="python -m fastil.kernels.aot", description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the table and exit 1 if anything is worse")
    action.add_argument("--update", action="store_true", help="write the table of the installed version of Triton")
    parser.add_argument("--arch", action="append", help="80, 90 or 100; may be repeated (default: all)")
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="cases with PATTERN in their name (* is anything)"
    )
    given = parser.parse_args(arguments)
    for arch in given.arch or ():
        if arch not in map(str, ARCHITECTURES):
            raise UserError(f"--arch {arch}: choose from {', '.join(map(str, ARCHITECTURES))}")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("TRITON_INTERPRET is set, and with its interpreter Triton cannot compile: unset it")
    if find_spec("triton") is None:
        raise UserError("the kernels need Triton: pip install triton")
    import triton

    from fastil.kernels.aot_cases import CASES

    names = [case.name for case in CASES if fnmatch.fnmatchcase(case.name, f"*{given.only}*")]
    if not names:
        raise UserError(f"--only {given.only}: none of the {len(CASES)} cases is called so; {CASES[0].name} is one")
    jobs = [(name, arch) for arch in ARCHITECTURES if not given.arch or str(arch) in given.arch for name in names]
    if len(jobs) < 8:  # a worker needs seconds to import torch and Triton
        measured = list(map(_measure, jobs))
    else:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            measured = list(pool.map(_measure, jobs))
    results: Results = {}
    problems: list[str] = []
    for (_, number), (binaries, wrong) in zip(jobs, measured, strict=True):
        results.setdefault(f"sm_{number}", {}).update(binaries)
        problems += wrong
    table: dict[str, Results] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    version = triton.__version__
    if not given.check:
        show(results)
    if given.update:
        kept = {case.name for case in CASES} - set(names)  # cases that no longer exist leave the table
        for sm, binaries in results.items():
            before = table.setdefault(version, {}).get(sm, {})
            rest = {name: old for name, old in before.items() if name.split(" #")[0] in kept}
            table[version][sm] = dict(sorted((rest | binaries).items()))
        write(table)
    elif given.check and version not in table:
        print(f"limits only: {TABLE.name} has no figures of triton {version} to compare with (--update adds them)")
    elif given.check:
        worse, better, missing = compare(results, table[version])
        problems += worse
        for line in better:
            print(f"better: {line}")
        if better or missing:
            print(f"--update would write {len(better)} better figures and {missing} binaries that the table lacks")
    for line in problems:
        print(f"FAILED {line}")
    print(f"triton {version}: {sum(map(len, results.values()))} binaries, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        status = main()
    except UserError as error:
        print(f"fastil.kernels.aot: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status)
