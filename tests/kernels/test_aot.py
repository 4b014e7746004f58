"""What the ahead-of-time check measures, and that it fails when it must. It compiles, which the interpreter that the
other tests run in forbids, so it runs in processes of its own."""

import json
from pathlib import Path

import pytest
from conftest import environment

from fastil.kernels.aot import access_widths, compare

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "kernels" / "aot_table.json"
VERSION = pytest.importorskip("triton").__version__
CASE = "incremental_loss teacher bf16 104"


@pytest.fixture(scope="module")
def python(forks):
    return lambda *arguments, **variables: forks.run(arguments, ROOT, environment() | variables)


@pytest.fixture(scope="module")
def aot(python):
    return lambda *arguments, **variables: python("-m", "fastil.kernels.aot", *arguments, **variables)


@pytest.fixture(scope="module")
def with_table(python):
    """The check of one case with another table."""

    def run(path, *arguments):
        arguments = ["--only", CASE, "--arch", "90", *arguments]
        code = (
            "import sys; from pathlib import Path; from fastil.kernels import aot\n"
            f"aot.TABLE = Path({str(path)!r}); sys.exit(aot.main({arguments!r}))"
        )
        return python("-c", code)

    return run


def test_a_case_keeps_the_limits_and_the_committed_figures_on_every_architecture(aot):
    """`make test` runs the check of everything."""
    process = aot("--check", "--only", CASE)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.splitlines()[-1] == f"triton {VERSION}: 3 binaries, 0 problems"


# --- the table ---


@pytest.fixture(scope="module")
def updated(with_table, tmp_path_factory):
    """A table that --update wrote with one case on one architecture."""
    path = tmp_path_factory.mktemp("update") / "table.json"
    process = with_table(path, "--update")
    assert process.returncode == 0, process.stdout + process.stderr
    return path.read_text()


@pytest.fixture
def figures(updated):
    return json.loads(updated)


def test_a_figure_worse_than_the_tables_fails_and_is_named(with_table, figures, tmp_path):
    doctored = figures[VERSION]["sm_90"][CASE]
    registers = doctored["registers"]
    doctored["registers"] -= 1
    doctored["loads"]["TEACHER"] *= 2
    (tmp_path / "table.json").write_text(json.dumps(figures))
    process = with_table(tmp_path / "table.json", "--check")
    assert process.returncode == 1
    failed = [line for line in process.stdout.splitlines() if line.startswith("FAILED")]
    assert failed == [
        f"FAILED {CASE} sm_90: registers {registers}, in the table {registers - 1}",
        f"FAILED {CASE} sm_90: loads TEACHER 8, in the table 16",
    ]


def test_a_better_figure_passes_and_is_mentioned(with_table, figures, tmp_path):
    figures[VERSION]["sm_90"][CASE]["registers"] += 1
    (tmp_path / "table.json").write_text(json.dumps(figures))
    process = with_table(tmp_path / "table.json", "--check")
    assert process.returncode == 0
    assert f"better: {CASE} sm_90: registers" in process.stdout
    assert "--update" in process.stdout


