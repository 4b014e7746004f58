"""The bench of the kernels: what it counts, against figures worked out by hand, and what it makes of times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SOAK

from bench import kernels, loss_contestants
from bench.gpu_timing import percentiles
from bench.loss_contestants import AUTOGRAD, EAGER, FASTIL, Case, contestants, gradient_in_float64, make_call

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def counting():
    """bench.launch_counts, where Triton runs in its interpreter."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("counting needs Triton's interpreter, which is off where there is a GPU")
    from bench import launch_counts

    return launch_counts


def counts_of(work, counting):
    with counting.counted() as count:
        work()
    return count


@pytest.mark.parametrize(("width", "classes"), [(104, 100), (37, 37), (1000, 900)])
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_the_training_form_is_one_launch_that_moves_each_byte_once(counting, width, classes, dtype, size):
    run = contestants(compiled=False)[FASTIL]
    few, more = (counting.count_call(run, Case(rows, width, classes, dtype)) for rows in (3, 5))
    assert (len(few.bytes), few.waits) == (1, 0)
    per_row = (more.bytes[0] - few.bytes[0]) / 2
    teacher = min(-(-(classes // 2) // 8) * 8, width)  # its old columns, in vectors of 8
    target, meter = 8, 2 * 4 * 4
    assert per_row == (2 * width + teacher) * size + target + meter
    prior, scalars = 4 * width, 8 + 8 + 4 + 4 + 4
    assert few.bytes[0] - 3 * per_row == prior + scalars


@pytest.mark.parametrize("width", [104, 9000])
def test_the_counts_of_every_contestant_grow_along_a_line(counting, width):
    for name, run in contestants(compiled=False).items():
        small = {rows: counting.count_call(run, Case(rows, width, width - 3, "bf16")) for rows in (2, 4)}
        measured = counting.count_call(run, Case(7, width, width - 3, "bf16"))
        assert counting.along_the_line(small, 7) == measured, name


def test_two_counts_of_different_launches_are_no_line(counting):
    with pytest.raises(ValueError, match="depends on the number of rows"):
        counting.along_the_line({1: counting.Count([1.0]), 2: counting.Count([1.0, 2.0])}, 3)


def test_an_operator_is_a_launch_that_reads_and_writes_its_elements_once(counting):
    x, y = torch.ones(6, 5), torch.ones(5)
    cases = [
        (lambda: x + y, [120 + 20 + 120]),
        (lambda: x * x, [120 + 120]),
        (lambda: x + y.expand(6, 5), [120 + 20 + 120]),
        (lambda: x.to(torch.bfloat16), [120 + 60]),
        (lambda: x.sum(), [120 + 4]),
        (lambda: torch.empty(9).zero_(), [36]),
        (lambda: x.add_(1), [240]),
        (lambda: (x[2:], x.T, x.view(30), x.detach(), torch.empty_like(x)), []),
        (lambda: x[:, :2] * 2, [2 * 6 * 2 * 4]),
    ]
    for work, expected in cases:
        assert counts_of(work, counting) == counting.Count(expected, 0)


def test_reading_a_value_is_a_wait(counting):
    x = torch.ones(3)

    def work():
        assert x.sum() > 0
        x[0].item()
        torch.equal(x, x)

    count = counts_of(work, counting)
    assert count.waits == 3
    assert len(count.bytes) == 3  # sum, comparison, equal


def test_the_autograd_form_adds_a_reduction_and_a_product(counting):
    count = counting.count_call(contestants(compiled=False)[AUTOGRAD], Case(4, 24, 20, "fp32"))
    assert len(count.bytes) == 3
    assert count.bytes[1:] == [4 * 4 + 4, 2 * 4 * 24 * 4 + 4]


def test_counting_leaves_nothing_behind(counting):
    from triton.runtime import interpreter

    before = interpreter.InterpretedFunction.run
    counts_of(lambda: torch.ones(2), counting)
    assert interpreter.InterpretedFunction.run is before


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 8e-3)])
def test_all_contestants_compute_one_gradient(counting, dtype, tolerance):
    call = make_call(Case(5, 43, 41, dtype), CPU, 1)
    z, d, old, rho = call.logits.detach().double(), call.teacher.double(), 20, 20 / 41
    z.requires_grad_()
    counts = torch.tensor([20.0] * 20 + [500.0] * 21 + [0.0] * 2, dtype=torch.float64)
    cross_entropy = torch.nn.functional.cross_entropy(z + counts.log(), call.target)
    old_z, old_d = z[:, :old] / 2, d[:, :old] / 2
    kd = -4 * (old_d.softmax(1) * old_z.log_softmax(1)).sum(1).mean()
    (reference,) = torch.autograd.grad((1 - rho) * cross_entropy + rho * kd, z)
    assert kernels.relative_error(gradient_in_float64(call), reference) < 1e-7  # the weights are float32
    for name, run in contestants(compiled=False).items():
        with counting.counted():
            result = run(call)
        assert kernels.relative_error(result, reference) <= tolerance, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU is for machines without one")
