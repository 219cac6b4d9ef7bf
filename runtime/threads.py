"""Number of CPU cores that this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_SELF, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that the CPU affinity and the cgroups of this process allow, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *filter(None, map(_quota, _groups()))]))


def _groups() -> Iterator[Path]:
    """The folders of the cgroups of this process that can limit CPUs, and of all cgroups above them.

    In a container the mounted tree may start at its own cgroup, whatever path the kernel names; the root is last.
    """
    try:
        lines = _SELF.read_text().splitlines()
    except (OSError, ValueError):
        lines = []
    for _, _, line in (text.partition(":") for text in (*lines, "0::/", "0:cpu:/")):
        controllers, _, path = line.partition(":")
        if not controllers or "cpu" in controllers.split(","):
            group = (_MOUNT / "cpu" if controllers else _MOUNT) / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(_MOUNT))


def _quota(group: Path) -> int | None:
    """Cores that a cgroup allows, rounded up; None without a limit. Version 2 has one file, version 1 has two."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None
