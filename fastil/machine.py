"""What this process may use of the machine."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
CGROUPS_OF_PROCESS = Path("/proc/self/cgroup")  # lines of ID:CONTROLLERS:PATH; version 2 names no controllers


def cores() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or the least that a control group allows, as
    in containers and batch jobs."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits()])


def _limits() -> Iterator[int]:
    """Yield the limits of the control groups of this process, and of the groups that these are in."""
    lines = []
    with contextlib.suppress(OSError):  # not Linux
        lines = [line.split(":", 2) for line in CGROUPS_OF_PROCESS.read_text().splitlines()]
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        group = PurePosixPath(path)
        for place in (group, *group.parents):
            # A container may see its own group as the root. "max" is no limit.
            with contextlib.suppress(OSError, ValueError):
                yield int((root / place.relative_to("/") / name).read_text())
