"""What this host has: how many cores a process may use, and how much memory there is.

What cannot fit is an error before anything is allocated. Allocating far too much takes minutes or
ends in the kernel's out-of-memory killer, which says nothing.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil

from lrd.errors import UserError

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS_CGROUP = Path("/proc/self/cgroup")
_MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # version 2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # version 1
)


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


def available_bytes() -> int:
    """Bytes that processes on this host could still allocate, at most.

    What a container or `ulimit -v` allows counts as a whole, whatever is in use already.
    """
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    return min([free, *_limits()])


def total_bytes() -> int:
    """Bytes of memory of this host, or what a container or `ulimit -v` allows of them.

    Unlike `available_bytes` it is the same at each start.
    """
    return min([int(psutil.virtual_memory().total), *_limits()])


def _limits() -> list[int]:
    limits = [limit for path in _MEMORY_LIMITS if (limit := _read_number(path)) is not None]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return limits


def require_memory(num_bytes: int, key: str, what: str) -> None:
    """Refuse what needs more memory than there is.

    Args:
        num_bytes: what is needed at least, on this host.
        key: the key of the recipe that is too large, with its value.
        what: what needs the memory.

    Raises:
        UserError: there is less.
    """
    available = available_bytes()
    if num_bytes > available:
        raise UserError(
            f"{key}: {what} would take {_describe(num_bytes)} of memory or more; "
            f"this host has {_describe(available)} free"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, on the host or on a GPU."""
    # torch.OutOfMemoryError has this name; on the CPU torch raises a RuntimeError.
    is_named_so = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_named_so or "can't allocate memory" in str(error)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # there is no such file, or it says `max`
        return None


def _describe(num_bytes: int) -> str:
    gigabytes = num_bytes / 1e9 if num_bytes < 1e15 else num_bytes // 10**9
    return f"{gigabytes:,.1f} GB" if gigabytes < 1e9 else f"{gigabytes:.1e} GB"
