"""A rank that dies or hangs is named, and the launcher restarts the ranks if it may."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from lrd.checkpoint import store
from lrd.distributed import meeting, roll_call, signals
from lrd.distributed.rank_rendezvous import meet_ranks
from lrd.errors import RunError
from tests.helpers.equality import assert_same_end
from tests.helpers.launching import STEPS, rank_processes, start, train_command, wait_for

LONG = ["trainer.epochs=50", "checkpoint.every_steps=5"]


def lrd_line(output: str) -> str:
    """Return the only line in which lrd reports what is wrong."""
    (line,) = [line for line in output.splitlines() if line.startswith("lrd: ")]
    return line


def last_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint, or 0."""
    return max(store.list_steps(run_dir), default=0)


@pytest.fixture
def tcp_store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """A launcher's store, where a rank started by this process looks for it."""
    tcp_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(tcp_store.port))
    return tcp_store


@pytest.fixture
def single_rank(monkeypatch: pytest.MonkeyPatch, tcp_store: dist.TCPStore) -> dist.TCPStore:
    """The store of a launcher whose only rank is this process."""
    # Meeting the other ranks would set the interface for the tests that follow.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return tcp_store


VICTIMS = [
    (2, 0),
    pytest.param(3, 0, marks=pytest.mark.slow),
    pytest.param(3, 1, marks=pytest.mark.slow),
    pytest.param(3, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "victim"), VICTIMS)
def test_a_rank_that_dies_is_named_and_so_is_the_step_from_which_the_run_goes_on(
    tmp_path: Path, ranks: int, victim: int
) -> None:
    process = start(train_command(ranks, tmp_path / "run", *LONG, "data.batch_size=96"))
    wait_for(lambda: bool(store.list_steps(tmp_path / "run")), process)
    rank_processes(process, ranks)[victim].kill()
    output = process.communicate(timeout=60)[0]

    line = lrd_line(output)
    assert f": rank {victim} did not answer" in line
    assert line.endswith(f"the same command goes on from step {last_step(tmp_path / 'run')}")
    assert "lrd/train.py" not in output


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_when_time_is_up(tmp_path: Path) -> None:
    process = start(train_command(2, tmp_path / "run", *LONG, "trainer.timeout_minutes=0.1"))
    wait_for(lambda: bool(store.list_steps(tmp_path / "run")), process)
    began = time.monotonic()
    rank_processes(process, 2)[1].suspend()
    output = process.communicate(timeout=90)[0]  # the launcher gives a stopped rank 30 s
    assert time.monotonic() - began < 60

    line = lrd_line(output)
    assert ": rank 1 did not answer" in line
    assert "Timed out" in line


@pytest.mark.slow
@pytest.mark.parametrize("victims", [[0, 1], [1]])
def test_the_launcher_restarts_the_ranks_if_it_may(
    tmp_path: Path, undisturbed: dict[int, Path], victims: list[int]
) -> None:
    run_dir = tmp_path / "run"
    process = start(train_command(2, run_dir, *STEPS, restarts=3))
    for victim in victims:
        step_before = last_step(run_dir)
        wait_for(lambda step_before=step_before: last_step(run_dir) > step_before, process)
        rank_processes(process, 2)[victim].kill()
        time.sleep(0.5)

    output = process.communicate(timeout=90)[0]
    assert process.returncode == 0, output
    assert output.count("going on after step") == len(victims)
    assert_same_end(run_dir, undisturbed[2])


