"""How one launcher ends if the others do not come; several launchers are in tests/launchers."""

from __future__ import annotations

import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous import RendezvousParameters

from lrd.distributed import launcher_rendezvous, network
from lrd.distributed.launcher_rendezvous import LauncherRendezvous
from lrd.distributed.meeting import LAUNCHERS_MEETING_VARIABLE


def make_launcher(rank: str | None = "0") -> LauncherRendezvous:
    """Make the launcher of one of two hosts, which waits for the other one for a second."""
    return LauncherRendezvous(
        RendezvousParameters(
            backend="lrd",
            endpoint="127.0.0.1:29500",
            run_id="none",
            min_nodes=2,
            max_nodes=2,
            rank=rank,
            timeout="1",
        )
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher sets these for its ranks; here they must not outlive the test."""
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.setenv(LAUNCHERS_MEETING_VARIABLE, "")  # so that the fixture removes it at the end
    monkeypatch.delenv(LAUNCHERS_MEETING_VARIABLE)


def lose_store(*_: object) -> None:
    raise DistNetworkError("the store is gone")


@pytest.mark.parametrize("name", ["_meet", "_connect"])
def test_a_main_host_that_is_lost_again_and_again_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    num_tries = 0

    def fail(*_: object) -> None:
        nonlocal num_tries
        num_tries += 1
        lose_store()

    monkeypatch.setattr(network, "wait_for_port", lambda *_, **__: "")
    if name == "_meet":
        monkeypatch.setattr(LauncherRendezvous, "_connect", lambda _: None)
    monkeypatch.setattr(LauncherRendezvous, name, fail)

    start = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        make_launcher(rank="1").next_rendezvous()
    assert caught.value.code == 2
    assert time.monotonic() - start < 5
    assert num_tries < 10  # it does not keep a core busy

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lrd: ")
    assert line.endswith("the store is gone")


def listening_addresses() -> set[tuple[str, int]]:
    """Where this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return {tuple(entry.laddr) for entry in connections if entry.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(("endpoint", "num_machines"), [("", 1), ("127.0.0.1:0", 2)])
def test_the_store_listens_at_its_endpoint_and_nowhere_else(
    endpoint: str, num_machines: int
) -> None:
    """Without an endpoint there is one host, and so loopback will do."""
    before = listening_addresses()
    parameters = RendezvousParameters("lrd", endpoint, "none", num_machines, num_machines, rank="0")
    launcher = LauncherRendezvous(parameters)
    launcher._serve(time.monotonic() + 5)
    assert listening_addresses() - before == {("127.0.0.1", launcher.port)}


def test_a_single_machine_needs_no_machine_rank() -> None:
    assert LauncherRendezvous(RendezvousParameters("lrd", "", "none", 1, 1)).machine_rank == 0


def test_without_a_machine_rank_on_the_command_line_the_message_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerate", "launch", "-m", "lrd.train"])
    with pytest.raises(SystemExit):
        make_launcher(rank=None)
    assert capsys.readouterr().err == (
        "lrd: --machine_rank: give it on the command line; it cannot be read from the config file\n"
    )

    monkeypatch.setattr(sys, "argv", ["accelerate", "launch", "--machine_rank", "1"])
    assert make_launcher(rank=None).machine_rank == 1

    with pytest.raises(SystemExit):
        launcher_rendezvous._find_machine_rank("first", 2)
    assert "--machine_rank: is first; must be 0 on the main host" in capsys.readouterr().err


def test_a_launcher_with_another_job_token_is_refused_and_both_sides_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launchers = []
    for rank, token in (("0", "this job's"), ("1", "another job's")):
        monkeypatch.setenv("LRD_JOB_TOKEN", token)
        parameters = RendezvousParameters(
            "lrd", "127.0.0.1:0", "none", 2, 2, rank=rank, timeout="5"
        )
        launchers.append(LauncherRendezvous(parameters))
    main_launcher, other_launcher = launchers
    main_launcher._serve(time.monotonic() + 5)
    other_launcher.port = main_launcher.port

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(launcher.next_rendezvous) for launcher in launchers]
        for end in ends:
            error = end.exception()
            assert isinstance(error, SystemExit)
            assert error.code == 2

    host = socket.gethostname()
    main_name, other_name = (f"{host} (machine_rank {number})" for number in range(2))
    own_line, *main_lines = sorted(capsys.readouterr().err.splitlines())
    assert own_line == (
        f"lrd: LRD_JOB_TOKEN: {other_name} was refused: its token is not that of {main_name}"
    )
    assert sorted(main_lines, key=len, reverse=True) == [
        f"lrd: {main_name}: refused {other_name}, whose LRD_JOB_TOKEN is missing "
        "or not that of this job",
        f"lrd: {main_name}: the hosts did not come together within 5 s: no machine 1",
    ]
