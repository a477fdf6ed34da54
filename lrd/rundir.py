"""The run directory: one run at a time in it, and what that run is doing."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from lrd import console
from lrd.errors import UserError

SECONDS_TO_LEAVE = 30.0  # what a run has that was asked to save and leave


class RunDir:
    """Holds the directory's lock while the run lives; `status.json` says how far it is. For one rank only.

    Args:
        patience: seconds to wait for a run that is at work there, default SECONDS_TO_LEAVE: one whose launcher was
            killed saves before it leaves.

    Raises:
        UserError: the directory cannot be written, or another process stays at work in it.
    """

    def __init__(self, path: Path, patience: float | None = None) -> None:
        self.path = path
        self._began = time.time()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"run_dir: {path} cannot be written: {error.strerror}") from None
        if not self._take_lock(SECONDS_TO_LEAVE if patience is None else patience):
            raise UserError(f"run_dir: another run is at work in {path}; give this one another run_dir")

    def _take_lock(self, patience: float) -> bool:
        began, said = time.monotonic(), False
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                waited = time.monotonic() - began
            except OSError:  # a file system without locks
                return True
            if waited >= patience:
                return False
            if waited > 1 and not said:  # a reader holds it for a moment only
                said = True
                console.say(f"{self.path}: another run is at work here; waiting {patience:.0f} s for it to leave")
            time.sleep(0.1)

    def close(self) -> None:
        """Let others take the directory."""
        self._lock.close()

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