def test_if_all_ranks_answer_the_roll_call_reports_where_each_of_them_is(
    monkeypatch: pytest.MonkeyPatch, tcp_store: dist.TCPStore
) -> None:
    """Both ranks are in this process, so their answers differ only by the rank and its step."""
    # Started before there is a process group, the caller has no thread that answers.
    caller = roll_call.RollCall()
    caller.step = 7
    caller.start("a prefix")

    thread = threading.local()
    monkeypatch.setattr(roll_call.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(roll_call.dist, "get_world_size", lambda: 2)
    # The thread that answers for a rank is rank 1, unless it is this one.
    monkeypatch.setattr(roll_call.dist, "get_rank", lambda: getattr(thread, "rank", 1))

    other = roll_call.RollCall()
    other.step = 8
    other.start("a prefix")

    thread.rank = 0
    result = caller.call()
    assert result.is_reporter
    line = result.text
    assert "all ranks answered" in line
    assert "rank 0 on " in line
    assert "after step 7" in line
    assert "rank 1 on " in line
    assert "after step 8" in line
    assert not caller.call().is_reporter  # one rank reports it


@pytest.fixture
def rank_0_of_2(monkeypatch: pytest.MonkeyPatch, tcp_store: dist.TCPStore) -> roll_call.RollCall:
    """This process is rank 0 of two, and answers behind `a prefix` of the store."""
    monkeypatch.setattr(roll_call.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(roll_call.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(roll_call.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(roll_call, "_SECONDS_TO_ANSWER", 0.5)
    rank = roll_call.RollCall()
    rank.start("a prefix")
    return rank


@pytest.mark.parametrize("noise", ["7", "[" * 100_000, '{"host": 1}', '{"pid": "x"}', "\xff"])
def test_what_no_rank_has_written_is_no_answer(
    rank_0_of_2: roll_call.RollCall, tcp_store: dist.TCPStore, noise: str
) -> None:
    for key in ("1", "process/1"):
        tcp_store.set(f"a prefix/roll_call/{key}", noise)
    assert rank_0_of_2.call().text == "rank 1 did not answer: gone, stopped or cut off"


@pytest.mark.parametrize("system", ["this one", "another"])
def test_a_rank_that_is_gone_from_this_host_is_not_waited_for(
    rank_0_of_2: roll_call.RollCall, tcp_store: dist.TCPStore, system: str
) -> None:
    """A process of another host may have the same number."""
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    process = roll_call._identify_process() | {"pid": ended.pid}
    if system == "another":
        process["system"] = system
    tcp_store.set("a prefix/roll_call/process/1", json.dumps(process))
    ended.wait()

    began = time.monotonic()
    result = rank_0_of_2.call()
    assert result.text == "rank 1 did not answer: gone, stopped or cut off"
    assert (time.monotonic() - began > 0.4) == (system == "another")


def test_without_a_launchers_store_no_roll_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(roll_call.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(roll_call.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(roll_call.dist, "get_rank", lambda: 0)
    assert roll_call.RollCall().call() == roll_call.RollCallResult(is_reporter=True, text="")


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (
            RuntimeError(
                "[x/gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1. Advice."
            ),
            True,
        ),
        (dist.DistNetworkError("no route"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_an_error_in_the_program_is_not_taken_for_a_lost_rank(
    error: Exception, is_lost: bool
) -> None:
    assert roll_call.is_lost_rank(error) == is_lost

    reason = roll_call.failure_reason(error)
    assert reason.startswith(("Connection closed by peer", "no route", "App", "mat1", "gloo"))
    assert "Advice" not in reason


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # The server is closed: nothing listens at its port any more.
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))

    message = f"the launcher is gone: 127.0.0.1:{port}: Connection refused"
    with pytest.raises(RunError, match=message):
        meet_ranks({}, timedelta(minutes=10))


def test_a_rank_whose_main_host_was_replaced_while_it_started_does_not_wait_there(
    monkeypatch: pytest.MonkeyPatch, single_rank: dist.TCPStore
) -> None:
    launchers = dist.PrefixStore(meeting.LAUNCHERS_KEY, single_rank)
    launchers_meeting = meeting.agree(launchers, 0, 1, time.monotonic() + 5, {})
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    monkeypatch.setenv(meeting.LAUNCHERS_MEETING_VARIABLE, f"{address} {launchers_meeting.name}")
    group = meet_ranks({}, timedelta(minutes=1))
    assert (group.rank, group.world_size) == (0, 1)

    monkeypatch.setenv(meeting.LAUNCHERS_MEETING_VARIABLE, f"{address} earlier")
    with pytest.raises(RunError, match="the main host was started again while this rank started"):
        meet_ranks({}, timedelta(minutes=1))


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("value", ["", "another-host:29500 earlier", "a name without an address"])
def test_a_rank_does_not_ask_for_launchers_that_met_in_another_store(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """A launcher of another kind may have been started by one of lrd's."""
    monkeypatch.setenv(meeting.LAUNCHERS_MEETING_VARIABLE, value)
    assert meet_ranks({}, timedelta(minutes=1)).world_size == 1


@pytest.mark.usefixtures("single_rank")
def test_each_start_has_another_prefix() -> None:
    """The store outlives the ranks, and new ranks must not read the addresses of dead ones."""
    first = meet_ranks({}, timedelta(minutes=1))
    first.store.set("address", "of a rank")

    second = meet_ranks({}, timedelta(minutes=1))
    assert first.prefix != second.prefix
    assert not second.store.check(["address"])


def test_a_rank_that_lost_its_launcher_while_it_imported_modules_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_libc = SimpleNamespace(prctl=lambda *_: 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(signals, "PARENT_PID", signals.PARENT_PID + 1)
    monkeypatch.setattr(signals.ctypes, "CDLL", lambda *_, **__: fake_libc)
    with pytest.raises(RunError, match="the launcher is gone"):
        signals.end_with_launcher()
