"""A lock on a folder, so that ranks and hosts that share a disk do the same work only once."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time into the `with` block, on all hosts that share the folder.

    The first process does the work, and those that waited find its result. There is no waiting
    where the folder is not writable or its file system does not support locks.

    Args:
        folder: where the lock file `.lrd-lock` is; it is created if it is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lrd-lock").open("a")
    except OSError:
        yield
        return

    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
