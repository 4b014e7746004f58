"""What `bench.launch_counts` counts, against figures worked out by hand."""

import os
from dataclasses import replace

import pytest
import torch
from conftest import SOAK

from bench import contestants
from bench.cases import Case
from bench.contestants import AUTOGRAD, COMPILED, EAGER, FASTIL, KERNELS, LIGER, LOSS, entrants, peers_here
from bench.kernel_results import must_move
from bench.kernels import check, count, relative_error
from bench.loss_contestants import gradient_in_float64, make_call

CPU = torch.device("cpu")


SMALL = {"augment": (6, 9, 9), "herd": (3, 30, 30), "pod_spatial": (4, 8, 8), "step": (4, 24, 20)}  # else 6x24x20


def small(kernel, dtype, batch=None):
    rows, *rest = SMALL.get(kernel, (6, 24, 20))
    return Case(batch or rows, *rest, dtype, kernel)


@pytest.fixture(autouse=True)
def small_photos(monkeypatch):
    """Triton's interpreter takes minutes for photos of ImageNet's size."""
    monkeypatch.setattr(contestants, "PHOTO", (53, 61))
    monkeypatch.setattr(contestants, "BOX", 40)


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
    run = entrants(LOSS, (), None)[FASTIL]
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
    for name, run in entrants(LOSS, peers_here(), None).items():
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
    count = counting.count_call(entrants(LOSS, (AUTOGRAD,), None)[AUTOGRAD], Case(4, 24, 20, "fp32"))
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
    assert relative_error(gradient_in_float64(call), reference) < 1e-7  # the weights are float32
    for name, run in entrants(LOSS, peers_here(), None).items():
        with counting.counted():
            result = run(call)
        assert relative_error(result, reference) <= tolerance, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the GPU is for machines without one")
def test_inductor_generates_code_for_a_gpu_that_is_not_there():
    pytest.importorskip("triton")
    cases = [Case(128, 104, 100, dtype) for dtype in ("fp32", "bf16")[not SOAK :]]
    counts = count("compiled", [*cases, small("less_forget", "fp32")], (EAGER, COMPILED))
    assert isinstance(counts, list), counts
    assert all(list(found) == [COMPILED] for found in counts)
    *single, half, little = [found[COMPILED]["bytes"] for found in counts]
    assert sum(little) >= must_move(small("less_forget", "fp32"))
    assert 2 <= len(half) <= 20
    logits = 128 * 104
    # Forward and backward both read logits and teacher, and one writes the gradient.
    assert 5 * logits * 2 <= sum(half) <= 26 * logits
    for moved in single:
        assert len(moved) == len(half)
        assert 5 * logits * 4 <= sum(moved) <= 40 * logits


CASES = [small(name, dtype) for name, kernel in KERNELS.items() for dtype in kernel.dtypes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_kernel_and_peer_computes_what_it_should_while_it_is_counted(counting, case):
    kernel = KERNELS[case.kernel]
    for name, run in entrants(kernel, peers_here(), None).items():
        call = kernel.make(case, CPU, 1)
        with counting.counted() as count:
            result = run(call)
        check(result, call, case, name)
        assert count.bytes, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_counts_at_a_size_are_those_on_the_line_through_two_smaller_ones(counting, case):
    kernel = KERNELS[case.kernel]
    for name in entrants(kernel, (EAGER, AUTOGRAD), None):
        counted = counting.count_few(name, replace(case, batch=13))
        found = counting.count_interpreted(name, replace(case, batch=13))
        assert (len(found.bytes), found.waits) == (len(counted.bytes), counted.waits), name
        assert sum(found.bytes) == pytest.approx(sum(counted.bytes), rel=0.01), name


def test_a_kernel_moves_what_must_be_moved_and_results_of_a_few_bytes(counting):
    def moved(name, dtype, extra):
        case = small(name, dtype)
        (one,) = counting.count_few(FASTIL, case).bytes
        assert one == must_move(case) + extra

    moved("less_forget", "fp32", 6 * 4)  # each row's part of the loss
    moved("less_forget", "bf16", 6 * 4)
    moved("herd", "fp64", 3 * 8 + 3 * 20 * 8)  # counts and picks
    moved("crop_resize", "uint8", 6 * 12 * 8)  # the table
    # Two rows and columns of every image are not read, for they lie outside.
    outside = 6 * 3 * (9 * 9 - 7 * 7)
    moved("augment", "fp32", 6 * (8 + 2 * 8 + 1) + 2 * 3 * 4 - outside)  # ids, corners, flips; mean and std


def test_an_optimiser_in_one_launch_reads_gradients_and_writes_parameters_and_momentum(counting):
    weight = torch.ones(10, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weight.sum().backward()
    optimizer.step()
    count = counts_of(optimizer.step, counting)
    assert count == counting.Count([10 * 4 * (3 + 2)], 0)


def test_a_peer_that_fails_says_why_and_fastil_must_be_counted(counting, monkeypatch):
    def broken(name, case):
        if name in wrong:
            raise RuntimeError("no such thing\nand more")
        return counting.Count([8.0], 0)

    monkeypatch.setattr(counting, "count_interpreted", broken)
    wrong = {EAGER}
    found = counting.counts("interpreted", small("less_forget", "fp32"), (EAGER, COMPILED, LIGER))
    assert found == {FASTIL: {"bytes": [8.0], "waits": 0}, EAGER: {"failed": "RuntimeError: no such thing"}}
    assert counting.counts("compiled", small("herd", "fp64"), (EAGER, COMPILED)) == {}
    wrong = {FASTIL}
    with pytest.raises(RuntimeError, match="no such thing"):
        counting.counts("interpreted", small("less_forget", "fp32"), ())
