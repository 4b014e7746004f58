"""`kill -9` at any moment, of the whole conversion or of a worker: the next run ends in the same files.

Short counts here; FASTIL_SOAK=1 (make soak) has the full ones.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import SOAK, environment
from converting import encoded, left_of, outputs, photo, photos, run, session_of, write
from dying import die_at
from killing import DRIVER, KINDS, begun, images, killed, stages_of, survived, without

from fastil.errors import UserError
from fastil.tools.pool import Pool, WorkerDied
from fastil.tools.reporting import Reporter

KILLS = 30 if SOAK else 2
EVERY = 1 if SOAK else 41  # of the places between two calls of the system where a run is killed
JOURNALS = 2000 if SOAK else 60
SOME_BYTES = 1500  # between commits
STAGES = ["begin", "audit train", "audit val", "convert train", "read back", "convert val", "read back"]
FOUR = {f"x{end}{kind}" for end in ("", ".val") for kind in (".beton", ".manifest.json")}

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs /proc")


# The whole process


@needs_proc
def test_killed_at_any_moment_the_next_run_ends_in_the_same_files(tmp_path):
    """By any signal, with any number of workers before and after it."""
    driver, folder, moments = tmp_path / "driver.py", tmp_path / "out", random.Random(0)
    driver.write_text(DRIVER)
    found, known, kills = images(60), {}, Counter()
    for number in range(KILLS):
        kind, mode = list(KINDS)[number % len(KINDS) if SOAK else 0], ("jpeg", "raw")[number // len(KINDS) % 2]
        options = {"on_corrupt": "skip", "mode": mode}
        source = tmp_path / kind
        if not source.exists():
            source = known[kind] = KINDS[kind](source, found)
        source = known[kind]
        if (kind, mode) not in known:
            process, seen = begun(driver, source, without(folder) / "x.beton", workers=2, **options), []
            seen.extend((stage, time.monotonic()) for stage in stages_of(process))
            process.communicate()
            assert process.returncode == 0
            begins = [moment for _, moment in seen] + [time.monotonic()]
            lengths = {stage: end - begin for (stage, begin), end in zip(seen, begins[1:], strict=True)}
            assert [stage for stage, _ in seen if stage != "unpack"] == STAGES
            known[kind, mode] = outputs(folder), [lengths[stage] for stage, _ in seen]
            assert set(outputs(folder)) == FOUR
        expected, lengths = known[kind, mode]
        without(folder)
        for _ in range(1 + moments.randrange(2)):  # some runs that go on are killed, too
            stage, end = (
                moments.randrange(len(lengths)),
                moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]),
            )
            process = begun(driver, source, folder / "x.beton", workers=moments.choice([1, 2, 3]), **options)
            kills[end.name] += killed(process, stage, moments.random() * lengths[stage], end)
        process = begun(driver, source, folder / "x.beton", workers=moments.choice([1, 2, 3]), **options)
        text = process.communicate()[0]
        assert process.returncode == 0, text
        assert outputs(folder) == expected, (number, kind, mode, stage, end)
    assert kills.total() >= KILLS // 2
    print(kills)  # pytest -s shows how many were in time


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A killed process loses nothing that it has written, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize(
    ("kind", "end"),
    [(kind, signal.SIGKILL) for kind in KINDS] + [(kind, signal.SIGINT) for kind in (KINDS if SOAK else ["parquet"])],
)
def test_killed_at_each_call_of_the_system_the_next_run_ends_in_the_same_files(tmp_path, kind, end):
    """In a copy of this process, without workers: all four files, whichever of them were there."""
    source, folder = KINDS[kind](tmp_path / "in", images(4)), tmp_path / "out"
    mode = "raw" if kind in ("tar", "webdataset") else "jpeg"
    options = {"commit_bytes": SOME_BYTES, "on_corrupt": "skip", "mode": mode}
    run(source, without(folder) / "x.beton", **options)
    expected = outputs(folder)
    assert set(expected) == FOUR

    def ended(at, calls):
        """Whether the run was not ended before it was done."""
        without(folder)
        whole = survived(lambda: run(source, folder / "x.beton", **options), at, calls, end)
        run(source, folder / "x.beton", **options)
        assert outputs(folder) == expected, (at, calls)
        return whole

    # Both files of both splits get their names: before and after each.
    assert [ended(at, ("replace",)) for at in range(1, 10)] == [False] * 8 + [True]
    at = 1
    while not ended(at, None):
        at += EVERY
    assert at > 60


def test_killed_again_and_again_it_comes_to_an_end(tmp_path):
    source, folder = write(tmp_path / "in", photos(40)), tmp_path / "out"
    run(source, without(folder) / "x.beton", commit_bytes=SOME_BYTES)
    expected, kills = outputs(folder), 0
    without(folder)
    while not survived(lambda: run(source, folder / "x.beton", commit_bytes=SOME_BYTES), 23):
        kills += 1
    assert 3 < kills < 40
    assert outputs(folder) == expected


# A worker


@pytest.mark.parametrize(
    ("item", "kind", "words"),
    [
        (11, WorkerDied, ["was killed", "image 40", "run the same command again"]),
        (12, WorkerDied, ["image 40", "KeyError: 'twelve'", "please report"]),
        (13, UserError, ["thirteen is wrong"]),
    ],
)
def test_a_pool_names_the_image_at_which_a_worker_ended(item, kind, words):
    chunks = [
        [(number, item if number == 40 else 0) for number in range(start, start + 5)] for start in range(0, 90, 5)
    ]
    with Pool(2) as pool:
        with pytest.raises(kind) as error:
            list(pool.map(die_at, iter(chunks), lambda number: f"image {number}"))
        for word in words:
            assert word in str(error.value)
        if item == 11:  # and so it does for the next work, instead of an exception that says nothing
            with pytest.raises(WorkerDied, match="was killed"):
                list(pool.map(die_at, iter(chunks), lambda number: f"image {number}"))


def workers_of(process):
    """Its children but for the one that keeps track of locks."""
    found = []
    for number in session_of(process):
        try:
            command = Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            continue
        if b"spawn_main" in command:
            found.append(number)
    return found


@needs_proc
def test_a_worker_that_is_killed_ends_the_run_and_the_next_one_ends_in_the_same_files(fastil, tmp_path):
    """Each image takes so long that a worker is at one of them whenever it is killed."""
    large = {f"train/{c}/{i}.png": encoded(photo(500, 500, i), "PNG") for c in "ab" for i in range(7)}
    source, moments = write(tmp_path / "in", large), random.Random(0)
    run(source, tmp_path / "x.beton")
    expected, died = outputs(tmp_path), 0
    for number in range(KILLS // 2):
        out = without(tmp_path / "out") / "x.beton"
        command = [sys.executable, "-m", "fastil.cli", "convert", str(source), str(out), "--workers", "2"]
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        sign = out.with_name("x.beton.journal" if number % 2 == 0 else "x.beton.partial")
        while process.poll() is None and not (sign.exists() and workers_of(process)):
            time.sleep(0.005)
        time.sleep(moments.random() * 0.5 * (number > 0))
        for victim in workers_of(process)[: 1 + moments.randrange(2)]:
            os.kill(victim, signal.SIGKILL)
        errors = process.communicate(timeout=300)[1]
        assert left_of(process, 60) == []
        if process.returncode != 0:
            died += 1
            assert process.returncode == 2, errors
            assert len(errors.splitlines()) == 1, errors
            assert "a worker process was killed" in errors
            assert str(source / "train") in errors
            assert ".png" in errors
            assert not out.exists()
            finished = fastil("convert", source, out, "--workers", 2)
            assert finished.returncode == 0, finished.stderr
        assert outputs(out.parent) == expected
    assert died


# What a kill, or a careless hand, leaves


class Stop(Reporter):
    """Ends the work after 25 images."""

    def advance(self, *others):
        super().advance(*others)
        if self.stage == "convert train" and self.done == 25:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A source, a folder in which its conversion was stopped, and the files that it ends in."""
    folder = tmp_path_factory.mktemp("stopped")
    source = write(folder / "in", photos(40, size=(9, 12)))
    (folder / "whole").mkdir()
    run(source, folder / "whole/x.beton", commit_bytes=1)
    (folder / "half").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(source, folder / "half/x.beton", commit_bytes=1, reporter=Stop())
    return source, folder / "half", outputs(folder / "whole")


