"""Which run a mirror belongs to, and that one start of it at a time writes there.

The mirror's `run.json` names the run, the start that uses it, and the settings that affect the
results. The run's id and the start's are kept in the run directory too. While a start lives, a
thread counts up in `run.json`, so another start can see that it is alive without comparing clocks.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lrd import console, files
from lrd.checkpoint import store
from lrd.checkpoint.mirror.remote import KEY, Remote, RemoteError
from lrd.distributed import network
from lrd.errors import UserError, describe_os_error

RUN_FILE = "run.json"  # in the mirror
LOCAL_FILE = "mirror.json"  # in the run directory

_FORMAT = 1
_BEAT_SECONDS = 5.0
_PATIENCE = 20.0  # seconds without a beat after which a start is taken to be gone
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_LEAVE = 1.0


@dataclass(frozen=True)
class Occupant:
    """What `run.json` says.

    Attributes:
        run: the run's id.
        start: the id of the start that uses the mirror, or did last.
        is_alive: whether that start has not reported its end.
        beat: counts up while it lives.
        host: where it runs.
        settings: all settings that affect the results, as in a checkpoint's `trainer.json`.
        format: of this file.
    """

    run: str
    start: str
    is_alive: bool
    beat: int
    host: str
    settings: dict[str, Any]
    format: int = _FORMAT

    def render(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


class Claim:
    """The right of one start to write to a mirror. Rank 0 makes one; the others must not.

    Args:
        remote: the mirror.
        run_dir: the run directory, which need not exist yet.
    """

    def __init__(self, remote: Remote, run_dir: Path) -> None:
        self.remote = remote
        self.run_dir = run_dir
        self._seen_start: str | None = None  # in the mirror, when it was looked at
        self._occupant: Occupant | None = None  # that this start has written
        self._lock = threading.Lock()  # of `_occupant` and of what is written
        self._ended = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def find_settings(self) -> dict[str, Any] | None:
        """Look whether this start may have the mirror. Nothing is written.

        Waits up to _PATIENCE seconds to see whether another start, on another machine, lives.

        Returns:
            The settings of the run in the mirror, which the caller compares with its own; None if
            the mirror has no run.

        Raises:
            UserError: the mirror has another run, or another start is using it; or it failed.
        """
        try:
            occupant = self._read()
        except RemoteError as error:
            raise UserError(f"{KEY}: {self.remote.url}: {error}") from None
        if occupant is None:
            return None

        self._seen_start = occupant.start
        self._require_same_run(occupant)
        if occupant.is_alive and occupant.start != self._read_local().get("start"):
            self._wait_until_gone(occupant)
        return occupant.settings

    def take(self, settings: dict[str, Any]) -> None:
        """Write this start into the mirror and into the run directory, which is this run's now.

        Args:
            settings: all settings that affect the results.

        Raises:
            UserError: another start was faster, or it failed.
        """
        previous_ids = self._read_local()
        try:
            # What was compared and waited for is the start that was seen, and no other.
            current = self._read()
            if current is not None and current.start != self._seen_start:
                raise UserError(self._describe_other_start(current))

            new_run = previous_ids.get("run", uuid.uuid4().hex)
            occupant = Occupant(
                run=new_run if current is None else current.run,
                start=uuid.uuid4().hex,
                is_alive=True,
                beat=0,
                host=socket.gethostname(),
                settings=settings,
            )
            # First here: a start that is killed in between must know the mirror as its own.
            self._write_local({"run": occupant.run, "start": occupant.start})

            if not self.remote.write(RUN_FILE, occupant.render(), is_new=current is None):
                # Or it is this one: the answer to the first try may have been lost.
                current = self._read()
                if current is None or current.start != occupant.start:
                    # A new id would keep this directory out of the other start's run for ever.
                    self._write_local(previous_ids)
                    raise UserError(self._describe_other_start(current))
        except RemoteError as error:
            raise UserError(f"{KEY}: {self.remote.url}: {error}") from None

        self._occupant = occupant
        self._thread = threading.Thread(target=self._beat, name="mirror-claim", daemon=True)
        self._thread.start()

    def require_held(self) -> None:
        """Look whether the mirror is still this start's, before something that readers see.

        Raises:
            LostClaimError: another start has taken it.
            RemoteError: it failed.
        """
        current = self._read()
        occupant = self._occupant
        if occupant is None or current is None or current.start != occupant.start:
            raise LostClaimError(self._describe_other_start(current))

    def release(self) -> None:
        """Report this start's end, so that the next one need not wait; no error if that fails.

        It does nothing before `take`, nor after `close`: the next start may have begun.
        """
        self._ended.set()
        with self._lock:
            if self._is_closed or self._occupant is None:
                return
            try:
                self.require_held()
                self._occupant = replace(self._occupant, is_alive=False)
                self.remote.write(RUN_FILE, self._occupant.render())
            except (RemoteError, UserError):
                return

    def close(self) -> None:
        """Write nothing any more, and do not wait for a server that does not answer."""
        self._is_closed = True
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_LEAVE)
            if self._thread.is_alive():  # it waits for a server that does not answer
                network.abandon(self._thread)

    def _beat(self) -> None:
        """Count up in `run.json` while the mirror is this start's. Runs in a thread."""
        while not self._ended.wait(_BEAT_SECONDS):
            with self._lock:
                if self._ended.is_set():
                    return
                try:
                    self.require_held()
                    assert self._occupant is not None
                    self._occupant = replace(self._occupant, beat=self._occupant.beat + 1)
                    self.remote.write(RUN_FILE, self._occupant.render())
                except LostClaimError:
                    return  # the next upload says so
                except RemoteError:
                    continue  # the uploads say so

    def _require_same_run(self, occupant: Occupant) -> None:
        """Refuse a mirror with another run than the run directory has."""
        known_run = self._read_local().get("run")
        if known_run is None and store.list_steps(self.run_dir):
            raise UserError(
                f"{KEY}: {self.remote.url} has a run that is not the one in {self.run_dir}; "
                "give this one another prefix, or an empty run_dir to go on with that run"
            )
        if known_run is not None and known_run != occupant.run:
            raise UserError(
                f"{KEY}: {self.remote.url} has run {occupant.run[:8]}, {self.run_dir} has run "
                f"{known_run[:8]}; give this one another prefix"
            )

    def _wait_until_gone(self, occupant: Occupant) -> None:
        """Wait until a start has not counted up for _PATIENCE seconds, or has ended.

        Raises:
            UserError: it has counted up, so it lives; or the mirror could not be read.
        """
        console.info(
            f"{self.remote.url}: a start on {occupant.host} was using this mirror; "
            f"waiting up to {_PATIENCE:.0f} s to see whether it still is"
        )
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            try:
                current = self._read()
            except RemoteError as error:
                raise UserError(f"{KEY}: {self.remote.url}: {error}") from None
            if current is None or (current.start == occupant.start and not current.is_alive):
                return
            if (current.start, current.beat) != (occupant.start, occupant.beat):
                raise UserError(self._describe_other_start(current))

    def _describe_other_start(self, occupant: Occupant | None) -> str:
        where = "" if occupant is None else f" on {occupant.host}"
        return f"{KEY}: another run{where} is using {self.remote.url}; give this one another prefix"

    def _read(self) -> Occupant | None:
        content = self.remote.read(RUN_FILE)
        if content is None:
            return None
        try:
            return _parse(content)
        except ValueError as error:
            raise RemoteError(f"{RUN_FILE}: {error}") from None

    def _write_local(self, ids: dict[str, str]) -> None:
        """Replace the ids in the run directory; it has none afterwards if `ids` is empty.

        Raises:
            UserError: that is not possible.
        """
        path = self.run_dir / LOCAL_FILE
        try:
            if ids:
                files.replace(path, json.dumps(ids, indent=1).encode())
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"run_dir: {describe_os_error(error)}") from None

    def _read_local(self) -> dict[str, str]:
        """The ids in the run directory; empty if it has none.

        Raises:
            UserError: they cannot be read.
        """
        path = self.run_dir / LOCAL_FILE
        try:
            ids = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"run_dir: {describe_os_error(error)}") from None
        except (ValueError, RecursionError):
            ids = None

        if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
            raise UserError(f"run_dir: {path} is damaged; it should have the ids of run and start")
        return ids


class LostClaimError(UserError):
    """Another start has taken the mirror."""


def _parse(content: bytes) -> Occupant:
    """Read a `run.json`.

    Raises:
        ValueError: it is not what a run writes.
    """
    try:
        values = json.loads(content)
        occupant = Occupant(**values)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("is not what a run writes there") from None

    if occupant.format != _FORMAT:
        raise ValueError(f"has format {occupant.format!r}, this lrd reads {_FORMAT}")
    kinds = {"run": str, "start": str, "is_alive": bool, "beat": int, "host": str, "settings": dict}
    if not all(isinstance(getattr(occupant, key), kind) for key, kind in kinds.items()):
        raise ValueError("is not what a run writes there")
    return occupant
