"""The commands as a user meets them: what they print, what they write, and one clear line for every mistake."""

import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, assert_user_error, make_folder


@pytest.fixture
def figures(request):
    return request.function is test_run_writes_the_whole_run_directory


def test_run_writes_the_whole_run_directory(fastil, tmp_path):
    process = fastil("run", "digits", "seed=3", *TINY)
    assert process.returncode == 0, process.stderr
    run = tmp_path / "runs/digits-s3"
    results = json.loads((run / "results.json").read_text())
    assert list(results) == [
        "recipe", "method", "loss", "seed", "steps", "average_incremental_accuracy", "final_top1",
    ]  # fmt: skip
    assert (results["recipe"], results["loss"], results["seed"]) == ("digits", "balanced", 3)
    assert [s["classes_seen"] for s in results["steps"]] == [5, 6, 7, 8, 9, 10]
    for step in results["steps"]:
        assert set(step) == {
            "step", "classes_seen", "top1", "top1_base", "top1_old", "top1_new", "top5", "nme_top1",
        }  # fmt: skip
        # Accuracy again from the confusion matrix, rows true classes in incremental order.
        matrix = np.load(run / f"confusion/step_{step['step']}.npy")
        assert matrix.dtype == np.int64
        assert matrix.shape == (step["classes_seen"],) * 2
        assert step["top1"] == pytest.approx(100 * np.trace(matrix) / matrix.sum())
        old = step["classes_seen"] - 1 if step["step"] else 0
        assert step["top1_base"] == pytest.approx(100 * np.trace(matrix[:5, :5]) / matrix[:5].sum())
        assert step["top1_new"] == pytest.approx(100 * np.diag(matrix)[old:].sum() / matrix[old:].sum())
        if step["step"]:
            assert step["top1_old"] == pytest.approx(100 * np.diag(matrix)[:old].sum() / matrix[:old].sum())
        else:
            assert step["top1_old"] is None
    top1 = [s["top1"] for s in results["steps"]]
    assert results["average_incremental_accuracy"] == pytest.approx(sum(top1) / 6)
    assert results["final_top1"] == top1[-1]

    protocol = json.loads((run / "protocol.json").read_text())
    assert sorted(protocol["class_order"]) == list(range(10))
    assert [len(s) for s in protocol["steps"]] == [5, 1, 1, 1, 1, 1]
    assert protocol["dataset"]["train"]["images"] + protocol["dataset"]["val"]["images"] == 1797
    assert re.fullmatch("[0-9a-f]{64}", protocol["dataset"]["train"]["sha256"])
    memory = json.loads((run / "memory/step_5.json").read_text())
    assert {int(c): len(ids) for c, ids in memory.items()} == {c: 2 for c in range(10)}
    earlier = json.loads((run / "memory/step_2.json").read_text())
    assert all(memory[c] == ids for c, ids in earlier.items())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(m["step"], m["epoch"]) for m in metrics] == [(s, e) for s in range(6) for e in (1, 2)]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["epochs"] == 2
    assert recipe["exemplars_per_class"] == 2
    timings = json.loads((run / "timings.json").read_text())
    assert timings["steps"]["1"]["train"] > 0
    for figure in ["accuracy", *(f"confusion_step_{k}" for k in range(6))]:
        assert (run / f"figures/{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.rglob("*.partial"))


def test_plan_without_the_files_uses_the_published_shape(fastil, tmp_path):
    process = fastil("plan", "cifar100_balanced_5", "model=resnet8")
    assert process.returncode == 0, process.stderr
    assert "as published" in process.stdout
    # Section 4.1.1: 50 base classes of 500 images, then five steps of 10; section 4.1.3: 250 epochs of 128.
    visits = 250 * (25_000 + sum(5_000 + 20 * old for old in range(50, 100, 10)))
    assert f"{visits:,}" in process.stdout
    assert re.search(r"^ +0  \+50 = 50 +25,000  0 +250 +49,000  6,250,000$", process.stdout, re.MULTILINE)
    assert re.search(r"^ +5  \+10 = 100 +5,000  1,800 \(20/class\) +250 ", process.stdout, re.MULTILINE)
    assert re.search(r"^lr 0.1 to 0.0001$", process.stdout, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_recipes_lists_the_published_numbers(fastil):
    process = fastil("recipes")
    assert process.returncode == 0
    above, header = re.search("^(.*cifar100 .*)\n(METHOD .*)$", process.stdout, re.MULTILINE).groups()
    ends = [match.end() for match in re.finditer(r" (5|10)\b", header)]
    assert [above[end - len("57.17") :].split()[0] for end in ends[::2]] == ["cifar100", "subimagenet", "imagenet"]
    for name, numbers in (
        ("il_baseline", ["43.80", "37.00", "51.52", "42.22", "43.23", "36.70"]),
        ("podnet_balanced", ["67.67", "66.63", "76.08", "74.93", "69.67", "68.65"]),
        ("icarl_bce", ["-", "-", "", "", "", ""]),
    ):
        line = re.search(rf"^{name} .*$", process.stdout, re.MULTILINE)
        assert line
        assert [line.group()[end - 5 : end].strip() for end in ends] == numbers
    assert re.search(r"^tpcil .* approximation$", process.stdout, re.MULTILINE)
    assert re.search(r"^digits ", process.stdout, re.MULTILINE)
    assert re.search(r"^b0_20_r20 +from scratch 20 x 5 with R = 20$", process.stdout, re.MULTILINE)
    assert re.search(r"^wa +72.81 ± 0.28 +69.46 ± 0.29 +67.33 ± 0.15 +", process.stdout, re.MULTILINE)
    lines = process.stdout.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 80


def test_recipes_prints_all_keys_of_one_which_run_reads_again(fastil, tmp_path):
    from fastil.recipe import About
    from fastil.recipe_file import load

    process = fastil("recipes", "cifar100_lucir_b0_10")
    assert process.returncode == 0, process.stderr
    (tmp_path / "again.yaml").write_text(process.stdout)
    recipe, again = load("cifar100_lucir_b0_10"), load(str(tmp_path / "again.yaml"))
    assert again.keys() == recipe.keys()
    assert again.description == recipe.description
    assert f"# fidelity: {recipe.fidelity}\n" in process.stdout
    assert (again.published, again.fidelity) == (None, About.fidelity)  # of the recipe, not of a file made of it
    assert "# published: 63.37 " in fastil("recipes", "cifar100_lucir_5").stdout
    read, _, unread = process.stdout.partition("# Unused, unless")
    assert {"lucir_lambda", "memory_budget", "milestones"} <= yaml.safe_load(read).keys()
    assert re.search(r"^icarl_beta: 0.25  # with method=icarl$", unread, re.MULTILINE)
    assert_user_error(fastil("recipes", "cifar100_lucri_5"), "unknown recipe", "cifar100_lucir_5")


def test_recipes_prints_the_keys_of_a_run_and_of_a_method_from_outside(tmp_path, monkeypatch):
    """A run's own code is not needed for it, nor imported."""
    from fastil.recipe_file import load
    from fastil.reporting.recipe_list import all_keys

    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nimport fastil\n@dataclass(frozen=True)\nclass Config:\n    spice: int = 3\n"
        "class Mine(fastil.Method):\n    Config = Config\n"
        "    def loss_weights(self, context):\n        return 1.0, 0.0\n"
    )
    (tmp_path / "own.yaml").write_text("base: digits\nmethod: mine.py:Mine\nspice: 5\n")
    monkeypatch.chdir(tmp_path)
    text = all_keys("own.yaml")
    assert {"spice: 5", "model: resnet8"} <= set(text.splitlines())
    (tmp_path / "run").mkdir()
    recipe = load("own.yaml")
    (tmp_path / "run/recipe.yaml").write_text(recipe.in_precision("fp32").dump())
    (tmp_path / "run/protocol.json").touch()
    (tmp_path / "mine.py").unlink()
    assert {"spice: 5", "precision: fp32"} <= set(all_keys("run").splitlines())


def test_help_names_every_command_in_one_whole_line(fastil):
    lines = fastil("--help").stdout.partition("Commands:")[2].splitlines()
    assert len([line for line in lines if line]) == 14
    assert all(line.endswith(".") and not line.endswith("...") and len(line) <= 80 for line in lines if line)


def test_doctor_names_what_is_missing_and_how_to_get_it(fastil):
    process = fastil("doctor")
    assert process.returncode == 0
    assert re.search(r"torch +2\.", process.stdout)
    for line in process.stdout.splitlines():
        if "missing" in line:
            assert "install" in line
    speed = re.search(r"streaming +about ([\d,]+) JPEGs of 500x375 per second", process.stdout)
    smaller = re.search(r"streaming +faster: about ([\d,]+) of 256x256 \(fastil convert --squash 256", process.stdout)
    assert speed
    assert smaller
    assert 0 < int(speed[1].replace(",", "")) < int(smaller[1].replace(",", ""))
    assert "nothing that could be installed is faster on a CPU" in process.stdout or torch.cuda.is_available()


def test_report_groups_seeds_and_pairs_losses(fastil, tmp_path):
    for seed in (0, 1):
        for loss in ("softmax", "balanced"):
            settings = [*TINY, "increment=5", f"loss={loss}", f"seed={seed}"]
            process = fastil("run", "digits", *settings, "--out", f"{loss}{seed}")
            assert process.returncode == 0, process.stderr
    process = fastil("report", "softmax0", "softmax1", "balanced0", "balanced1", "--out", "report", "--html")
    assert process.returncode == 0, process.stderr
    average = {
        name: json.loads((tmp_path / name / "results.json").read_text())["average_incremental_accuracy"]
        for name in ("softmax0", "softmax1", "balanced0", "balanced1")
    }
    pair = np.array([average["balanced0"], average["balanced1"]])
    assert f"{pair.mean():.2f} ± {pair.std(ddof=1):.2f}" in process.stdout
    gain = pair - np.array([average["softmax0"], average["softmax1"]])
    assert f"{gain.mean():+.2f} ± {gain.std(ddof=1):.2f}" in process.stdout
    assert (tmp_path / "report/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report/confusion.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report/report.html").read_text()
    assert 'href="data:image/png;base64,' in page
    assert "http" not in page
    assert "softmax0: given twice, used once" in fastil("report", "softmax0", "softmax0").stdout


def test_a_published_number_stands_only_beside_the_recipe_it_belongs_to(tmp_path):
    from fastil.recipe_file import differences, load

    assert differences(load("cifar100_balanced_5", ["seed=4", "device=cpu"], data="elsewhere")) == {}
    assert differences(load("cifar100_balanced_5", ["epochs=20"])) != {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "digit"], ["unknown recipe digit", "digits"]),
        (["run", "digits", "exemplars=3"], ["unknown key exemplars", "exemplars_per_class"]),
        (["run", "digits", "base=5"], ["unknown key base", "base_classes"]),
        (["run", "digits", "epochs"], ["KEY=VALUE"]),
        (["run", "digits", "epochs=many"], ["epochs", "integer"]),
        (["run", "digits", "epochs=0"], ["epochs=0", "above 0"]),
        (["run", "digits", "loss=balansed"], ["loss", "softmax", "balanced"]),
        (["run", "digits", "base_classes=11"], ["base_classes=11", "10 classes"]),
        (["run", "digits", "increment=2"], ["increment=2", "1 or 5", "[2, 2, 1]"]),
        (["run", "digits", "increment=[2, 2]"], ["increment=[2, 2]", "5 classes", "not 4"]),
        (["plan", "digits", "base_classes=0", "increment=1"], ["base_classes=0", "base_classes=1 increment=1"]),
        (["plan", "digits", "base_classes=4", "increment=4"], ["increment=4", "[4, 2]"]),
        (["run", "digits", "order=[dog, cat]"], ['order=["dog", "cat"]', "no class dog", "0, 1, 2"]),
        (["run", "digits", "exemplars_per_class=0"], ["exemplars_per_class=0", "loss=balanced", "set loss=softmax"]),
        (["run", "digits", "exemplars_per_class=-1"], ["exemplars_per_class=-1", "of at least 0"]),
        (["run", "digits", "batch_size=1000000000"], ["batch_size=1000000000", "GiB", "lower batch_size"]),
        (["plan", "digits", "batch_size=1000000000"], ["batch_size=1000000000", "GiB", "lower batch_size"]),
        (["run", "digits", "method=lucir", "head=cosine", "lucir_rivals=1e30"], ["lucir_rivals=1e+30", "an integer"]),
        (["run", "digits", "lr=12:30:45"], ["lr=12:30:45", "a number above 0"]),
        (["run", "digits", "lr=!!int abc"], ["lr=!!int abc", "tags"]),
        (["run", "digits", "subset=lucir", "order=natural"], ["subset=lucir with order=natural", "subset=null"]),
        (["run", "digits", "subset=lucir"], ["ImageNet's 1000"]),
        (["run", "digits", "order=icarl"], ["order=icarl", "100 classes"]),
        (["run", "digits", "memory_budget=100"], ["exemplars_per_class", "memory_budget"]),
        (["run", "digits", "exemplars_per_class=null", "memory_budget=9"], ["memory_budget=9", "raise it"]),
        (["run", "digits", "device=cuda"], ["device=cuda", "device=cpu"]),
        (["run", "digits", "milestones=[2]"], ["milestones"]),
        (["run", "fashion-mnist", "--data", "nowhere"], ["nowhere"]),
        (["run", "folder"], ["--data"]),
        (["run", "folder", "--data", "nowhere"], ["nowhere", "--data"]),
        (["run", "cifar100_balanced_5"], ["fastil download cifar100"]),
        (["run", "cifar100_balanced_5", "--data", "."], ["fastil download cifar100"]),
        (["plan", "digits", "increment=3"], ["increment=3"]),
        (["report", "nowhere"], ["nowhere"]),
        (["download", "cifar1000", "x"], ["cifar1000", "cifar100"]),
        (["run"], ["RECIPE"]),
        (["run", "digits", "--bogus"], ["--bogus"]),
        (["run", "digits", "device=meta"], ["device=meta", "cpu"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_2(fastil, tmp_path, arguments, words):
    assert_user_error(fastil(*arguments), *words)
    assert not (tmp_path / "runs").exists()


def test_bad_files_are_named(fastil, tmp_path):
    data = make_folder(tmp_path / "data")
    broken = data / "train/class1/2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    settings = [*TINY, "size=12", "model=resnet8", "base_classes=2", "increment=1", "exemplars_per_class=2"]
    assert_user_error(fastil("run", "folder", *settings, "--data", data), "class1/2.png", "on_corrupt=skip")
    process = fastil("run", "folder", *settings, "on_corrupt=skip", "--data", data)
    assert process.returncode == 0, process.stderr
    assert "class1/2.png" in process.stdout
    one = make_folder(tmp_path / "one", classes=1)
    assert_user_error(fastil("run", "folder", "--data", one, "--out", "other"), "class0", "two classes")


def test_a_cifar_file_cut_short_or_malicious_is_refused_and_runs_nothing(fastil, tmp_path):
    data = tmp_path / "cifar-100-python"
    data.mkdir()

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    for name in ("meta", "test"):
        (data / name).write_bytes(pickle.dumps({b"fine_label_names": [b"a", b"b", b"c", b"d"]}))
    (data / "train").write_bytes(pickle.dumps({b"data": Evil()}))
    run = ["run", "cifar100_balanced_5", "--data", tmp_path]
    assert_user_error(fastil(*run), "md5", "verify=false")
    assert_user_error(fastil(*run, "verify=false"), "train", "refused")
    assert not (tmp_path / "canary").exists()
    good = pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": [0, 1, 2, 3]})
    (data / "train").write_bytes(good[: len(good) // 2])
    assert_user_error(fastil(*run, "verify=false"), "train", "download it again")


def test_without_a_cxx_compiler_training_runs_and_says_so(tmp_path, monkeypatch, capsys):
    from fastil.recipe_file import load
    from fastil.training.experiment import Experiment

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    recipe = load("digits", [*TINY, "compile=true", "increment=5"])
    Experiment(recipe, tmp_path / "run", resume=False).run()
    assert "no C++ compiler" in capsys.readouterr().out
    assert not json.loads((tmp_path / "run/timings.json").read_text())["compiled"]


def test_an_ascii_terminal_ends_nothing():
    code = "from fastil import cli; cli.app = lambda *_, **__: print('52.1 ± 0.3'); cli.main()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"52.1 ? 0.3\n"), done.stderr


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--lr", "lr=VALUE"),
        ("--n_epochs", "epochs=VALUE"),
        ("--n-epochs", "epochs=VALUE"),
        ("--nowand", "track="),
        ("--buffer_size", "memory_budget=N exemplars_per_class=null"),
    ],
)
def test_an_option_that_is_a_setting_here_is_answered_with_it(fastil, option, said):
    process = fastil("run", "digits", option, "5")
    assert_user_error(process, f"No such option: {option}. Settings are written KEY=VALUE: ", said)
