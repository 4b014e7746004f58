"""The memory and the processors that a process may use, under control groups of both versions."""

import os

import pytest

from fastil import machine

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
LESS, LEAST = PHYSICAL // 2, PHYSICAL // 4
UNLIMITED = 2**63 - 4096  # how version 1 writes "no limit"


@pytest.mark.parametrize(
    ("of_process", "limits", "wanted"),
    [
        pytest.param("0::/\n", {"memory.max": LEAST}, LEAST, id="container"),
        pytest.param("0::/\n", {"memory.max": "max"}, PHYSICAL, id="no limit"),
        pytest.param("0::/\n", {"memory.max": 4 * PHYSICAL}, PHYSICAL, id="more than there is"),
        pytest.param("0::/\n", {}, PHYSICAL, id="no file"),
        pytest.param("0::/\n", {"memory.max": ""}, PHYSICAL, id="empty file"),
        pytest.param("0::/job/step\n", {"job/memory.max": LEAST, "job/step/memory.max": "max"}, LEAST, id="parent"),
        pytest.param("0::/job/step\n", {"job/memory.max": LESS, "job/step/memory.max": LEAST}, LEAST, id="batch job"),
        pytest.param("0::/a:b\n", {"a:b/memory.max": LEAST}, LEAST, id="colon in the name"),
        pytest.param("0::/mine\n", {"other/memory.max": LEAST}, PHYSICAL, id="another group"),
        pytest.param(
            "9:cpu,cpuacct:/job\n5:memory:/job\n0::/\n",
            {"memory/job/memory.limit_in_bytes": LEAST, "memory/memory.limit_in_bytes": UNLIMITED},
            LEAST,
            id="version 1",
        ),
        pytest.param(
            "5:memory:/docker/1f\n", {"memory/memory.limit_in_bytes": LEAST}, LEAST, id="container of version 1"
        ),
        pytest.param(None, {"memory.max": LEAST}, PHYSICAL, id="not Linux"),
    ],
)
def test_the_least_limit_of_all_control_groups_counts(tmp_path, monkeypatch, of_process, limits, wanted):
    control_groups(tmp_path, monkeypatch, of_process, limits)
    assert machine.memory() == wanted


def control_groups(folder, monkeypatch, of_process, limits):
    """Have the process see these files."""
    monkeypatch.setattr(machine, "CGROUPS", folder / "cgroup")
    monkeypatch.setattr(machine, "CGROUPS_OF_PROCESS", folder / "of_process")
    if of_process is not None:
        (folder / "of_process").write_text(of_process)
    for name, limit in limits.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")


@pytest.mark.parametrize(
    ("of_process", "limits", "wanted"),
    [
        pytest.param("0::/\n", {"cpu.max": "200000 100000"}, 2, id="container"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 2, id="rounded up"),
        pytest.param("0::/\n", {"cpu.max": "10000 100000"}, 1, id="a tenth"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, 8, id="no limit"),
        pytest.param("0::/\n", {"cpu.max": "9000000 100000"}, 8, id="more than there are"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3, id="parent"),
        pytest.param(
            "4:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": 400000, "cpu/job/cpu.cfs_period_us": 100000, "cpu/cpu.cfs_quota_us": -1},
            4,
            id="version 1",
        ),
        pytest.param("4:memory:/job\n", {"cpu/job/cpu.cfs_quota_us": 100000}, 8, id="another controller"),
        pytest.param("0::/\n", {"cpu.max": "1 0"}, 8, id="no period"),
        pytest.param(None, {"cpu.max": "100000 100000"}, 8, id="not Linux"),
    ],
)
def test_processors_are_those_of_the_quota(tmp_path, monkeypatch, of_process, limits, wanted):
    control_groups(tmp_path, monkeypatch, of_process, limits)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert machine.cores() == wanted


def test_a_limit_stops_what_would_not_fit(tmp_path, monkeypatch):
    """An idx file whose header promises more than half of the memory, which the file itself does not have."""
    from fastil.data.formats.idx import read_idx
    from fastil.errors import UserError

    path = tmp_path / "images"
    path.write_bytes(
        bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (1000, 28, 28)) + bytes(1000 * 28 * 28)
    )
    assert read_idx(path, 3).shape == (1000, 28, 28)
    (tmp_path / "of_process").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("1000000")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "CGROUPS_OF_PROCESS", tmp_path / "of_process")
    with pytest.raises(UserError, match="half of this machine has"):
        read_idx(path, 3)
