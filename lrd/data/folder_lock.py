"""A lock on a folder, so that ranks and hosts that share a disk do the same work only once."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lrd import console


@contextmanager
def one_process_at_a_time(folder: Path, waiting: str = "") -> Iterator[None]:
    """Let one process at a time into the `with` block, on all hosts that share the folder.

    The first process does the work, and those that waited find its result. There is no waiting
    where the folder is not writable or its file system does not support locks.

    Args:
        folder: where the lock file `.lrd-lock` is; it is created if it is missing.
        waiting: printed if another process is in the block; empty: nothing is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lrd-lock").open("a")
    except OSError:
        yield
        return

    with lock:
        with suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    console.info(waiting)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
