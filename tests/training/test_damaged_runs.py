"""Damaged run directories, each through every command that reads the file: one line that names it and what to do, never
a traceback, and nothing that is there is lost. A resume goes on from what is whole."""

import contextlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import fastil
from fastil.errors import UserError
from fastil.reporting.report import read_whole, write_report
from fastil.reporting.runs import Run
from fastil.training.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("without_figures")

SETTINGS = {
    "classes": 6, "base_classes": 3, "increment": [2, 1], "base_epochs": 1, "epochs": 1, "batch_size": 64,
    "method": "bic", "model": "resnet8", "bic_epochs": 1, "exemplars_per_class": 10, "precision": "fp32",
    "compile": False, "device": "cpu",
}  # fmt: skip
LAST = 2  # step
NAN = float("nan")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three steps, and nothing wrong with it."""
    return fastil.run("digits", out=tmp_path_factory.mktemp("whole") / "run", **SETTINGS).path


def resumed(run):
    return fastil.run("digits", out=run, resume=True, **SETTINGS)


WAYS = {
    "report": lambda run: read_whole(run, figures=True, page=True),
    "predict": lambda run: Run(run).network(),
    "table": lambda run: [Run(run).predictions(step) for step in range(LAST + 1)],
    "resume": resumed,
    "base": lambda run: fastil.run("digits", out=run.with_name("based"), base=run, **SETTINGS),
}


def content(text):
    """Other bytes."""
    return lambda path: path.write_bytes(text)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder(path):
    path.unlink()
    path.mkdir()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def loop(path):
    """What cannot be read, by root either."""
    path.unlink()
    path.symlink_to(path.name)


def gone(path):
    path.unlink()


def other(name):
    return lambda path: shutil.copy(path.parent / name, path)


def changed(**values):
    """JSON with other values, by the place of each."""

    def damage(path):
        whole = json.loads(path.read_text())
        for place, value in values.items():
            *way, last = place.split("__")
            at = whole
            for part in way:
                at = at[int(part) if isinstance(at, list) else part]
            at[last] = value
        path.write_text(json.dumps(whole))

    return damage


def edited(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


def state(change):
    """A .pt file with another content."""

    def damage(path):
        whole = torch.load(path, weights_only=True)
        torch.save(change(whole) or whole, path)

    return damage


class Trace:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


def foreign(path):
    path.write_bytes(pickle.dumps(Trace()))


def poisoned(weights):
    next(v for v in weights.values() if v.is_floating_point()).fill_(NAN)


def narrow(weights):
    weights["head.weight"] = weights["head.weight"][:, :5]


def array(values, dtype=np.int64):
    def damage(path):
        with open(path, "wb") as file:
            np.save(file, np.array(values, dtype=dtype))

    return damage


# 7 TiB, says the header
HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117)
    + b"\n"
)
ALL = "report predict resume base"
DEEP = b"[" * 100_000
P, S = "checkpoints/predictor_2.pt", "checkpoints/step_2.pt"

# File, damage, and the ways that refuse it; all others than these must work, where they are named in brackets.
REFUSED = [
    ("recipe.yaml", content(b""), ALL), ("recipe.yaml", cut, ALL), ("recipe.yaml", folder, ALL),
    ("recipe.yaml", pipe, ALL), ("recipe.yaml", edited("recipe: digits", "recipe: 7"), ALL),
    ("recipe.yaml", edited("recipe: digits", "recipe: [digits]"), ALL),
    ("recipe.yaml", edited("epochs: 1", "epochs: forty"), ALL),
    ("recipe.yaml", content(b"\x80\x05\xff"), ALL), ("recipe.yaml", gone, ALL), ("recipe.yaml", loop, "report predict"),
    ("recipe.yaml", edited("lr:", "lr: 1\nlr:"), ALL), ("recipe.yaml", other("results.json"), ALL),
    ("protocol.json", cut, ALL), ("protocol.json", content(DEEP), ALL), ("protocol.json", gone, ALL),
    ("protocol.json", other("results.json"), ALL), ("protocol.json", folder, ALL),
    ("protocol.json", changed(class_order=[0, 1, 2, 3, 4, 10**12]), ALL),
    ("protocol.json", changed(class_order=[0, 1, 2, 3, 4, 4]), ALL),
    ("protocol.json", changed(class_order=[-1, 1, 2, 3, 4, 5]), ALL),
    ("protocol.json", changed(dataset__train__images=NAN), ALL),
    ("results.json", content(b"null"), "report predict"), ("results.json", other("protocol.json"), "report predict"),
    ("results.json", changed(final_top1=float("inf")), "report predict"), ("results.json", loop, "report predict"),
    ("results.json", changed(loss=5), "report predict"), ("results.json", content(b"9" * 5000), "report predict"),
    ("metrics.jsonl", content(b"7\n"), "report resume base"), ("metrics.jsonl", folder, "report base"),
    ("metrics.jsonl", edited('"loss": ', '"loss": NaN, "was": '), "report base"),

    ("confusion/step_2.npy", content(HUGE), "report"), ("confusion/step_2.npy", content(b""), "report"),
    ("confusion/step_2.npy", array([[1.5]], float), "report"), ("confusion/step_2.npy", foreign, "report"),
    ("confusion/step_2.npy", other("step_1.npy"), "report"), ("confusion/step_2.npy", array(-np.eye(6)), "report"),
    ("predictions/step_1.npy", cut, "table"), ("predictions/step_1.npy", array([[0, 9]], np.int16), "table"),
    ("predictions/step_1.npy", other("step_0.npy"), "table"), ("predictions/step_1.npy", gone, "table"),
    (S, content(b""), "predict"), (S, cut, "predict"), (S, folder, "predict"), (S, foreign, "predict"),
    (S, other("last.pt"), "predict"), (S, state(poisoned), "predict"), (S, state(narrow), "predict"),
    (S, state(lambda weights: [1]), "predict"), (S, state(lambda weights: weights | {1: 2}), "predict"),
    (S, gone, "predict"),
    (P, content(b"PK\x03\x04"), "predict"), (P, other("step_2.pt"), "predict"), (P, foreign, "predict"),
    (P, state(lambda s: {"means": torch.zeros(6, 64)}), "predict"),
    (P, state(lambda s: s | {"num_old": -1}), "predict"),
    (P, state(lambda s: s | {"method": {}}), "predict"), (P, state(lambda s: s | {"counts": "many"}), "predict"),
    (P, gone, "predict"),
    ("checkpoints/step_0.pt", cut, "base"), ("checkpoints/step_0.pt", state(poisoned), "base"),
    ("checkpoints/step_0.pt", gone, "base"),
    ("checkpoints/last.pt", folder, "resume"), ("checkpoints/last.pt", state(lambda s: s | {"format": 99}), "resume"),
]  # fmt: skip


def files_of(run):
    return {
        path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"
    }


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[f"{n}-{name}" for n, (name, *_) in enumerate(REFUSED)])
def test_what_is_damaged_is_named_in_one_line_and_nothing_is_lost(whole, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    name, damage, ways = REFUSED[number]
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damage(run / name)
    before = files_of(run)
    for way in ways.split():
        with pytest.raises(UserError) as caught:
            WAYS[way](run)
        message = str(caught.value)
        assert str(run / name) in message or (name == "metrics.jsonl" and way == "resume"), (way, message)
        assert "\n" not in message
        assert "; " in message, "what to do"
        assert "file an issue" not in message
    assert files_of(run) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "a trace, or a directory of a start that failed"


def assert_same(run, whole):
    """Results, metrics, exemplars and matrices are those of the run that nothing happened to, and the weights."""
    names = [p.relative_to(whole) for part in ("*.json*", "*/*.json", "*/*.npy") for p in whole.glob(part)]
    for name in names:
        if name.name != "timings.json":
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for path in (whole / "checkpoints").glob("step_*.pt"):
        ours, theirs = (torch.load(p / "checkpoints" / path.name, weights_only=True) for p in (run, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), path


def both(*damages):
    """Damages by file name."""

    def damage(run):
        for name, how in damages:
            how(run / name)

    return damage


LAST_PT, STATE = "checkpoints/last.pt", "checkpoints/state_2.pt"
FINISHED, ONE_STEP_BACK = "going on from the end of step 2", "going on from the end of step 1"
MENDED = {
    "last.pt empty": (both((LAST_PT, content(b""))), FINISHED),
    "last.pt cut": (both((LAST_PT, cut)), FINISHED),
    "last.pt gone": (both((LAST_PT, gone)), FINISHED),
    "last.pt of a list": (both((LAST_PT, state(lambda s: [1, 2]))), FINISHED),
    "last.pt is weights": (both((LAST_PT, other("step_2.pt"))), FINISHED),
    "last.pt is a foreign pickle": (both((LAST_PT, foreign)), FINISHED),
    "last.pt of other weights": (both((LAST_PT, state(lambda s: narrow(s["trainer"]["student"])))), FINISHED),
    "last.pt of no numbers": (both((LAST_PT, state(lambda s: poisoned(s["trainer"]["student"])))), FINISHED),
    "last.pt of other images": (both((LAST_PT, state(lambda s: s | {"memory": {0: [10**9]}}))), FINISHED),
    "last.pt of exemplars of other classes": (
        both((LAST_PT, state(lambda s: s | {"memory": {0: s["memory"][4]}}))), FINISHED,
    ),
    "last.pt at step 9": (both((LAST_PT, state(lambda s: s | {"position": [9, "train", 0, 0]}))), FINISHED),
    "last.pt in no phase": (both((LAST_PT, state(lambda s: s | {"position": [1, "sleep", 0, 0]}))), FINISHED),
    "last.pt without results": (both((LAST_PT, state(lambda s: s | {"results": s["results"][:1]}))), FINISHED),
    "last.pt of a result that is none": (
        both((LAST_PT, state(lambda s: s["results"][1].update(top1=float("inf"))))), FINISHED,
    ),
    "last.pt of another meter": (
        both((LAST_PT, state(lambda s: s["trainer"].update(meter=[torch.zeros(2)] * 2)))), FINISHED,
    ),
    "last.pt of another method": (both((LAST_PT, state(lambda s: s | {"method": {}}))), FINISHED),
    "last.pt of a longer metrics.jsonl": (both((LAST_PT, state(lambda s: s | {"metrics_bytes": 10**15}))), FINISHED),
    "last.pt and state_2.pt cut": (both((LAST_PT, cut), (STATE, cut)), ONE_STEP_BACK),
    "last.pt cut, step_2.pt empty": (both((LAST_PT, cut), (S, content(b""))), ONE_STEP_BACK),
    "last.pt cut, step_2.pt another step's": (both((LAST_PT, cut), (S, other("step_1.pt"))), ONE_STEP_BACK),
    "last.pt cut, state_2.pt another step's": (both((LAST_PT, cut), (STATE, other("state_1.pt"))), ONE_STEP_BACK),
    "results.json damaged": (both(("results.json", cut)), "finished already"),
    "results.json and timings.json gone": (both(("results.json", gone), ("timings.json", gone)), "finished already"),
    "matrices gone and damaged": (
        both(("confusion/step_0.npy", gone), ("confusion/step_1.npy", content(HUGE)), ("confusion/step_2.npy", gone)),
        "finished already",
    ),
    "weights of the last step gone": (both((S, gone)), "finished already"),
    "a byte order mark and CRLF": (
        both(
            ("recipe.yaml", lambda p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes().replace(b"\n", b"\r\n"))),
            ("protocol.json", lambda p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes().replace(b"\n", b"\r\n"))),
        ),
        "finished already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MENDED)
def test_a_resume_mends_what_follows_from_the_rest_and_ends_in_the_same_files(
    whole, tmp_path, monkeypatch, capsys, case
):
    monkeypatch.chdir(tmp_path)
    damage, said = MENDED[case]
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damage(run)
    assert resumed(run).finished
    printed = capsys.readouterr().out
    assert said in printed
    assert ("last.pt" in printed) == ("last.pt" in case)
    assert_same(run, whole)
    assert (run / "timings.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    resumed(run)
    assert "going on" not in capsys.readouterr().out, "the checkpoint is whole again"


def test_what_a_resume_cannot_write_again_is_named(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("predictions/step_0.npy", "confusion/step_0.npy", "memory/step_1.json", "checkpoints/step_1.pt"):
        (run / name).unlink()
    resumed(run)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "missing" in line)
    assert line == (
        f"{run}: missing, and only training again writes them: confusion/step_0.npy, predictions/step_0.npy, "
        "memory/step_1.json, checkpoints/step_1.pt"
    )


def test_a_run_of_an_older_version_without_a_way_back_says_what_can_be_kept(whole, tmp_path):
    """Nothing but last.pt knew the rehearsal memory and the method's state."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").glob("state_*.pt"):
        path.unlink()
    cut(run / LAST_PT)
    with pytest.raises(
        UserError, match=r"last\.pt: not a whole checkpoint .*; choose another out, where base .*run takes"
    ):
        resumed(run)
    assert fastil.run("digits", out=tmp_path / "next", base=run, **SETTINGS).results == Run(whole).results


