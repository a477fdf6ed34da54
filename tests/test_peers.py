"""A rank that dies or hangs is named, and the launcher goes on by itself where it may."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from launching import STEPS, rank_processes, start, train_command, wait_for
from test_resume import assert_same_end

from lrd import checkpoint, peers, rendezvous, signals
from lrd.errors import RunError

LONG = ["trainer.epochs=50", "checkpoint.every_steps=5"]


@pytest.mark.parametrize(
    ("ranks", "victim"), [(2, 0), *(pytest.param(3, victim, marks=pytest.mark.slow) for victim in (0, 1, 2))]
)
def test_a_rank_that_dies_is_named_and_so_is_where_the_run_goes_on(tmp_path: Path, ranks: int, victim: int) -> None:
    process = start(train_command(ranks, tmp_path / "run", *LONG, "data.batch_size=96"))
    wait_for(lambda: bool(checkpoint.steps(tmp_path / "run")), process)
    rank_processes(process, ranks)[victim].kill()
    output = process.communicate(timeout=60)[0]
    (line,) = [line for line in output.splitlines() if line.startswith("lrd: ")]
    assert f": rank {victim} did not answer a roll call" in line
    kept = max(checkpoint.steps(tmp_path / "run"))
    assert line.endswith(f"the same command goes on from step {kept}")
    assert "lrd/train.py" not in output


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_when_time_is_up(tmp_path: Path) -> None:
    process = start(train_command(2, tmp_path / "run", *LONG, "trainer.timeout_minutes=0.1"))
    wait_for(lambda: bool(checkpoint.steps(tmp_path / "run")), process)
    began = time.monotonic()
    rank_processes(process, 2)[1].suspend()
    output = process.communicate(timeout=90)[0]  # the launcher gives a stopped rank 30 s
    assert time.monotonic() - began < 60
    (line,) = [line for line in output.splitlines() if line.startswith("lrd: ")]
    assert ": rank 1 did not answer a roll call" in line
    assert "Timed out" in line


@pytest.mark.parametrize("victims", [pytest.param([0, 1], marks=pytest.mark.slow), [1]])
def test_the_launcher_goes_on_by_itself_where_it_may(
    tmp_path: Path, undisturbed: dict[int, Path], victims: list[int]
) -> None:
    process = start([*train_command(2, tmp_path / "run", *STEPS, restarts=3)])
    for victim in victims:
        before = max(checkpoint.steps(tmp_path / "run"), default=0)
        wait_for(lambda before=before: max(checkpoint.steps(tmp_path / "run"), default=0) > before, process)
        rank_processes(process, 2)[victim].kill()
        time.sleep(0.5)
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 0, output
    assert output.count("going on after step") == len(victims)
    assert_same_end(tmp_path / "run", undisturbed[2])


def test_where_everybody_answers_it_is_said_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of one process: their answers differ by the rank alone."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(rendezvous, "prefix", "here")
    rank = threading.local()
    monkeypatch.setattr(peers.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(peers.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(peers.dist, "get_rank", lambda: getattr(rank, "number", 1))
    other = peers.RollCall()
    other.step = 8
    other.start()
    rank.number = 0
    caller = peers.RollCall()
    caller.step = 7
    said = caller.call()
    assert said is not None
    assert "all ranks answered" in said
    assert "rank 0 on " in said
    assert "after step 7" in said
    assert "rank 1 on " in said
    assert "after step 8" in said
    assert caller.call() is None  # one says it


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[x/gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1. Advice."), True),
        (dist.DistNetworkError("no route"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_fault_of_the_program_is_no_lost_peer(error: Exception, is_lost: bool) -> None:
    assert peers.is_lost_peer(error) == is_lost
    assert peers.reason(error).startswith(("Connection closed by peer", "no route", "App", "mat1", "gloo"))
    assert "Advice" not in peers.reason(error)


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody_soon:
        port = nobody_soon.getsockname()[1]
    for key, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(RunError, match=f"the launcher is gone: 127.0.0.1:{port}: Connection refused"):
        next(rendezvous._meet("lrd://", timedelta(minutes=10)))


def test_a_rank_whose_main_host_was_replaced_while_it_started_does_not_wait_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = rendezvous.agree(dist.PrefixStore(rendezvous.LAUNCHERS, store), 0, 1, time.monotonic() + 5, {})
    monkeypatch.setattr(rendezvous, "prefix", "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # it would be set for the tests that follow
    facts = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for key, value in {**facts, "RANK": 0, "WORLD_SIZE": 1, rendezvous.LAUNCHERS_MEETING: meeting.name}.items():
        monkeypatch.setenv(key, str(value))
    assert next(rendezvous._meet("lrd://", timedelta(minutes=1)))[1:] == (0, 1)
    monkeypatch.setenv(rendezvous.LAUNCHERS_MEETING, "that of the store before")
    with pytest.raises(RunError, match="the main host was started again while this rank started"):
        next(rendezvous._meet("lrd://", timedelta(minutes=1)))


def test_a_rank_that_lost_its_launcher_while_it_imported_modules_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(signals, "PARENT", signals.PARENT + 1)
    monkeypatch.setattr(signals.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(prctl=lambda *_: 0))
    with pytest.raises(RunError, match="the launcher is gone"):
        signals.follow_launcher()