def ends_the_same(stopped, folder, change, must_end=True):
    """The next run after a change to what was left: the right files, or, unless it must end, one line and none."""
    source, half, expected = stopped
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(half, folder)
    change(folder / "x.beton.partial", folder / "x.beton.journal")
    if must_end:
        run(source, folder / "x.beton", commit_bytes=1)
        assert outputs(folder) == expected
        return
    with pytest.raises(UserError) as error:
        run(source, folder / "x.beton", commit_bytes=1)
    assert "\n" not in str(error.value)
    assert not (folder / "x.beton").exists()


def test_as_it_was_left_it_goes_on(stopped, tmp_path, capsys):
    ends_the_same(stopped, tmp_path / "out", lambda partial, journal: None)
    assert "going on after 24 images" in capsys.readouterr().out


def test_a_journal_that_was_cut_or_changed_anywhere_leads_to_the_right_bytes(stopped, tmp_path):
    """Or to an error, but there is none: a record that is not whole is not believed, and the work done again."""
    whole, moments = (stopped[1] / "x.beton.journal").read_bytes(), random.Random(0)

    def changed(partial, journal):
        at, content = moments.randrange(len(whole)), bytearray(whole)
        way = moments.randrange(7)
        if way == 0:
            del content[at:]
        elif way == 1:
            content[at] ^= 1 << moments.randrange(8)
        elif way == 2:
            content[at : at + 4] = b"\xff\xff\xff\xff"
        elif way == 3:
            content[at:at] = moments.randbytes(1 + moments.randrange(30))
        elif way == 4:
            del content[at : at + 1 + moments.randrange(300)]
        elif way == 5:
            content[at:] = bytes(len(content) - at)
        else:
            content += content[at:]
        journal.write_bytes(content)

    for _ in range(JOURNALS):
        ends_the_same(stopped, tmp_path / "out", changed)