def test_a_report_leaves_out_what_it_cannot_read_and_says_so(whole, tmp_path, capsys, monkeypatch):
    from fastil import cli

    for name in ("damaged", "begun", "good"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "damaged/confusion/step_1.npy").write_bytes(HUGE)
    (tmp_path / "begun/results.json").unlink()
    paths = [tmp_path / name for name in ("damaged", "good", "begun", "nowhere")]
    text, complete = write_report(paths, tmp_path / "report", as_html=True)
    assert not complete
    assert f"left out: {tmp_path}/damaged/confusion/step_1.npy: damaged (not int64 [5, 5]" in text
    assert f"{tmp_path}/begun: no results yet, left out" in text
    assert f"left out: {tmp_path}/nowhere: no such run directory" in text
    assert text.count("| bic, balanced") == 2  # a line of each table
    page = (tmp_path / "report/report.html").read_text()
    assert "damaged/confusion/step_1.npy" in page
    for chosen, status in ((paths, 1), (paths[1:3], 0), (paths[2:3], 2)):
        monkeypatch.setattr("sys.argv", ["fastil", "report", *map(str, chosen), "--out", str(tmp_path / "again")])
        with pytest.raises(SystemExit) as error:
            cli.main()
        assert error.value.code == status
    assert f"{tmp_path}/begun: no results yet" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_says_to_write_it_again(whole, tmp_path):
    (tmp_path / "accuracy.png").mkdir()
    with pytest.raises(UserError, match=r"accuracy\.png: cannot be written .*; once it can, write the report again"):
        write_report([whole], tmp_path, as_html=False)


