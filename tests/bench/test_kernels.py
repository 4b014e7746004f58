"""The bench of the kernels: what is chosen, what it makes of times and counts, its CSV and its plot."""

import csv
import json
import subprocess
from dataclasses import replace

import pytest
import torch
from PIL import Image

from bench import contestants, kernel_results, kernels
from bench.cases import Case, read_shape
from bench.contestants import AUTOGRAD, COMPILED, EAGER, FASTIL, KERNELS, LIGER, LOSS
from bench.gpu_timing import percentiles
from bench.kernel_results import entry, estimated_us, must_move, rows_of, with_rates, write_csv

CPU = torch.device("cpu")
CASE = Case(6, 24, 20, "fp32")


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """What the options choose, on a machine without a GPU and with Liger-Kernel: cases and peers."""

    def run(*words):
        seen = []
        monkeypatch.setattr(kernels, "peers_here", lambda: contestants.PEERS)
        monkeypatch.setattr(kernels, "pick_device", lambda name: CPU)
        monkeypatch.setattr(kernels, "on_paper", lambda device, cases, peers: seen.append((cases, peers)) or [])
        kernels.main(words)
        return seen[0]

    return run


def test_by_default_every_kernel_runs_in_its_shapes_and_dtypes_against_all_peers(chosen):
    cases, peers = chosen()
    assert {case.kernel for case in cases} == {
        "incremental_loss", "augment", "crop_resize", "herd", "pod_spatial", "less_forget", "cosine_head",
        "alpha_hypergradient", "step",
    }  # fmt: skip
    assert {
        (case.batch, case.width, case.classes, case.dtype) for case in cases if case.kernel == "incremental_loss"
    } == {(*shape, dtype) for shape in LOSS.shapes for dtype in ("fp32", "bf16")}
    assert peers == (EAGER, COMPILED, LIGER, AUTOGRAD)


