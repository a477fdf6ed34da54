"""Signals that ask a run to save and leave."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from lrd.errors import RunError

PARENT = os.getppid()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher dies: its ranks would train on as orphans. Linux only.

    Raises:
        RunError: it died before, while this process imported its modules.
    """
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGTERM)
        if os.getppid() != PARENT:
            raise RunError("the launcher is gone")


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 ask for a save and a clean end; the handler only sets a flag.

    A second one ends the process at once, unless it comes right behind the first: Ctrl-C in a terminal reaches the
    ranks twice, from the terminal and from the launcher that passes it on.
    """

    ECHO_SECONDS = 2.0

    def __init__(self) -> None:
        self.received: int = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > self.ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
