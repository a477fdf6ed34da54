"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS_CGROUP = Path("/proc/self/cgroup")


def ranks_on_host() -> int:
    """Number of ranks that a launcher has started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def share_of_cores() -> int:
    """Number of cores that this rank may use if the ranks of its host share them; at least 1."""
    return max(1, int(available_cores()) // ranks_on_host())


def available_cores() -> float:
    """Number of cores that this process may use.

    It is the number of cores that it may run on, or less if its cgroup (version 2) has a quota of
    CPU time.
    """
    if hasattr(os, "sched_getaffinity"):
        num_allowed = len(os.sched_getaffinity(0))
    else:
        num_allowed = os.cpu_count() or 1
    return min([float(num_allowed), *_cgroup_quotas()])


def _cgroup_quotas() -> list[float]:
    """The quotas of this process's cgroup and of those above it, in cores."""
    try:
        lines = _PROCESS_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    names = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    if not names:
        return []

    # A quota limits the groups below it too, so the smallest one on the way to the root counts.
    quotas = []
    folder = _CGROUPS / names[0].lstrip("/")
    for cgroup in (folder, *folder.parents):
        if not cgroup.is_relative_to(_CGROUPS):
            continue
        try:
            quota, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # the root has no quota; a container may not show its own
            continue
    return quotas