# What stands in the place of a recipe, and whose code is imported


def test_a_run_or_its_recipe_yaml_stands_where_the_recipe_does(whole, tmp_path, monkeypatch, capsys):
    from fastil import cli

    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "run")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["fastil", "run", *arguments])
        with pytest.raises(SystemExit) as error:
            cli.main()
        shown = capsys.readouterr()
        return error.value.code, shown.out + shown.err

    for given in (["run", "--resume"], ["--resume", "run"], ["run/recipe.yaml", "--resume"], ["./run/", "--resume"]):
        assert run(*given)[0] is None or run(*given)[0] == 0
    assert not (tmp_path / "runs").exists()
    status, said = run("run", "lr=0.5", "--resume")
    assert (status, "lr was 0.03, now 0.5" in said) == (2, True)
    for number, given in enumerate(("run", "run/recipe.yaml")):
        status, said = run(given, "--out", f"again{number}")
        assert status in (0, None), said
        assert_same(tmp_path / f"again{number}", whole)
    shutil.copy(whole / "recipe.yaml", tmp_path / "copy.yaml")
    assert run("copy.yaml", "seed=1")[0] in (0, None)
    assert Run(tmp_path / "runs/digits-s1").recipe.train.seed == 1
    (tmp_path / "empty").mkdir()
    assert "unknown recipe empty" in run("empty")[1]
    (tmp_path / "empty/lock").touch()
    status, said = run("empty")
    assert (status, said.count("\n")) == (2, 1)
    assert "empty/recipe.yaml: missing; give a run directory of fastil, or the name of a recipe" in said
    (tmp_path / "empty/recipe.yaml").write_text((whole / "recipe.yaml").read_text().replace("digits", "../../x", 1))
    assert "no name of a recipe" in run("empty")[1]


