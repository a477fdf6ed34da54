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

# The parent when this process began: a launcher may die while torch is imported.
PARENT_PID = os.getppid()

# A terminal that is closed sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# Whoever starts a run without a launcher, but wants it to end with itself, puts its process id
# here.
PARENT_VARIABLE = "LRD_PARENT_PID"

_PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this rank when the launcher dies. Linux only.

    Otherwise its ranks would train on as orphans. A run of `lrd study` ends with the study.

    Raises:
        RunError: the launcher died before, while this process imported its modules.
    """
    parent_pid = os.environ.get(PARENT_VARIABLE, "")
    if not (parent_pid.isdecimal() or "LOCAL_RANK" in os.environ) or sys.platform != "linux":
        return

    # The kernel sends nothing if the parent died before this call, so that is checked afterwards.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != (int(parent_pid) if parent_pid.isdecimal() else PARENT_PID):
        raise RunError("the launcher is gone")


class StopSignals:
    """A context in which SIGTERM, SIGINT, SIGHUP and SIGUSR1 only set a flag for the training loop.

    A signal that is ignored stays ignored: `nohup` ignores SIGHUP, so that a run goes on after its
    terminal is closed.

    A second signal ends the process at once, unless it comes within two seconds of the first:
    Ctrl-C in a terminal reaches the ranks twice, from the terminal and from the launcher that
    passes it on.

    Attributes:
        received: the first signal that came; 0: none.
    """

    ECHO_SECONDS = 2.0

    def __init__(self) -> None:
        self.received: int = 0
        self._received_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received = number
            self._received_at = time.monotonic()
        elif time.monotonic() - self._received_at > self.ECHO_SECONDS:
            # With the default handler restored, the same signal ends the process as if it had never
            # been handled, and the parent sees the signal's exit status.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
