"""Strangers at a run's ports, before the ranks meet and while they train: its end is untouched.

With 1,000 connections each time: `pytest -m slow tests/launchers/test_strangers.py`.
"""

from __future__ import annotations

import random
import socket
import struct
import subprocess
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from lrd.checkpoint import store
from tests.helpers.equality import assert_same_end
from tests.helpers.launching import RECIPE, ROOT, SMALL, STEPS, command, environment, wait_for

# What a client of TCPStore sends first: the number of a query, and a magic number.
GREETING = struct.pack("<BI", 0, 0x3C85F7CE)

# Keys that lrd or torch uses where there is no job token.
WELL_KNOWN_KEYS = (
    "lrd/launchers/proposal",
    "lrd/launchers/arrivals/0",
    "lrd/ranks/proposal",
    "lrd/ranks/arrivals/0",
    "lrd/ranks/arrivals/1",
    "lrd/token/ranks",
    "lrd/token/ranks/refused/0",
    "lrd/token/launchers",
    "lrd/token/launchers/refused/0",
)


def listening_ports(process: psutil.Process) -> list[int]:
    """The ports at which a process listens; none if it has just ended."""
    with suppress(psutil.Error):
        return [
            entry.laddr.port
            for entry in process.net_connections("tcp")
            if entry.status == psutil.CONN_LISTEN
        ]
    return []


def make_noise(ports: list[int], number: int, held: ExitStack) -> None:
    """Open connections in turn at the ports; half of them stay open until `held` is closed."""
    generator = random.Random(number)
    for i in range(number):
        connection = socket.create_connection(("127.0.0.1", ports[i % len(ports)]), timeout=10)
        kind = i // len(ports) % 4
        with suppress(OSError):  # it was closed at the first bytes already
            if kind == 0:
                connection.sendall(generator.randbytes(200))
            elif kind == 1:
                connection.sendall(GREETING + generator.randbytes(200))
            elif kind == 2:
                connection.sendall(GREETING[:3])
        if kind < 2:
            connection.close()
        else:
            held.enter_context(connection)


def write_as_a_stranger(port: int) -> None:
    """Write and delete keys by a store client that has no token."""
    client = dist.TCPStore(
        "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
    )
    for key in WELL_KNOWN_KEYS:
        client.set(key, "noise")
    client.set("a large value", "x" * 1_000_000)
    client.delete_key(WELL_KNOWN_KEYS[0])


# Slow, because tests/distributed has what strangers send to a store, one by one.
@pytest.mark.slow
@pytest.mark.parametrize("number", [40, 1000])
def test_noise_and_strangers_change_nothing(
    tmp_path: Path, undisturbed: dict[int, Path], number: int
) -> None:
    run_dir = tmp_path / "run"
    options = ["--rdzv_backend", "lrd"]
    target = ["-m", "lrd.train", RECIPE, f"run_dir={run_dir}", *SMALL, *STEPS]
    with ExitStack() as held, (tmp_path / "output").open("w+") as output:
        launcher = subprocess.Popen(
            command(2, [*options, *target]),
            cwd=ROOT,
            env={**environment(), "LRD_JOB_TOKEN": "a token for this test"},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        held.callback(launcher.kill)
        process = psutil.Process(launcher.pid)

        # The launcher's store is there, and the ranks are only starting.
        wait_for(lambda: bool(listening_ports(process)), launcher)
        (port,) = listening_ports(process)
        make_noise([port], number, held)
        write_as_a_stranger(port)

        # The ranks train. Where gloo listens there is noise too.
        wait_for(lambda: bool(store.list_steps(run_dir)), launcher)
        ports = [port]
        for child in process.children():
            ports += listening_ports(child)
        assert len(ports) > 1
        make_noise(ports, number, held)
        write_as_a_stranger(port)
        assert launcher.poll() is None

        status = launcher.wait(timeout=240)
        output.seek(0)
        assert status == 0, output.read()
    assert_same_end(run_dir, undisturbed[2])