def test_update_rewrites_the_selected_entries_of_the_installed_version_only(with_table, figures, tmp_path):
    wanted = figures[VERSION]["sm_90"][CASE]
    other = {"registers": 1}
    table = {
        "0.1": {"sm_90": {CASE: other}},
        VERSION: {
            "sm_80": {CASE: other},
            "sm_90": {CASE: other, "herd 500": other, "a case that is gone": other},
        },
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert with_table(tmp_path / "table.json", "--update").returncode == 0
    assert json.loads((tmp_path / "table.json").read_text()) == {
        "0.1": {"sm_90": {CASE: other}},
        VERSION: {"sm_80": {CASE: other}, "sm_90": {CASE: wanted, "herd 500": other}},
    }


def test_without_figures_of_the_installed_version_the_limits_are_checked_and_that_is_said(with_table, tmp_path):
    (tmp_path / "table.json").write_text('{"0.1": {}}')
    process = with_table(tmp_path / "table.json", "--check")
    assert process.returncode == 0
    assert f"no figures of triton {VERSION}" in process.stdout


def test_comparing_finds_each_kind_of_regression():
    base = {"registers": 60, "stack": 0, "spill_stores": 0, "spill_loads": 0, "barriers": 5}
    widths = {"loads": {"X": 16, "Y": 8}, "stores": {"DX": 16}}
    for figure in base:
        new = base | widths | {figure: base[figure] + 1}
        worse, better, missing = compare({"sm_80": {"a": new}}, {"sm_80": {"a": base | widths}})
        assert worse == [f"a sm_80: {figure} {base[figure] + 1}, in the table {base[figure]}"]
        assert (better, missing) == ([], 0)
    narrow = base | {"loads": {"X": 16, "Y": 4}, "stores": {"DX": 8}}
    worse, better, missing = compare({"sm_80": {"a": narrow, "b": narrow}}, {"sm_80": {"a": base | widths}})
    assert worse == ["a sm_80: loads Y 4, in the table 8", "a sm_80: stores DX 8, in the table 16"]
    assert (better, missing) == ([], 1)


def test_the_table_of_the_installed_version_is_complete(python):
    """A case without figures is checked against the limits only."""
    process = python("-c", "from fastil.kernels.aot_cases import CASES; print(*(c.name for c in CASES), sep='\\n')")
    names = process.stdout.splitlines()
    assert len(set(names)) == len(names) > 0, process.stderr
    table = json.loads(TABLE.read_text())
    if VERSION not in table:
        pytest.skip(f"no figures of triton {VERSION}")
    assert list(table[VERSION]) == ["sm_80", "sm_90", "sm_100"]
    for arch, cases in table[VERSION].items():
        assert {name.split(" #")[0] for name in cases} == set(names), arch


# --- how wide a kernel reads and writes ---

KERNELS = '''
import json, torch, triton, triton.language as tl
from fastil.kernels.jit import launching
from fastil.kernels import aot, aot_cases

@triton.jit(do_not_specialize=["stride"])
def run_time_stride(X, Y, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=tl.arange(0, BLOCK) < stride))

@triton.jit
def constant_stride(X, Y, ROWS, first, W: tl.constexpr, BLOCK: tl.constexpr):
    """X also by one value per program; rows by a pointer that is advanced in a loop."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    chosen = tl.load(X + row * W + tl.load(ROWS + row)).to(tl.float32)
    pointer = X + (row + first) * W
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(tl.load(ROWS)):
        total += tl.load(pointer + col, mask=col < W, other=0.0).to(tl.float32)
        pointer += W
    tl.store(Y + row * W + col, (total + chosen).to(tl.bfloat16), mask=col < W)

@triton.jit
def spilling(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(Y + at, x / tl.sum(x))

def matrix():
    return torch.empty(8, 1000, dtype=torch.bfloat16)

CASES = {
    "run-time": lambda: launching.launch(run_time_stride, (8,), matrix(), matrix(), 1000, num_warps=4, BLOCK=1024),
    "constant": lambda: launching.launch(
        constant_stride, (8,), matrix(), matrix(), torch.empty(8, dtype=torch.int64), 1, num_warps=4, W=1000, BLOCK=1024
    ),
    "spilling": lambda: launching.launch(
        spilling, (1,), torch.empty(8192), torch.empty(8192), num_warps=1, BLOCK=8192
    ),
    "two launches": lambda: (CASES["run-time"](), CASES["run-time"]()),
    "none": lambda: launching.launch(spilling, (0,), matrix(), num_warps=1),
    "broken": lambda: launching.launch(spilling, (1,), 1.0, matrix(), num_warps=1, BLOCK=32),
}

LIMITS = {
    "run-time": {"matrices": ("X", "Y")},
    "constant": {"matrices": ("X", "Y"), "max_registers": 4, "max_barriers": 0},
}
print(json.dumps({name: aot.measure(aot_cases.Case(name, CASES[name], **LIMITS.get(name, {})), 90) for name in CASES}))
'''


@pytest.fixture(scope="module")
def measured(python, tmp_path_factory):
    """Figures and problems of the kernels above."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.py"
    path.write_text(KERNELS)
    process = python("-c", f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_run_time_stride_gives_narrow_accesses_and_a_violation(measured):
    figures, problems = measured["run-time"]
    assert (figures["run-time"]["loads"], figures["run-time"]["stores"]) == ({"X": 2}, {"Y": 2})
    assert problems == [
        "run-time sm_90: loads X 2 bytes at once, must be 16",
        "run-time sm_90: stores Y 2 bytes at once, must be 16",
    ]


def test_a_constant_stride_gives_wide_accesses_beside_single_values_and_in_loops(measured):
    figures, problems = measured["constant"]
    assert (figures["constant"]["loads"], figures["constant"]["stores"]) == ({"X": 16, "ROWS": 8}, {"Y": 16})
    assert problems == [f"constant sm_90: registers {figures['constant']['registers']}, must be at most 4"]


def test_spills_are_found(measured):
    figures, problems = measured["spilling"]
    spilled = {figure: figures["spilling"][figure] for figure in ("stack", "spill_stores", "spill_loads")}
    assert min(spilled.values()) > 0
    assert problems == [f"spilling sm_90: {figure} {count}, must be 0" for figure, count in spilled.items()]


def test_the_launches_of_a_case_are_numbered(measured):
    assert list(measured["two launches"][0]) == ["two launches #1", "two launches #2"]


def test_a_case_that_launches_nothing_or_does_not_compile_is_a_problem(measured):
    assert measured["none"] == [{}, ["none sm_90: launches nothing"]]
    figures, problems = measured["broken"]
    assert figures == {}
    assert len(problems) == 1
    assert problems[0].startswith("broken sm_90: does not compile: ")


PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3
)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	ld.param.b64 	%rd2, [kernel_param_2];
	mov.u32 	%r2, %tid.x;
	mad.wide.u32 	%rd3, %r2, 32, %rd1;  // %rd2
	mov.b64 	%rd4, %rd3;
$L_loop:
	@%p1 ld.global.v8.b32 { %r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17 }, [ %rd4 + 0 ];
	add.s64 	%rd4, %rd4, 1024;
	ld.global.L1::evict_last.v2.b64 	{%rd20, %rd21}, [%rd3+16];
	@%p2 bra 	$L_loop;
	mad.wide.u32 	%rd5, %r1, 4, %rd2;
	ld.global.b32 	%r20, [%rd5];
	mad.wide.u32 	%rd6, %r20, 8, %rd2;
	@!%p1 st.global.v2.b16 [ %rd6 + 0 ], { %rs1, %rs2 };
	cp.async.cg.shared.global [ %r30 + 0 ], [ %rd7 + 0 ], 0x8, %r31;
	selp.b64 	%rd7, %rd6, %rd3, %p1;
	ret;
}
"""


def test_addresses_are_followed_through_loops_moves_and_selections():
    arguments = [("X", "*fp32"), ("n", "i32"), ("Y", "*i32")]
    loads, stores = access_widths(PTX, arguments)
    # X: 32 bytes, 16, and 8 by cp.async from either X or Y; Y: those 8, and 4 at the same address in all lanes.
    assert loads == {"X": 8, "Y": 8}
    assert stores == {"Y": 4}
    assert access_widths(PTX.replace("0x8, %r31", "16, %r31"), arguments)[0] == {"X": 16, "Y": 16}


def test_arguments_that_are_not_the_ptx_parameters_are_an_error():
    for arguments in ([("X", "*fp32"), ("Y", "*i32")], [("n", "i32")], [("X", "*fp32")] * 9):
        with pytest.raises(RuntimeError, match="parameters"):
            access_widths(PTX, arguments)


# --- usage ---


@pytest.mark.parametrize(
    ("arguments", "variables", "word"),
    [
        (["--arch", "75"], {}, "80, 90, 100"),
        (["--only", "no such kernel"], {}, "no such kernel"),
        (["--chekc"], {}, "--chekc"),
        (["--check", "--update"], {}, "--update"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET"),
    ],
)
def test_what_cannot_be_done_is_one_line(aot, arguments, variables, word):
    process = aot(*arguments, **variables)
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert word in process.stderr


def test_without_triton_the_command_that_installs_it_is_named(python):
    code = (
        "import sys, runpy; sys.modules['triton'] = None; sys.argv = ['aot']\n"
        "runpy.run_module('fastil.kernels.aot', run_name='__main__')"
    )
    process = python("-c", code)
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["fastil.kernels.aot: the kernels need Triton: pip install triton"]
