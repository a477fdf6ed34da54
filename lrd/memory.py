"""How much memory there is, and errors for what cannot fit, before anything is allocated.

Allocating far too much takes minutes or ends in the kernel's out-of-memory killer, which says
nothing.
"""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

from lrd.errors import UserError

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # version 2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # version 1
)


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
    limits = [limit for path in _CGROUP_LIMITS if (limit := _read_number(path)) is not None]
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
