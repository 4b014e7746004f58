"""Processes that train one run: how they meet, what a failure of one is in the others, and what each may use."""

import json
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import environment
from test_machine import PHYSICAL
from test_ranks_killed import free_port

from fastil import machine, ranks
from fastil.device import pick_device
from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.training import capacity


@pytest.mark.parametrize(("rank", "line"), [(0, "ranks 1, 3 of 4 did not come"), (2, "rank 0 of 4 did not come")])
def test_who_does_not_come_is_named(rank, line, monkeypatch):
    monkeypatch.setattr(ranks, "COME_WITHIN", timedelta(seconds=0.2))
    store = dist.HashStore()
    if rank == 0:  # 2 comes
        monkeypatch.setattr(ranks.uuid, "uuid4", lambda: SimpleNamespace(hex="first"))
        store.set("fastil/hello/2", "second")
        store.set("fastil/joined/first/2", "")
    with pytest.raises(UserError, match=line):
        ranks._of_this_attempt(store, rank, 4)


def test_a_process_group_of_one_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not ranks.launched()
        with ranks.together():
            assert (ranks.rank(), ranks.count()) == (0, 1)
            assert ranks.from_first(lambda: 3) == 3
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_part_of_the_machine_and_of_the_batch_is_what_each_process_has_to_do_with(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.memory() == PHYSICAL // 4
    recipe, steps = load("digits", ["batch_size=1001", "precision=fp32"]), [SimpleNamespace(visits=719, epochs=1)]
    monkeypatch.setattr(ranks, "count", lambda: 4)
    cpu, least = torch.device("cpu"), max(251 * 12 * 64, 180 * 1000 * 4)
    monkeypatch.setattr(capacity, "memory_of", lambda device: least)
    capacity.check_batch(recipe, steps, (8, 8), cpu, handed_on=1000)
    monkeypatch.setattr(capacity, "memory_of", lambda device: least - 1)
    with pytest.raises(UserError, match=r"at the least in each of 4 processes"):
        capacity.check_batch(recipe, steps, (8, 8), cpu, handed_on=1000)


def test_batches_that_cannot_be_shared_out_are_refused_and_one_process_keeps_to_whole_ones():
    recipe = load("digits", ["batch_size=64"])
    assert [recipe.shared_by(n).train.bn for n in (1, 2, 3, 32)] == ["sync", "local", "sync", "sync"]
    with pytest.raises(UserError, match="batch_size=64: too few images for 33 processes; start at most 32, or raise"):
        recipe.shared_by(33)
    assert recipe.shared_by(2, before=recipe.shared_by(1)).train.bn == "sync"


def test_a_launcher_that_does_not_say_how_many_are_on_a_machine_has_one_on_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for variables in ({}, {"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""}):
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert pick_device("cuda") == torch.device("cuda", 0)
        monkeypatch.setattr(ranks._joined, "count", 2, raising=False)
        assert pick_device("cuda") == torch.device("cuda", 0)
        monkeypatch.delattr(ranks._joined, "count")


WORKER = """
import fcntl, json, sys
from pathlib import Path
import torch
from fastil import ranks
from fastil.optimiser import Update
from fastil.errors import UserError
from fastil.recipe_file import load
from fastil.training import run_directory

def fails(error):
    raise error

found = []
def note(call):
    try:
        call()
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")

def held(path):
    with run_directory.opened(path, True, load("digits")).held():
        found.append("held")

folder = Path(sys.argv[1])
with ranks.together():
    note(lambda: ranks.from_first(lambda: fails(UserError("his"))))
    note(lambda: ranks.from_first(lambda: fails(KeyError("mine"))))
    note(lambda: held(folder / "new"))
    with open(folder / "taken/lock", "a") as lock:
        if ranks.first():
            fcntl.flock(lock, fcntl.LOCK_EX)
        note(lambda: held(folder / "taken"))
    found.append(ranks.from_first(lambda: 3))
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(4)]
    for i in ((0, 1), (1, 2))[ranks.rank()]:  # as where each leaves out layers of its own
        parameters[i].grad = torch.full((2, 3), 1.0 + i + 10 * ranks.rank())
    sum_of_ranks = torch.full((1,), 1.0 + ranks.rank())
    Update(parameters, torch.zeros(()), 0.9, 0.0).add_up([sum_of_ranks], alike=False)
    found.append([None if p.grad is None else p.grad.unique().tolist() for p in parameters] + sum_of_ranks.tolist())
    (folder / f"{ranks.rank()}.json").write_text(json.dumps(found))
"""


def test_what_fails_in_the_first_process_fails_in_all(tmp_path):
    (tmp_path / "taken").mkdir()
    variables = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], env=variables | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    taken = f"UserError: {tmp_path}/taken: another process is running there; wait for it or choose another --out"
    added_up = [[1.0], [2.0 + 12.0], [13.0], None, 3.0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == ["UserError: his", "KeyError: 'mine'", "held", taken, 3, added_up]
    assert second == ["UserError: his", "RuntimeError: rank 0: KeyError: 'mine'", "held", taken, 3, added_up]