def test_the_options_choose(chosen):
    words = "--kernel augment --kernel less_forget --shape 64x48 --shape 7x33x20 --dtype bf16 --peer eager --peer eager"
    cases, peers = chosen(*words.split())
    assert cases == [
        Case(64, 48, 48, "bf16", "augment"), Case(7, 33, 20, "bf16", "augment"),
        Case(64, 48, 48, "bf16", "less_forget"), Case(7, 33, 20, "bf16", "less_forget"),
    ]  # fmt: skip
    assert peers == (EAGER,)
    cases, _ = chosen("--dtype", "bf16")  # herd has none, and nobody asked for it
    assert {case.dtype for case in cases} == {"bf16"}
    assert "herd" not in {case.kernel for case in cases}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--kernel herdd", "--kernel herdd: there is no such one; use incremental_loss, augment, crop_resize, herd"),
        ("--dtype fp16", "--dtype fp16: there is no such one; use fp32, bf16, fp64"),
        ("--peer liger", "--peer liger: there is no such one; use eager, torch.compile, Liger-Kernel, fastil-autograd"),
        ("--peer Liger-Kernel", "--peer Liger-Kernel: it is not installed; pip install liger-kernel"),
        ("--kernel herd --dtype bf16", "--dtype bf16: herd works in fp64"),
        ("--kernel step --kernel augment --dtype fp64", "--dtype fp64: step works in bf16, fp32"),
        ("--rounds 0", "--rounds 0: must be at least 1"),
        ("--shape 128", "--shape 128: give BxW or BxWxCLASSES, such as 128x1000 or 128x104x100"),
        ("--shape 128x", "--shape 128x: give BxW"),
        ("--shape 0x10", "--shape 0x10: give BxW"),
        ("--shape -1x10", "--shape -1x10: give BxW"),
        ("--shape 4x10x11", "--shape 4x10x11: 11 classes; there must be from 2 to W, which is 10"),
        ("--shape 4x10x1", "--shape 4x10x1: 1 classes; there must be from 2 to W"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(chosen, monkeypatch, capsys, words, error):
    monkeypatch.setattr(contestants, "PEERS", (EAGER, COMPILED, AUTOGRAD))  # what is here
    with pytest.raises(SystemExit) as stopped:
        chosen(*words.replace(" -1", "=-1").split())
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(error)
    assert said.count("\n") == 1


@pytest.mark.parametrize("shape", [(128, 1000, 1000), (5, 7, 3)])
def test_a_shape_is_read_as_it_is_written(shape):
    assert read_shape(Case(*shape, "fp32").shape) == shape


def test_a_part_that_cannot_be_counted_says_why(monkeypatch):
    def failing(*arguments, **keys):
        return subprocess.CompletedProcess(arguments, 1, "", "Traceback\nKeyError: 'x'\n")

    monkeypatch.setattr(kernels.subprocess, "run", failing)
    assert kernels.count("compiled", [CASE], (EAGER,)) == "KeyError: 'x'"


def test_the_model_takes_the_bandwidth_or_the_floor_of_a_launch():
    small, large = Case(128, 104, 100, "fp32"), Case(1024, 21848, 21841, "fp32")
    assert estimated_us([1000.0, 2000.0], small) == 4.0
    assert estimated_us([11e6], small) == pytest.approx(1.2 + 2.0)
    assert estimated_us([300e6], large) == pytest.approx(1.2 + 100)
    assert estimated_us([50e6], replace(small, kernel="step")) == pytest.approx(1.2 + 50 / 3)  # from its own bytes


def test_what_must_move_is_what_goes_in_and_comes_out():
    assert must_move(Case(128, 1000, 1000, "fp32")) == 128 * 1000 * 10  # logits, gradient, half of the teacher
    assert must_move(Case(1024, 104, 100, "bf16")) == 1024 * (208 + 50) * 2
    assert must_move(replace(CASE, kernel="augment")) == 6 * 24 * 24 * 3 * (1 + 4)
    assert must_move(replace(CASE, kernel="step")) is None


def test_rates_stand_next_to_times_and_not_next_to_reasons():
    times = {"graph_warm": {"median": 2.0, "p20": 1.0, "p80": 3.0}, "graph_cleared": "cannot be captured: it waits"}
    rated = with_rates(times, Case(1000, 400, 400, "fp32"), 4000.0)
    assert rated["graph_warm"] == times["graph_warm"] | {"gb_per_s": 2000.0, "percent_of_copy": 50.0}
    assert rated["graph_cleared"] == times["graph_cleared"]
    assert with_rates(times, replace(CASE, kernel="step"), 4000.0) == times


def test_percentiles_are_those_of_the_values():
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_estimates_are_rows_that_say_they_were_not_measured(tmp_path):
    counts = {FASTIL: {"bytes": [160, 320.0], "waits": 1}, EAGER: {"failed": "RuntimeError: out of memory"}}
    write_csv(tmp_path / "x.csv", kernels.estimate(Case(2, 8, 6, "fp32"), counts))
    with (tmp_path / "x.csv").open() as file:
        ours, theirs = csv.DictReader(file)
    assert {key: value for key, value in ours.items() if value} == {
        "kernel": "incremental_loss", "shape": "2x8x6", "dtype": "fp32", "contestant": FASTIL, "mode": "estimate",
        "measured": "false", "median_us": "4", "launches": "2", "host_waits": "1", "moved_bytes": "480",
    }  # fmt: skip
    assert (theirs["note"], theirs["median_us"]) == ("failed: RuntimeError: out of memory", "")


def test_measured_rows_hold_every_mode_and_what_was_found_of_the_call():
    times = {"stream": {"median": 3.0, "p20": 2.0, "p80": 5.0, "gb_per_s": 9.0, "percent_of_copy": 4.0},
             "graph_warm": "cannot be captured: the host waits for the device 5 times"}  # fmt: skip
    found = entry(
        CASE, LIGER, measured=True, launches=36, host_waits=5, peak_bytes=100, relative_error=1e-7, times=times
    )
    stream, warm = rows_of([found])
    assert stream == {
        "kernel": "incremental_loss", "shape": "6x24x20", "dtype": "fp32", "contestant": LIGER, "measured": True,
        "mode": "stream", "median_us": 3.0, "p20_us": 2.0, "p80_us": 5.0, "gb_per_s": 9.0, "percent_of_copy": 4.0,
        "launches": 36, "host_waits": 5, "peak_bytes": 100, "relative_error": 1e-7,
    }  # fmt: skip
    assert warm["note"] == "cannot be captured: the host waits for the device 5 times"
    assert "median_us" not in warm
    assert set(stream) | set(warm) <= set(kernel_results.COLUMNS)


def timed(case, name, us, mode="graph_warm"):
    return entry(case, name, measured=True, times={mode: {"median": us, "p20": us / 2, "p80": us * 2}})


def test_the_plot_has_a_panel_for_each_kernel_dtype_and_batch(tmp_path, monkeypatch):
    drawn = []
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: drawn.append(self))
    entries = [timed(Case(128, width, width, "fp32"), FASTIL, width / 10) for width in (1000, 100)]
    entries += [timed(Case(128, width, width, "fp32"), LIGER, width, "stream") for width in (100, 1000)]
    entries += [timed(Case(128, 100, 100, "bf16"), name, us) for name, us in ((FASTIL, 2.0), (EAGER, 50.0))]
    entries.append(entry(CASE, FASTIL, measured=True, failed="it did"))
    kernel_results.draw(tmp_path / "x.png", entries, "a title")
    (figure,) = drawn
    lines, bars = figure.axes
    assert figure.legends[0].get_title().get_text() == "a title"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [FASTIL, f"{LIGER} (from Python)", EAGER]
    assert (lines.get_title(), bars.get_title()) == (
        "incremental_loss, fp32, B = 128",
        "incremental_loss, bf16, B = 128",
    )
    assert {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines.get_lines()} == {
        FASTIL: ([100, 1000], [10.0, 100.0]), f"{LIGER} (from Python)": ([100, 1000], [100, 1000]),
    }  # fmt: skip
    assert (lines.get_xscale(), lines.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in bars.get_yticklabels()] == [FASTIL, EAGER]
    assert [bar.get_width() for bar in bars.patches] == [2.0, 50.0]
    drawn.clear()
    kernel_results.draw(tmp_path / "x.png", entries[-1:], "nothing was measured")
    assert not drawn


