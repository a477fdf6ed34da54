"""Addresses, interfaces, meetings: what ranks and launchers rely on before there is a process group."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from lrd import network, rendezvous


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def test_all_who_are_there_agree_and_hear_each_other(store: dist.TCPStore) -> None:
    with ThreadPoolExecutor(5) as pool:
        meetings = list(
            pool.map(lambda number: rendezvous.agree(store, number, 5, soon(), {"number": number}), range(5))
        )
    assert meetings == [meetings[0]] * 5
    assert meetings[0].arrivals == [1] * 5
    assert meetings[0].said == [{"number": number} for number in range(5)]


@pytest.mark.parametrize("returning", [(0,), (2,), (0, 2)])
def test_who_died_and_came_back_is_waited_for_by_the_others(store: dist.TCPStore, returning: tuple[int, ...]) -> None:
    """All meet; some are started once more by themselves and must not go on until the others are there again."""
    with ThreadPoolExecutor(3) as pool:
        first = list(pool.map(lambda number: rendezvous.agree(store, number, 3, soon(), {}), range(3)))
        early = [pool.submit(rendezvous.agree, store, number, 3, soon(), {}) for number in returning]
        time.sleep(0.3)
        assert not any(one.done() for one in early)
        late = [
            pool.submit(rendezvous.agree, store, number, 3, soon(), {})
            for number in range(3)
            if number not in returning
        ]
        second = [one.result() for one in (*early, *late)]
    assert [meeting.arrivals for meeting in second] == [[2, 2, 2]] * 3
    assert {meeting.name for meeting in second}.isdisjoint(meeting.name for meeting in first)


def test_the_same_arrivals_in_another_store_are_another_meeting(store: dist.TCPStore) -> None:
    other = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert rendezvous.agree(store, 0, 1, soon(), {}).name != rendezvous.agree(other, 0, 1, soon(), {}).name


def test_whose_number_another_takes_is_told_so(store: dist.TCPStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(rendezvous.agree, store, 1, 3, soon(), {})
        time.sleep(0.2)
        rest = [pool.submit(rendezvous.agree, store, number, 3, soon(), {}) for number in range(3)]
        with pytest.raises(TimeoutError, match="another came as number 1"):
            first.result()
        assert {one.result().name for one in rest} == {rest[0].result().name}


def test_one_that_arrived_and_died_is_not_taken_for_one_that_is_there(store: dist.TCPStore) -> None:
    store.add("arrivals/1", 1)
    missing: list[list[int]] = []
    with pytest.raises(rendezvous.Absent, match=r"^1$"):
        rendezvous.agree(store, 0, 2, soon(0.3), {}, missing.append)
    assert missing[0] == [0, 1] or missing[0] == [1]
    assert missing[-1] == [1]


def test_differences_name_key_and_who() -> None:
    said = [{"seed": 1, "lr": 0.1}, {"seed": 1, "lr": 0.1}, {"seed": 2, "lr": 0.1}, {"seed": 1}]
    lines = rendezvous.differences(["a", "b", "c", "d"], said).splitlines()
    assert lines == ["lr: d has None, a has 0.1", "seed: c has 2, a has 1"]
    assert rendezvous.differences(["a", "b"], said[:2]) == ""


def test_within_gives_results_and_errors_and_does_not_wait_for_ever() -> None:
    assert network.within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        network.within(5, lambda: 1 // 0)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        network.within(0.1, lambda: threading.Event().wait(3))
    assert time.monotonic() - began < 2


def test_waiting_for_a_port_ends_when_it_listens_when_it_refuses_for_good_and_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert network.wait_for_port("127.0.0.1", port, soon()) == ""
    faults: list[str] = []
    assert network.wait_for_port("127.0.0.1", port, soon(0.1), waiting=faults.append) == "Connection refused"
    assert faults == ["Connection refused"]
    began = time.monotonic()
    assert network.wait_for_port("127.0.0.1", port, soon(60), lambda error: isinstance(error, ConnectionRefusedError))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["127.0.0.1", "127.0.0.1"], "lo"),  # one host
        (["10.7.0.1", "10.7.0.2"], "eth9"),
        (["127.0.1.1", "10.7.0.2"], "eth9"),  # the main host's own name stands for a loopback address there
        (["", ""], None),  # no way to anywhere: gloo's own choice
    ],
)
def test_gloo_listens_where_the_other_hosts_are(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], expected: str | None
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set here is taken back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(network, "address_towards", lambda address: {"10.7.0.2": "10.7.0.1"}[address])
    monkeypatch.setattr(network, "interface_of", {"10.7.0.1": "eth9", "127.0.0.1": "lo", "127.0.1.1": "lo"}.get)
    network.choose_interface(addresses, 0)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert network.choose_interface(addresses, 0) == ""
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert network.choose_interface(addresses, 0) == "127.0.0.1"


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert network.fault_of_named_interface() == ""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    assert network.fault_of_named_interface().startswith(
        "GLOO_SOCKET_IFNAME: no interface 'eth77' with an address here"
    )


def test_what_cannot_be_reached_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert network.unreachable({"rank 1 on b": ("127.0.0.1", port)}) == []
    (line,) = network.unreachable({"rank 1 on b": ("127.0.0.1", port)})
    assert line == f"cannot reach rank 1 on b at 127.0.0.1, port {port}: Connection refused"


def test_addresses_and_interfaces_of_this_machine() -> None:
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("203.0.113.9") is None
    assert network.address_towards("no-such-host.invalid") == ""


def test_what_is_said_survives_json(store: dist.TCPStore) -> None:
    own = {"name": "Jörg's host", "keys": [1, 2.5, None]}
    assert rendezvous.agree(store, 0, 1, soon(), own).said == [json.loads(json.dumps(own))]
