"""What this process may use of the machine."""

import contextlib
import math
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
CGROUPS_OF_PROCESS = Path("/proc/self/cgroup")  # lines of ID:CONTROLLERS:PATH; version 2 names no controllers


def cores() -> int:
    """Return the number of processors that this process may keep busy: those it may run on, or fewer if a control group
    (a container) limits their time. If torchrun started several processes, its part of them.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for group in _control_groups("cpu"):
        words = _numbers(group / "cpu.max") or _numbers(group / "cpu.cfs_quota_us") + _numbers(
            group / "cpu.cfs_period_us"
        )
        if len(words) == 2 and words[0] > 0 and words[1] > 0:  # "max" and -1 mean no limit
            quotas.append(math.ceil(words[0] / words[1]))
    return max(1, min([allowed, *quotas]) // sharing())


def memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or the least that a control group allows
    (containers, batch jobs). If torchrun started several processes, its part of them.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in _control_groups("memory"):
        limits += _numbers(group / "memory.max") or _numbers(group / "memory.limit_in_bytes")
    return min(limits) // sharing()


def sharing() -> int:
    """Return how many processes torchrun has started on this machine; 1 if another launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def lacks_for_triton() -> str | None:
    """Return what the machine lacks to compile the launchers of Triton's kernels, and the fix; None: nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # as Triton looks for one
        return "a C compiler: apt-get install gcc, or set CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers: apt-get install python3-dev, or a Python that brings them"
    return None


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups and of the groups that contain them."""
    lines = []
    with contextlib.suppress(OSError):  # not Linux
        lines = [line.split(":", 2) for line in CGROUPS_OF_PROCESS.read_text().splitlines()]
    for _, controllers, path in lines:
        if not controllers or controller in controllers.split(","):
            root, group = CGROUPS / controller if controllers else CGROUPS, PurePosixPath(path)
            for place in (group, *group.parents):  # in a container its own group may look like the root
                yield root / place.relative_to("/")


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a file; none if it is missing or holds other words, such as "max"."""
    with contextlib.suppress(OSError, ValueError):
        return [int(word) for word in path.read_text().split()]
    return []