def test_without_a_gpu_the_same_options_are_counted_and_the_files_say_so(monkeypatch, tmp_path, capsys):
    """The whole command, the process that counts included."""
    monkeypatch.setenv("FASTIL_RESULTS", str(tmp_path))
    monkeypatch.setattr(kernels, "pick_device", lambda name: CPU)
    pytest.importorskip("triton")
    words = "--kernel less_forget --shape 5x12 --dtype fp32 --peer eager"
    kernels.main(words.split())
    assert "NO TIME WAS MEASURED" in capsys.readouterr().out
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["contestant"] for row in rows] == [FASTIL, EAGER]
    assert {(row["kernel"], row["shape"], row["dtype"], row["measured"], row["note"]) for row in rows} == {
        ("less_forget", "5x12", "fp32", "false", "")
    }
    assert rows[0]["moved_bytes"] == str(3 * 5 * 12 * 4 + 5 * 4)  # features, teacher, gradient; each row's loss
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["note"].startswith("no time was measured")
    assert [found["launches"] for found in content["entries"]] == [int(row["launches"]) for row in rows]
    with Image.open(tmp_path / "kernels.png") as image:
        assert image.width > 300


@pytest.fixture
def no_timers(monkeypatch):
    """The GPU part on the CPU, with its timers replaced: everything between them runs."""

    class Graph:
        def replay(self):
            for part, new in zip(*map(torch.utils._pytree.tree_leaves, (self.result, self.work())), strict=True):
                part.detach().copy_(new)

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
    monkeypatch.setattr(kernels, "copy_gb_per_s", lambda rounds: percentiles([1000.0]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def with_loss(monkeypatch, **forms):
    monkeypatch.setitem(KERNELS, "incremental_loss", replace(LOSS, contestants=forms, compiled=None))


def test_the_timing_of_the_loss_checks_every_contestant(no_timers, monkeypatch):
    (found,) = kernels.time_case(CASE, (), CPU, 1000.0, 1)
    assert found["relative_error"] <= 1e-6
    assert found["times"]["stream"]["gb_per_s"] == pytest.approx(must_move(CASE) / 2e3)

    def wrong():
        return lambda call: call.logits.detach() * 0

    with_loss(monkeypatch, fastil=LOSS.contestants[FASTIL], eager=wrong)
    ours, theirs = kernels.time_case(CASE, (EAGER,), CPU, 1000.0, 1)
    assert "failed" not in ours
    assert theirs["failed"] == "incremental_loss 6x24x20 fp32: relative error 1.0e+00 in a poisoned output"


def test_where_fastil_fails_the_others_are_measured_and_the_bench_says_so(no_timers, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTIL_RESULTS", str(tmp_path))

    def broken():
        raise_it = iter(())
        return lambda call: next(raise_it)

    with_loss(monkeypatch, fastil=broken, eager=LOSS.contestants[EAGER])
    cases = [CASE, replace(CASE, kernel="less_forget")]
    wrong = kernels.on_gpu(CPU, cases, (EAGER,), 1)
    assert wrong == ["incremental_loss 6x24x20 fp32: StopIteration"]
    entries = json.loads((tmp_path / "kernels.json").read_text())["entries"]
    assert ["failed" in found for found in entries] == [True, False, False, False]
    assert (tmp_path / "kernels.csv").exists()


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "incremental_loss"])
def test_every_other_kernel_runs_in_each_dtype(no_timers, name):
    shape = {"augment": (6, 9, 9), "pod_spatial": (4, 8, 8)}.get(name, (5, 24, 20))
    for dtype in KERNELS[name].dtypes:
        for found in kernels.time_case(Case(*shape, dtype, name), (EAGER,), CPU, 1000.0, 1):
            assert found["measured"]
            assert "failed" not in found, found
            assert found["relative_error"] == (None if name == "step" else 0)  # on the CPU both are the plain form


def test_poison_shows_where_a_result_is_not_written():
    kept = torch.ones(3)

    def work():
        return torch.empty(1000), torch.zeros(2, dtype=torch.int64), kept

    blank, zeros, same = kernels.poisoned(work)
    assert blank.shape == (1000,)
    assert not zeros.any()
    assert same is kept
    assert torch.equal(kept, torch.ones(3))