def test_inductor_generates_code_for_a_gpu_that_is_not_there():
    pytest.importorskip("triton")
    code = (
        "import json\n"
        "from bench.launch_counts import count_compiled\n"
        "from bench.loss_contestants import Case\n"
        f"print(json.dumps([count_compiled(Case(128, 104, 100, d)).bytes for d in {('fp32', 'bf16')[not SOAK :]}]))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    *single, half = json.loads(done.stdout)
    assert 2 <= len(half) <= 20
    logits = 128 * 104
    # Forward and backward both read logits and teacher, and one writes the gradient.
    assert 5 * logits * 2 <= sum(half) <= 26 * logits
    for moved in single:
        assert len(moved) == len(half)
        assert 5 * logits * 4 <= sum(moved) <= 40 * logits


def test_a_part_that_cannot_be_counted_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(
        kernels.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "Traceback\nKeyError: 'x'\n")
    )
    assert kernels.count("compiled") == "KeyError: 'x'"


def test_the_model_takes_the_bandwidth_or_the_floor_of_a_launch():
    small, large = Case(128, 104, 100, "fp32"), Case(1024, 21848, 21841, "fp32")
    assert kernels.estimated_us([1000.0, 2000.0], small) == 4.0
    assert kernels.estimated_us([11e6], small) == pytest.approx(1.2 + 2.0)
    assert kernels.estimated_us([300e6], large) == pytest.approx(1.2 + 100)


def test_the_loss_must_move_logits_gradient_and_half_of_the_teacher():
    assert kernels.model_bytes(Case(128, 1000, 1000, "fp32")) == 128 * 1000 * 10
    assert kernels.model_bytes(Case(1024, 104, 100, "bf16")) == 1024 * (208 + 50) * 2


def test_rates_stand_beside_times_and_not_beside_reasons():
    times = {"graph_warm": {"median": 2.0, "p20": 1.0, "p80": 3.0}, "graph_cleared": "cannot be captured: it waits"}
    rated = kernels.with_rates(times, 4_000_000, 4000.0)
    assert rated["graph_warm"] == times["graph_warm"] | {"gb_per_s": 2000.0, "percent_of_copy": 50.0}
    assert rated["graph_cleared"] == times["graph_cleared"]


def test_percentiles_are_those_of_the_values():
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_a_table_lines_up_its_columns():
    text = kernels.table(("name", "us"), [("a", 1.5), ("longer", 12.25)])
    assert text.splitlines() == ["name       us", "a        1.50", "longer  12.25"]


def test_the_rows_on_paper_add_up_the_launches(monkeypatch):
    case = Case(2, 8, 8, "fp32")
    monkeypatch.setattr(kernels, "CASES", [case])
    (row,) = kernels.paper_rows([{EAGER: {"bytes": [160, 320.0], "waits": 1}}])
    assert row == {
        "case": "2 x 8 fp32",
        "contestant": EAGER,
        "launches": 2,
        "host_waits": 1,
        "bytes_per_logit": 30.0,
        "estimated_us": 4.0,
    }


@pytest.fixture
def no_timers(monkeypatch):
    """The GPU part on the CPU, with its timers replaced: everything between them runs."""

    class Graph:
        def replay(self):
            self.result.detach().copy_(self.work())

    def graph_of(work):
        graph = Graph()
        graph.work, graph.result = work, work()
        return graph, graph.result

    def measure(works, rounds):
        for work in works:
            work()
        return {mode: percentiles([2.0]) for mode in kernels.MODES}

    replaced = {"graph_of": graph_of, "measure": measure, "launches": lambda work: 1, "waits": lambda work: 0}
    for name, function in (replaced | {"peak_bytes": lambda work: 0}).items():
        monkeypatch.setattr(kernels, name, function)
    monkeypatch.setattr(
        kernels, "contestants", lambda: {EAGER: loss_contestants.backward_of(loss_contestants.formulas)}
    )


def test_the_timing_of_the_loss_checks_every_contestant(no_timers, monkeypatch):
    case = Case(6, 24, 20, "fp32")
    result = kernels.time_loss(case, CPU, 1000.0, 1)[EAGER]
    assert result["relative_error"] <= 1e-6
    assert result["stream"]["gb_per_s"] == pytest.approx(kernels.model_bytes(case) / 2e3)

    def wrong(call):
        return call.logits.detach() * 0

    monkeypatch.setattr(kernels, "contestants", lambda: {"peer": wrong})
    assert "peer at 6 x 24 fp32: relative error" in kernels.time_loss(case, CPU, 1000.0, 1)["peer"]["failed"]
    monkeypatch.setattr(kernels, "contestants", lambda: {FASTIL: wrong})
    with pytest.raises(ValueError, match="fastil at 6 x 24 fp32: relative error"):
        kernels.time_loss(case, CPU, 1000.0, 1)


def test_every_other_kernel_has_arguments_that_its_plain_form_takes(no_timers):
    for name, arguments in kernels.other_kernels(CPU).items():
        result = kernels.time_other(name, arguments(), 1)
        assert result["relative_difference"] == 0, name  # on the CPU the operator is its plain form
        assert {"triton", "plain"} <= set(result)


def test_a_whole_step_runs_with_either_loss(no_timers):
    assert set(kernels.whole_step(CPU, 1, batch=8)) == {"kernel", "formulas"}
