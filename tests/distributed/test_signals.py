"""Signals that ask a run to save and leave."""

import os
import signal
import time

import pytest

from lrd.distributed.signals import StopSignals
from tests.helpers.processes import in_child


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_only_sets_a_flag(name):
    number = getattr(signal, name)

    def receive() -> None:
        with StopSignals() as signals:
            assert signals.received == 0
            os.kill(os.getpid(), number)
            assert signals.received == number

            os.kill(os.getpid(), number)  # the launcher passes it on once more
            assert signals.received == number

    assert in_child(receive) == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_second_signal_ends_the_process(name, monkeypatch):
    number = getattr(signal, name)
    monkeypatch.setattr(StopSignals, "ECHO_SECONDS", 0.01)

    def receive() -> None:
        with StopSignals():
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            os.kill(os.getpid(), number)
            raise AssertionError("the process goes on")

    assert in_child(receive) == number


def test_under_nohup_a_closed_terminal_does_not_stop_the_run():
    def receive() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    assert in_child(receive) == 0


def test_the_handlers_from_before_come_back():
    before = signal.getsignal(signal.SIGHUP)
    with StopSignals():
        assert signal.getsignal(signal.SIGHUP) != before
    assert signal.getsignal(signal.SIGHUP) == before
