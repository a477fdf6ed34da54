"""Which rank is missing when a collective fails.

The other ranks only see that a connection was closed or that the time is up, not by whom. So each
rank has a thread that answers a roll call, whatever its main thread is waiting for: a process that
is gone or stopped does not answer, and one that hangs says where. A rank that is on the same host
and gone is not waited for.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch.distributed as dist

import lrd
from lrd.distributed.network import call_with_timeout
from lrd.errors import first_line

_SECONDS_TO_ANSWER = 3.0  # several times _POLL_SECONDS, at which a rank looks for a call
_SECONDS_TO_CONNECT = 5.0
_POLL_SECONDS = 0.5
_COLLECTIVE_ERROR = re.compile(
    r"gloo|NCCL|TCPStore|pair closure|[Cc]onnection (closed|reset|refused)|[Tt]imed out"
)
_PACKAGE_FOLDER = str(Path(lrd.__file__).parent)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an exception comes from a failed collective and not from a fault in the program."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or _COLLECTIVE_ERROR.search(str(error)) is not None


def failure_reason(error: BaseException) -> str:
    """What a collective says about its failure, without the line of its sources and the advice."""
    return re.sub(r"^\[[^]]*\] ", "", first_line(error)).split(". ")[0]


@dataclass(frozen=True)
class RollCallResult:
    """What a roll call found, and who prints it.

    Attributes:
        is_reporter: whether this rank prints it; False if another rank has printed it, or called
            the roll first.
        text: the ranks that did not answer, or the place of each rank if all did, or what a rank
            said before it ended; empty if no roll was called.
    """

    is_reporter: bool
    text: str


class RollCall:
    """Answers for this rank from a thread, and calls the roll when something failed.

    A single rank needs none.

    Attributes:
        step: the number of steps done so far, which is part of the answer.
    """

    def __init__(self) -> None:
        self.step = 0
        self._prefix = ""

    def start(self, prefix: str) -> None:
        """Answer from now on.

        Args:
            prefix: the prefix of this start's keys in the launcher's store, see
                `rank_rendezvous.RankGroup`.
        """
        self._prefix = prefix
        if _has_other_ranks():
            threading.Thread(target=self._answer, name="roll call", daemon=True).start()

    def announce_end(self, reason: str) -> None:
        """Tell the other ranks why this one ends, before its connections are closed.

        They then do not look for it.
        """
        if not _has_other_ranks():
            return
        with suppress(RuntimeError, ValueError, OSError):
            call_with_timeout(
                2 * _SECONDS_TO_CONNECT,
                lambda: _connect_to_store().set(self._key("end"), reason),
            )

    def call(self) -> RollCallResult:
        """Find out who does not answer, or where each rank is if all do."""
        if not _has_other_ranks():
            return RollCallResult(is_reporter=True, text="")

        rank = dist.get_rank()
        answer = self._describe_this_rank()
        try:
            return call_with_timeout(
                _SECONDS_TO_ANSWER + 2 * _SECONDS_TO_CONNECT,
                lambda: self._call(rank, answer),
            )
        except (RuntimeError, ValueError, OSError):
            # Without the store the ranks cannot agree on who reports this, so each of them does.
            return RollCallResult(
                is_reporter=True,
                text="rank 0 is gone, or the host that kept the ranks' store, "
                "or the way there is cut",
            )

    def _answer(self) -> None:
        # An error means that the store went with the rank or launcher that kept it.
        with suppress(RuntimeError, ValueError, OSError):
            store = _connect_to_store()
            store.set(self._key(f"process/{dist.get_rank()}"), json.dumps(_identify_process()))

            # torch's own wait() would print stack frames when the store goes away.
            while not store.check([self._key("call")]):
                time.sleep(_POLL_SECONDS)
            store.set(self._key(dist.get_rank()), self._describe_this_rank())

    def _describe_this_rank(self) -> str:
        main_frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return json.dumps(
            {"host": socket.gethostname(), "step": self.step, "where": _innermost_place(main_frame)}
        )

    def _call(self, rank: int, answer: str) -> RollCallResult:
        store = _connect_to_store()
        if store.check([self._key("end")]):
            return RollCallResult(is_reporter=False, text=store.get(self._key("end")).decode())

        store.set(self._key(rank), answer)
        store.set(self._key("call"), "now")

        # All ranks see the failure and call. The first one collects, so that one line is printed.
        if store.add(self._key("callers"), 1) > 1:
            return RollCallResult(is_reporter=False, text="")

        world_size = dist.get_world_size()
        answers: dict[int, dict[str, Any]] = {}
        this_process = _identify_process()
        deadline = time.monotonic() + _SECONDS_TO_ANSWER

        while True:
            silent = [other for other in range(world_size) if other not in answers]
            for other in silent:
                found = self._read(store, other, {"host": str, "step": int, "where": str})
                if found is not None:
                    answers[other] = found

            still_silent = [other for other in silent if other not in answers]
            if time.monotonic() > deadline or all(
                self._is_known_to_be_gone(store, other, this_process) for other in still_silent
            ):
                return RollCallResult(is_reporter=True, text=_describe_answers(answers, world_size))
            time.sleep(0.05)

    def _is_known_to_be_gone(self, store: Any, rank: int, this_process: dict[str, Any]) -> bool:
        """Whether the process of a rank was on this host and is not there any more."""
        process = self._read(store, f"process/{rank}", {"pid": int, "system": str})
        if process is None or process["system"] != this_process["system"] or not process["system"]:
            return False
        try:
            status = psutil.Process(process["pid"]).status()
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False  # it is there, and another user's
        return bool(status == psutil.STATUS_ZOMBIE)

    def _read(self, store: Any, what: object, types: dict[str, type]) -> dict[str, Any] | None:
        """Read what a rank has written; None if it has not, or if it is not what ranks write.

        Args:
            types: the type of each value.
        """
        key = self._key(what)
        if not store.check([key]):
            return None
        try:
            found = json.loads(store.get(key))
        except (ValueError, RecursionError):
            return None
        is_valid = isinstance(found, dict) and all(
            isinstance(found.get(name), kind) for name, kind in types.items()
        )
        return found if is_valid else None

    def _key(self, what: object) -> str:
        return f"{self._prefix}/roll_call/{what}"


def _describe_answers(answers: dict[int, dict[str, Any]], world_size: int) -> str:
    missing = [f"rank {rank}" for rank in range(world_size) if rank not in answers]
    if missing:
        return f"{', '.join(missing)} did not answer: gone, stopped or cut off"

    places = [
        f"rank {rank} on {answer['host']} after step {answer['step']}, in {answer['where']}"
        for rank, answer in sorted(answers.items())
    ]
    return f"all ranks answered a roll call: {'; '.join(places)}"


def _identify_process() -> dict[str, Any]:
    """The id of this process, and the running system in which it has this id; empty: not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        system = f"{boot} {os.readlink('/proc/self/ns/pid')}"  # a container has ids of its own
    except OSError:
        system = ""
    return {"pid": os.getpid(), "system": system}


def _has_other_ranks() -> bool:
    """Whether there is a roll to call, and a launcher's store to call it in."""
    return dist.is_initialized() and dist.get_world_size() > 1 and "MASTER_ADDR" in os.environ


def _connect_to_store() -> Any:
    """Open another connection to the launcher's store: the process group's is busy.

    Raises:
        OSError: nothing listens there. This is tried first because torch would print stack frames.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    socket.create_connection((address, port), timeout=_SECONDS_TO_CONNECT).close()

    timeout = timedelta(seconds=_SECONDS_TO_CONNECT)
    return dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]


def _innermost_place(frame: FrameType | None) -> str:
    """The innermost place of this package on a stack, as `file:line function`."""
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename.startswith(_PACKAGE_FOLDER) and filename != __file__:
            return f"{Path(filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back

    return "no code of lrd"
