"""The run directory: one run at a time in it, and what that run is doing."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from lrd.errors import UserError


class RunDir:
    """Holds the directory's lock while the run lives; `status.json` says how far it is. For one rank only.

    Raises:
        UserError: the directory cannot be written, or another process is at work in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began = time.time()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"run_dir: {path} cannot be written: {error.strerror}") from None
        if not self._take_lock():
            raise UserError(f"run_dir: another run is at work in {path}; give this one another run_dir")

    def _take_lock(self) -> bool:
        """Not at the first try alone: a run that was just killed may still hold it, and a reader for a moment."""
        for _ in range(20):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return True
        return False

    def write(self, name: str, text: str) -> None:
        """Put a file in place whole."""
        beside = self.path / f".{name}.tmp"
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.path / name)
        except OSError as error:
            raise UserError(f"run_dir: {self.path / name} cannot be written: {error.strerror}") from None

    def status(self, state: str, **more: Any) -> None:
        """`state` is running, finished, stopped or failed."""
        where = {"host": socket.gethostname(), "pid": os.getpid(), "started": self._began, "updated": time.time()}
        self.write("status.json", json.dumps({"state": state, **more, **where}, indent=1))


def read_status(path: Path) -> dict[str, Any] | None:
    """What the run in `path` last said of itself; one that said `running` and is no longer there is `interrupted`."""
    try:
        status: Any = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(status, dict) or "state" not in status:
        return None
    if status.get("state") == "running" and status.get("host") == socket.gethostname() and not _is_locked(path):
        status["state"] = "interrupted"
    return status


def _is_locked(path: Path) -> bool:
    try:
        with (path / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