def test_records_that_came_twice_are_not_believed(stopped, tmp_path):
    whole = (stopped[1] / "x.beton.journal").read_bytes()
    size = 12 + int.from_bytes(whole[4:8], "little")
    second = size + 12 + int.from_bytes(whole[size + 4 : size + 8], "little")
    for content in (whole + whole[size:], whole + whole, whole[:second] + whole[size:], whole[:size] + whole[second:]):
        ends_the_same(stopped, tmp_path / "out", lambda partial, journal, c=content: journal.write_bytes(c))


def test_a_partial_file_that_was_cut_anywhere_leads_to_the_right_bytes(stopped, tmp_path):
    """As a machine that lost its power would leave it."""
    size, moments = (stopped[1] / "x.beton.partial").stat().st_size, random.Random(1)
    lengths = [0, 1, 24, size - 1, 2 << 20, (2 << 20) - 1, (2 << 20) + 1]
    for length in lengths + [moments.randrange(2 << 20, size) for _ in range(JOURNALS // 4)]:
        ends_the_same(stopped, tmp_path / "out", lambda partial, journal, n=length: os.truncate(partial, n))


def test_a_partial_file_of_other_bytes_is_an_error(stopped, tmp_path):
    def damaged(partial, journal):
        with open(partial, "r+b") as file:
            file.seek((2 << 20) + 100)
            file.write(b"damaged")

    ends_the_same(stopped, tmp_path / "out", damaged, must_end=False)


@pytest.mark.parametrize("gone", ["partial", "journal", "both"])
def test_without_one_of_the_two_files_it_begins_anew(stopped, tmp_path, capsys, gone):
    def remove(partial, journal):
        if gone != "journal":
            partial.unlink()
        if gone != "partial":
            journal.unlink()

    ends_the_same(stopped, tmp_path / "out", remove)
    assert "going on" not in capsys.readouterr().out


def test_a_journal_of_other_images_does_not_lead_on(stopped, tmp_path):
    """The same options and names, but the first image has another size now."""
    source, half, _ = stopped
    other = tmp_path / "in"
    shutil.copytree(source, other)
    (other / "train/class0/0000.jpg").write_bytes(encoded(photo(8, 8)))
    run(other, without(tmp_path / "y") / "x.beton")
    moved = tmp_path / "first"
    source.rename(moved)
    try:
        other.rename(source)
        shutil.copytree(half, tmp_path / "out")
        run(source, tmp_path / "out/x.beton")
    finally:
        shutil.rmtree(source)
        moved.rename(source)
    assert outputs(tmp_path / "out")["x.beton"] == outputs(tmp_path / "y")["x.beton"]
