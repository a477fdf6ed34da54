"""Meetings, addresses and interfaces, on which ranks and launchers rely before a process group."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

import pytest
import torch.distributed as dist

from lrd.distributed import meeting, network
from lrd.distributed.meeting import MissingParties


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def closed_port() -> int:
    """A port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def deadline_in(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def test_all_parties_agree_on_the_meeting_and_read_all_statements(store: dist.TCPStore) -> None:
    def arrive(number: int) -> meeting.Meeting:
        return meeting.agree(store, number, 5, deadline_in(), {"number": number})

    with ThreadPoolExecutor(5) as pool:
        meetings = list(pool.map(arrive, range(5)))
    assert meetings == [meetings[0]] * 5
    assert meetings[0].arrivals == [1] * 5
    assert meetings[0].statements == [{"number": number} for number in range(5)]


@pytest.mark.parametrize("returning", [(0,), (2,), (0, 2)])
def test_parties_that_come_back_wait_until_the_others_come_back_too(
    store: dist.TCPStore, returning: tuple[int, ...]
) -> None:
    """All parties have met; some of them died and are started again before the others."""

    def arrive(number: int) -> meeting.Meeting:
        return meeting.agree(store, number, 3, deadline_in(), {})

    others = [number for number in range(3) if number not in returning]
    with ThreadPoolExecutor(3) as pool:
        first_results = list(pool.map(arrive, range(3)))

        early = [pool.submit(arrive, number) for number in returning]
        time.sleep(0.3)
        assert not any(arrival.done() for arrival in early)

        late = [pool.submit(arrive, number) for number in others]
        second_results = [arrival.result() for arrival in (*early, *late)]

    assert [result.arrivals for result in second_results] == [[2, 2, 2]] * 3
    first_names = {result.name for result in first_results}
    assert first_names.isdisjoint(result.name for result in second_results)


def test_the_same_arrivals_in_another_store_are_another_meeting(store: dist.TCPStore) -> None:
    other_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first = meeting.agree(store, 0, 1, deadline_in(), {})
    second = meeting.agree(other_store, 0, 1, deadline_in(), {})
    assert first.name != second.name


def test_a_party_is_told_if_another_process_takes_its_number(store: dist.TCPStore) -> None:
    def arrive(number: int) -> meeting.Meeting:
        return meeting.agree(store, number, 3, deadline_in(), {})

    with ThreadPoolExecutor(4) as pool:
        replaced = pool.submit(arrive, 1)
        time.sleep(0.2)
        arrivals = [pool.submit(arrive, number) for number in range(3)]
        with pytest.raises(TimeoutError, match="another process arrived as number 1"):
            replaced.result()
        names = {arrival.result().name for arrival in arrivals}
    assert len(names) == 1


def test_a_party_that_arrived_and_died_counts_as_missing(store: dist.TCPStore) -> None:
    store.add("arrivals/1", 1)
    missing: list[list[int]] = []
    with pytest.raises(MissingParties, match=r"^1$"):
        meeting.agree(store, 0, 2, deadline_in(0.3), {}, missing.append)
    assert missing[0] in ([0, 1], [1])
    assert missing[-1] == [1]


def test_statements_survive_json(store: dist.TCPStore) -> None:
    statement = {"name": "Jörg's host", "keys": [1, 2.5, None]}
    result = meeting.agree(store, 0, 1, deadline_in(), statement)
    assert result.statements == [json.loads(json.dumps(statement))]


def test_differences_are_described_with_key_and_name() -> None:
    facts = [{"seed": 1, "lr": 0.1}, {"seed": 1, "lr": 0.1}, {"seed": 2, "lr": 0.1}, {"seed": 1}]
    lines = meeting.describe_differences(["a", "b", "c", "d"], facts).splitlines()
    assert lines == ["lr: d has None, a has 0.1", "seed: c has 2, a has 1"]
    assert meeting.describe_differences(["a", "b"], facts[:2]) == ""


def test_a_call_with_a_timeout_returns_results_and_raises_errors() -> None:
    assert network.call_with_timeout(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        network.call_with_timeout(5, lambda: 1 // 0)


def test_a_call_with_a_timeout_does_not_wait_longer() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        network.call_with_timeout(0.1, lambda: threading.Event().wait(3))
    assert time.monotonic() - began < 2


def test_waiting_for_a_port_ends_when_something_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert network.wait_for_port("127.0.0.1", port, deadline_in()) == ""


def test_waiting_for_a_port_ends_in_time(closed_port: int) -> None:
    problems: list[str] = []
    problem = network.wait_for_port(
        "127.0.0.1", closed_port, deadline_in(0.1), on_wait=problems.append
    )
    assert problem == "Connection refused"
    assert problems == ["Connection refused"]


def test_waiting_for_a_port_ends_at_a_final_problem(closed_port: int) -> None:
    began = time.monotonic()
    problem = network.wait_for_port(
        "127.0.0.1",
        closed_port,
        deadline_in(60),
        lambda error: isinstance(error, ConnectionRefusedError),
    )
    assert problem
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("listen", [network.listen, network.listen_for_hosts])
def test_listening_at_an_address_is_listening_nowhere_else(
    listen: Callable[[str, int], socket.socket],
) -> None:
    with listen("127.0.0.1", 0) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with listen("localhost", 0) as server:
        assert ip_address(server.getsockname()[0]).is_loopback
    with pytest.raises(OSError, match="assign requested address"):
        listen("203.0.113.9", 0)


def test_a_name_with_several_addresses_listens_at_whichever_another_host_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
        for address in ("10.7.0.1", "10.7.0.2")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    monkeypatch.setattr(network, "listen", lambda *_: socket.create_server(("127.0.0.1", 0)))
    with network.listen_for_hosts("node7", 0) as server:
        assert ip_address(server.getsockname()[0]).is_unspecified


def test_a_name_that_stands_for_a_loopback_address_listens_where_other_hosts_reach_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [entry])
    with network.listen_for_hosts("node7", 0) as server:
        assert ip_address(server.getsockname()[0]).is_unspecified
    with network.listen("node7", 0) as server:  # there is one host
        assert server.getsockname()[0] == "127.0.1.1"


@pytest.fixture
def fake_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with the address 10.7.0.1 on the interface eth9, and without GLOO_SOCKET_IFNAME."""
    # First set, so that it is removed after the test if the code under test sets it.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")

    towards = {"10.7.0.2": "10.7.0.1"}
    interfaces = {"10.7.0.1": "eth9", "127.0.0.1": "lo", "127.0.1.1": "lo"}
    monkeypatch.setattr(network, "address_towards", lambda address: towards[address])
    monkeypatch.setattr(network, "interface_of", interfaces.get)


@pytest.mark.usefixtures("fake_interfaces")
@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["127.0.0.1", "127.0.0.1"], "lo"),  # one host
        (["10.7.0.1", "10.7.0.2"], "eth9"),
        (["127.0.1.1", "10.7.0.2"], "eth9"),  # the main host's own name is a loopback address there
        (["", ""], None),  # no way to any host: gloo chooses
    ],
)
def test_gloo_listens_on_the_interface_towards_the_other_hosts(
    addresses: list[str], expected: str | None
) -> None:
    network.set_gloo_interface(addresses, 0)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


@pytest.mark.usefixtures("fake_interfaces")
@pytest.mark.parametrize(("named", "expected_address"), [("mine", ""), ("lo", "127.0.0.1")])
def test_gloo_listens_on_the_interface_that_the_user_named(
    monkeypatch: pytest.MonkeyPatch, named: str, expected_address: str
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    assert network.set_gloo_interface(["10.7.0.1", "10.7.0.2"], 0) == expected_address
    assert os.environ["GLOO_SOCKET_IFNAME"] == named


def test_a_named_interface_that_does_not_exist_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert network.check_named_interface() == ""

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    assert network.check_named_interface().startswith(
        "GLOO_SOCKET_IFNAME: no interface 'eth77' with an address here"
    )


def test_ranks_that_cannot_be_reached_are_named(closed_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert network.find_unreachable({"rank 1 on b": ("127.0.0.1", port)}) == []

    (line,) = network.find_unreachable({"rank 1 on b": ("127.0.0.1", closed_port)})
    assert line == f"cannot reach rank 1 on b at 127.0.0.1, port {closed_port}: Connection refused"


def test_addresses_and_interfaces_of_this_machine() -> None:
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("203.0.113.9") is None
    assert network.address_towards("no-such-host.invalid") == ""


# A thread is left in a call to a store, which returns while Python cleans up.
_LEAVES_A_THREAD_BEHIND = """
import sys, time
from datetime import timedelta

from torch.distributed import TCPStore

from lrd.distributed import network

class SlowToEnd:
    def __del__(self):
        time.sleep(2.0)

slow_to_end = SlowToEnd()
store = TCPStore(
    "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=1)
)
try:
    network.call_with_timeout(0.1, lambda: store.get("a key that nobody sets"))
except TimeoutError:
    pass
assert network.has_abandoned_threads()
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        pytest.param("", 0, marks=pytest.mark.slow),
        ("raise RuntimeError('as the launcher ends where ranks have failed')", 1),
        ("sys.exit(3)", 3),
        pytest.param("sys.exit('as a program with a message')", 1, marks=pytest.mark.slow),
        pytest.param("network.exit_at_once(2)", 2, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_left_a_call_to_a_store_ends_with_its_own_status(end, status) -> None:
    # Without `_exit_past_abandoned_threads` the second one ended with SIGABRT.
    program = _LEAVES_A_THREAD_BEHIND + end
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    assert "terminate called" not in done.stderr


def test_a_call_that_is_done_in_time_leaves_no_thread_behind() -> None:
    assert network.call_with_timeout(10.0, lambda: 7) == 7
    assert not network.has_abandoned_threads()
