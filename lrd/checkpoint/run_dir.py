"""The run directory: one run at a time uses it, and `status.json` reports how far that run is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lrd import console
from lrd.errors import UserError

LOCK = ".lock"
SURVIVORS_LOCK = ".survivors.lock"  # of ranks that save when another one is lost

STOP_SECONDS = 30.0  # the time that a run has to save and leave after it was asked to
_SECONDS_BETWEEN_TRIES = 0.1
_SECONDS_BEFORE_MESSAGE = 1.0  # whoever reads the status holds the lock too, for a moment


class RunDir:
    """Holds the run directory's lock while the run lives, and writes its files.

    Rank 0 makes one; the other ranks must not.

    Args:
        path: the run directory; it is created if it does not exist.
        patience: seconds to wait for another run that is still using the directory; default
            STOP_SECONDS. A run whose launcher was killed saves a checkpoint before it leaves.

    Raises:
        UserError: the directory cannot be written, or another process keeps using it.
    """

    def __init__(self, path: Path, patience: float | None = None) -> None:
        self.path = path
        self._start_time = time.time()

        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / LOCK).open("a+")
        except OSError as error:
            raise UserError(f"run_dir: {path} cannot be written: {error.strerror}") from None
        _require_own_files(path)

        patience = STOP_SECONDS if patience is None else patience
        if not take_lock(self._lock, patience, on_wait=self._report_wait):
            raise UserError(f"run_dir: another run is using {path}; give this one another run_dir")

        # A rank of the last start may still be saving its state.
        with suppress(OSError), (path / SURVIVORS_LOCK).open("a+") as lock:
            take_lock(lock, patience, on_wait=self._report_wait)

    def _report_wait(self, patience: float) -> None:
        console.info(
            f"{self.path}: another run is using this directory; "
            f"waiting up to {patience:.0f} s for it to leave"
        )

    def close(self) -> None:
        """Release the lock, so that other runs can use the directory."""
        self._lock.close()

    def write(self, name: str, text: str) -> None:
        """Write a file of the run directory. Readers see either the old file or the new one.

        Raises:
            UserError: it cannot be written; the old file is untouched.
        """
        # os.replace is atomic, so no reader sees half a file.
        temporary = self.path / f".{name}.tmp"
        try:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(temporary, self.path / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise UserError(
                f"run_dir: {self.path / name} cannot be written: {error.strerror}"
            ) from None

    def write_status(self, state: str, **more: Any) -> None:
        """Write `status.json`.

        Args:
            state: `running`, `finished`, `stopped` or `failed`.
            **more: further JSON values to write beside it.
        """
        process = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._start_time,
            "updated": time.time(),
        }
        self.write("status.json", json.dumps({"state": state, **more, **process}, indent=1))


def take_lock(
    lock: IO[str], patience: float, on_wait: Callable[[float], None] = lambda patience: None
) -> bool:
    """Lock a file that other processes lock too, until it is closed.

    Args:
        lock: the open file.
        patience: seconds to wait for it.
        on_wait: is called once with `patience`, if it is not free within a second.

    Returns:
        Whether it is locked, or on a file system without locks.
    """
    start = time.monotonic()
    was_reported = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            waited = time.monotonic() - start
        except OSError:  # a file system without locks
            return True

        if waited >= patience:
            return False

        if waited > _SECONDS_BEFORE_MESSAGE and not was_reported:
            was_reported = True
            on_wait(patience)
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _require_own_files(path: Path) -> None:
    """Refuse a folder in which something else has the name of a file or folder of a run."""
    checkpoints = path / "checkpoints"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise UserError(f"run_dir: {checkpoints} is not a folder")
    for name in ("status.json", "recipe.yaml"):
        if (path / name).is_dir():
            raise UserError(f"run_dir: {path / name} is a folder, should be a file of the run")


def read_status(path: Path) -> dict[str, Any] | None:
    """Read the `status.json` of a run directory.

    Returns:
        Its values, or None if there is no readable one. If it says `running` and was written on
        this host, but no process holds the lock any more, the state is `interrupted`.
    """
    try:
        status: Any = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(status, dict) or "state" not in status:
        return None

    # Of a run on another host nothing more is known: its lock need not be visible here.
    is_on_this_host = status.get("host") == socket.gethostname()
    if status["state"] == "running" and is_on_this_host and not _is_locked(path):
        status["state"] = "interrupted"
    return status


def _is_locked(path: Path) -> bool:
    """Whether a run holds the lock of a run directory."""
    try:
        with (path / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock file, or the file system has no locks
        pass
    return False