CODE = """
import pathlib
import fastil
import torch

pathlib.Path("trace").touch()

class Mine(fastil.Method):
    def loss_weights(self, context):
        return 1.0, 0.0

def backbone():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    module.feature_dim = 12
    return module
"""


@pytest.mark.parametrize("key", ["method=code.py:Mine", "model=code.py:backbone"])
def test_code_that_only_a_run_directory_names_is_never_imported(tmp_path, monkeypatch, key):
    """By none of the commands, nor with the run in the recipe's place; a copy of its recipe.yaml is the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    name, _, value = key.partition("=")
    settings = {"base_classes": 5, "increment": 5, "base_epochs": 1, "epochs": 1, "loss": "softmax", "model": "resnet8"}
    fastil.run("digits", out="run", **settings | {name: value})
    shutil.copy("run/recipe.yaml", "copy.yaml")
    trace = tmp_path / "trace"
    trace.unlink()
    os.utime("code.py", (1, 1))  # so that it would be read again
    (tmp_path / "code.py").write_text(CODE + "\n")
    shutil.copytree("run", "bare")
    for path in ("bare/protocol.json", "bare/lock"):
        os.unlink(path)

    for given in ("run", "run/recipe.yaml", "copy.yaml", "bare", "bare/recipe.yaml"):
        with pytest.raises(UserError, match=rf"names code \({key}\).*read that code, and add {key}"):
            fastil.run(given, out="again")
        with pytest.raises(UserError, match="names code"):
            fastil.run(given, resume=True)
    with pytest.raises(UserError, match="another recipe"):
        fastil.run("digits", out="run", resume=True, **settings)
    with contextlib.suppress(UserError):  # il_baseline trains the same base step as a method that says nothing of it
        fastil.run("digits", out="based", base="run", **settings)
    write_report([tmp_path / "run"], None, as_html=False)
    with contextlib.suppress(UserError):  # this method's predictions need no code of its own
        Run("run").network()
    assert not trace.exists()
    assert not (tmp_path / "again").exists()
    assert fastil.run("run", resume=True, **{name: value}).finished
    assert trace.exists()


# Starts that fail


def test_a_start_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    """Full disk at each of the first files, and a mistake in the first batch: what was there stays, all else goes."""
    from fastil import files
    from fastil.training.trainer import Trainer

    real = files.write_atomically
    (tmp_path / "empty").mkdir()
    for name in ("recipe.yaml", "protocol.json", "last.pt"):

        def full(path, *arguments, name=name):
            if path.name == name:
                raise UserError(f"{path}: disk full; free some space")
            real(path, *arguments)

        monkeypatch.setattr(files, "write_atomically", full)
        for out in ("runs/new/one", "empty"):
            with pytest.raises(UserError, match="disk full"):
                fastil.run("digits", out=tmp_path / out, **SETTINGS)
            assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    monkeypatch.setattr(files, "write_atomically", real)

    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(KeyboardInterrupt):
        fastil.run("digits", out=tmp_path / "run", resume=True, **SETTINGS)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_start_that_fails_keeps_the_directory_of_another_process(tmp_path):
    from fastil import files

    (tmp_path / "run").mkdir()
    with files.locked(tmp_path / "run"):
        with pytest.raises(UserError, match="another process is running there"):
            fastil.run("digits", out=tmp_path / "run", resume=True, **SETTINGS)
        assert [path.name for path in tmp_path.rglob("*")] == ["run", "lock"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_a_lock_that_is_no_file_is_neither_read_nor_written(kind, resume, tmp_path):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("another program's")
    if kind == "pipe":
        os.mkfifo(run / "lock")
    else:
        (run / "lock").symlink_to(victim if kind == "link" else "/dev/zero")
    with pytest.raises(UserError, match=r"lock: cannot be written|lock: not a file|exists already"):
        fastil.run("digits", out=run, resume=resume, **SETTINGS)
    assert RunDirectory(run, True, ["a launcher"]).resume
    with pytest.raises(UserError, match="exists already"):
        RunDirectory(run, False, ["a launcher"])
    assert victim.read_text() == "another program's"


def test_a_refused_resume_leaves_the_run_to_the_launcher_that_began_it(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "lock").write_text("machine 12 3456\n")
    with pytest.raises(UserError, match="a run of another recipe"):
        fastil.run("digits", out=run, resume=True, **SETTINGS | {"lr": 0.011})
    assert RunDirectory(run, False, ["machine 12 3456"]).resume
    fastil.run("digits", out=run, resume=True, **SETTINGS)
    with pytest.raises(UserError, match="exists already"):
        RunDirectory(run, False, ["machine 12 3456"])


def test_the_number_of_processes_that_trained_a_run_is_not_forgotten(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    content = json.loads((run / "protocol.json").read_text())
    assert (content["bn"], content["ranks"], content["ranks_so_far"]) == ("sync", 1, [1])
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bn: sync", "bn: local"))
    for so_far, there in (([2], [2]), ([], [2])):  # the first versions had `ranks` alone
        (run / "protocol.json").write_text(json.dumps(content | {"ranks": 2, "ranks_so_far": so_far}))
        fastil.run("digits", out=run, resume=True, **SETTINGS)  # finished: nothing is trained
        assert Run(run).protocol.all_ranks == there
        with pytest.raises(UserError, match="bn is local in 2 processes there and by whole batches here"):
            fastil.run("digits", out=tmp_path / "other", base=run, **SETTINGS)
    for path in ("checkpoints/last.pt", "checkpoints/state_2.pt"):
        (run / path).unlink()
    fastil.run("digits", out=run, resume=True, **SETTINGS)
    assert Run(run).protocol.all_ranks == [2, 1]
    assert Run(run).protocol.ranks == 1


def test_what_differs_and_is_no_setting_is_said_in_a_line_each(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    path = run / STATE.replace("2", "1")
    state(lambda s: s | {"ran": s["ran"] | {"threads": 64, "compiled": True, "loader": "dali"}})(path)
    for name in (LAST_PT, STATE):
        (run / name).unlink()
    resumed(run)
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith(f"{run}: ") and "before the stop" in line]
    assert len(lines) == 3
    threads = torch.get_num_threads()
    assert f"{run}: threads: 64 before the stop and {threads} from here on; the numbers may differ a little" in lines[2]
    assert_same(run, whole)
    resumed(run)
    assert "before the stop" not in capsys.readouterr().out


def test_results_name_a_step_only_once_its_weights_are_there(tmp_path, monkeypatch):
    from fastil import files

    real = files.save

    def failing(path, content):
        if path.name == "step_1.pt":
            raise UserError(f"{path}: disk full")
        real(path, content)

    monkeypatch.setattr(files, "save", failing)
    with pytest.raises(UserError, match=r"step_1\.pt"):
        fastil.run("digits", out=tmp_path / "run", **SETTINGS)
    assert len(json.loads((tmp_path / "run/results.json").read_text())["steps"]) == 1
    Run(tmp_path / "run").network()


def test_only_a_failed_write_is_called_one(tmp_path):
    from fastil import files

    def mistaken(file):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match=r"^a mistake$"):
        files.write_atomically(tmp_path / "x", mistaken)
    with pytest.raises(RuntimeError, match=r"^a mistake$"), files.written(tmp_path / "x"):
        raise RuntimeError("a mistake")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [0, 1, 100, 3000, 4095, 4096, 4097, 8000, 30_000, 65_536, 65_537, 200_000, 399_000])
def test_a_checkpoint_that_was_cut_short_is_damaged_at_every_length(tmp_path, length):
    """Torch raises other types at some of them, EINVAL among those."""
    from fastil import files

    path = tmp_path / "last.pt"
    files.save(path, {"weights": torch.zeros(100_000)})
    with open(path, "r+b") as file:
        file.truncate(length)
    with pytest.raises(files.Damaged, match=r"last.pt: not a whole checkpoint.*; mend it"):
        files.load(path, torch.device("cpu"), "mend it")


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    from fastil import files

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    path = tmp_path / "last.pt"
    files.save(path, {"weights": torch.zeros(3)})
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(UserError, match="too little memory") as error:
        files.load(path, torch.device("cpu"), "mend it")
    assert not isinstance(error.value, files.Damaged)


def test_a_lost_metrics_file_costs_its_lines_and_no_training(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "metrics.jsonl").unlink()
    resumed(run)
    said = capsys.readouterr().out
    assert f"{run / 'metrics.jsonl'}: missing; going on without the lines of earlier epochs" in said
    assert (run / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == b""
    assert not (run / "checkpoints/last.pt.damaged").exists()


def test_a_source_that_cannot_be_read_is_not_called_a_failed_write(tmp_path):
    from fastil import files

    def copy(source):
        with files.written(tmp_path / "target", "run it again"), open(source, "rb") as file:
            file.read()

    with pytest.raises(UserError, match=r"source: No such file or directory; once it can be read, run it again"):
        copy(tmp_path / "source")
    with pytest.raises(UserError, match=r"target: cannot be written \(.*target.partial"):
        copy(tmp_path / "target.partial")
