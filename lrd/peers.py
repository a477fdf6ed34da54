"""Who is missing when a collective fails.

What the ranks below say then is that a connection was closed or that time is up, not by whom. So each rank has a
thread that answers a roll call whatever its main thread is waiting for: a process that is gone or stopped does not
answer, and one that hangs says where.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from lrd import rendezvous
from lrd.errors import first_line
from lrd.network import within

_SECONDS_TO_ANSWER = 3.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_CONNECT = 5.0
_OF_A_COLLECTIVE = re.compile(r"gloo|NCCL|TCPStore|pair closure|[Cc]onnection (closed|reset|refused)|[Tt]imed out")
_PACKAGE = str(Path(__file__).parent)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception comes from a collective that failed, and not from a fault in the program."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or _OF_A_COLLECTIVE.search(str(error)) is not None
    )


def reason(error: BaseException) -> str:
    """What a collective says of its failure, without the place in its sources and the advice."""
    return re.sub(r"^\[[^]]*\] ", "", first_line(error)).split(". ")[0]


class RollCall:
    """Answers for this rank, from a thread of its own. One rank alone needs none.

    Attributes:
        step: steps done so far, for the answer.
    """

    def __init__(self) -> None:
        self.step = 0

    def start(self) -> None:
        """Answer from now on; once there is a process group."""
        if dist.is_initialized() and dist.get_world_size() > 1 and "MASTER_ADDR" in os.environ:
            threading.Thread(target=self._answer, name="roll call", daemon=True).start()

    def _answer(self) -> None:
        try:
            store = _connect()
            while not store.check([_key("call")]):  # torch's wait() shows stack frames where the store goes
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            store.set(_key(dist.get_rank()), self._say())
        except (RuntimeError, ValueError, OSError):  # the store went with the rank or launcher that kept it
            pass

    def _say(self) -> str:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return json.dumps({"host": socket.gethostname(), "step": self.step, "where": _innermost(frame)})

    def call(self) -> str | None:
        """Who did not answer, in a few words, or where each rank is if all did. None: another rank is to say so."""
        if not dist.is_initialized():
            return ""
        rank, own = dist.get_rank(), self._say()
        try:
            answers = within(_SECONDS_TO_ANSWER + 2 * _SECONDS_TO_CONNECT, lambda: self._collect(rank, own))
        except (RuntimeError, ValueError, OSError):
            return "rank 0 is gone, or the host that kept the ranks' store, or the way there is cut"
        if answers is None:
            return None
        missing = [f"rank {rank}" for rank in range(dist.get_world_size()) if rank not in answers]
        if missing:
            return f"{', '.join(missing)} did not answer a roll call: gone, stopped or cut off"
        places = [f"rank {r} on {a['host']} after step {a['step']}, in {a['where']}" for r, a in answers.items()]
        return f"all ranks answered a roll call: {'; '.join(places)}"

    def _collect(self, rank: int, own: str) -> dict[int, dict[str, Any]] | None:
        """The answers of those who answered. None: another rank collects them."""
        ranks = range(dist.get_world_size())
        store = _connect()
        store.set(_key(rank), own)
        store.set(_key("call"), "now")
        if store.add(_key("callers"), 1) > 1:
            return None
        until = time.monotonic() + _SECONDS_TO_ANSWER
        while time.monotonic() < until and not store.check([_key(each) for each in ranks]):
            time.sleep(0.05)
        return {each: json.loads(store.get(_key(each))) for each in ranks if store.check([_key(each)])}


def _connect() -> Any:
    """A connection of one's own: the process group's is busy with what failed.

    Raises:
        OSError: nothing listens there; looked at first, for torch shows stack frames.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.create_connection((address, port), timeout=_SECONDS_TO_CONNECT).close()
    seconds = timedelta(seconds=_SECONDS_TO_CONNECT)
    return dist.TCPStore(address, port, is_master=False, timeout=seconds, wait_for_workers=False)  # type: ignore[attr-defined]


def _key(what: object) -> str:
    return f"{rendezvous.prefix}/roll_call/{what}"


def _innermost(frame: FrameType | None) -> str:
    """The innermost place of this package on a stack."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_code.co_filename != __file__:
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "no code of lrd"
