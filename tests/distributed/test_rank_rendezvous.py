"""What ranks compare and try before there is a process group; several ranks: tests/launchers."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from lrd.distributed import rank_rendezvous
from lrd.distributed.meeting import Meeting
from lrd.errors import RunError, UserError


class LoneRank(rank_rendezvous._Ranks):
    """The only rank of a start, which meets nobody."""

    def __init__(self) -> None:
        super().__init__(dist.HashStore(), 0, 1, time.monotonic() + 5, timedelta(seconds=5))

    def meet(self, key: str, statement: dict[str, Any]) -> Meeting:
        return Meeting(key, [1], [statement])


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    ],
)
def test_a_rank_listens_at_an_address_of_either_family(address: str) -> None:
    rank_rendezvous._require_open_ports(LoneRank(), "start", ["rank 0 on a"], address)


def test_a_rank_that_cannot_listen_passes_its_problem_on_to_the_others() -> None:
    with pytest.raises(RunError) as caught:
        rank_rendezvous._require_open_ports(LoneRank(), "start", ["rank 0 on a"], "203.0.113.9")
    first, advice = str(caught.value).splitlines()
    assert first.startswith("rank 0 on a cannot listen at 203.0.113.9: ")
    assert advice.startswith("all TCP ports must be open")


def set_address(monkeypatch: pytest.MonkeyPatch, address: str, port: int) -> None:
    variables = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_a_rank_0_that_cannot_keep_the_store_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    host = socket.gethostname()
    program = (
        "import socket, sys; server = socket.create_server(('127.0.0.1', 0)); "
        "print(server.getsockname()[1], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        port = int(other.stdout.readline())
        set_address(monkeypatch, "127.0.0.1", port)
        with pytest.raises(UserError) as caught:
            rank_rendezvous._open_store(timedelta(seconds=5))
    assert str(caught.value) == (
        f"rank 0 on {host}: cannot listen at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT): "
        "the port is taken"
    )

    set_address(monkeypatch, "203.0.113.9", port)
    with pytest.raises(UserError) as caught:
        rank_rendezvous._open_store(timedelta(seconds=5))
    assert str(caught.value).endswith("it is no address of this host")


def test_the_store_that_rank_0_keeps_listens_at_master_addr_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    set_address(monkeypatch, "127.0.0.1", port)

    store, _, _ = rank_rendezvous._open_store(timedelta(seconds=5))
    store.set("key", "value")

    # A second job in this process meets in the same store.
    again, _, _ = rank_rendezvous._open_store(timedelta(seconds=5))
    assert again.get("key") == b"value"

    connections = psutil.Process().net_connections("tcp")
    listening = [entry.laddr for entry in connections if entry.status == psutil.CONN_LISTEN]
    assert [tuple(address) for address in listening if address.port == port] == [
        ("127.0.0.1", port)
    ]
