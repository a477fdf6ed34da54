"""Addresses and interfaces: by which way a host reaches the others."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import TypeVar

import psutil

from lrd.errors import first_line

T = TypeVar("T")
_INTERNET = (socket.AF_INET, socket.AF_INET6)
_SECONDS_A_TRY = 5.0
_FAULTS_NAMED = 3


def wait_for_port(
    address: str,
    port: int,
    deadline: float,
    is_final: Callable[[OSError], bool] = lambda error: False,
    waiting: Callable[[str], None] = lambda fault: None,
) -> str:
    """Until something listens there. Returns what was wrong at the deadline; empty: it listens.

    Args:
        deadline: of `time.monotonic`; one try is made in any case.
        is_final: which errors end the wait at once.
        waiting: gets what is wrong, at each try.
    """
    while True:
        try:
            socket.create_connection((address, port), timeout=_SECONDS_A_TRY).close()
            return ""
        except OSError as error:
            fault = "no answer" if isinstance(error, TimeoutError) else first_line(error)
            if is_final(error) or time.monotonic() > deadline:
                return fault
            waiting(fault)
        time.sleep(0.5)


def within(seconds: float, action: Callable[[], T]) -> T:
    """Do something that talks to a store, whose calls know no time limit where the network is cut in one of them.

    Raises:
        TimeoutError: it is not done in time; it is left to itself.
    """
    results: list[T] = []
    faults: list[BaseException] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=act, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if faults:
        raise faults[0]
    if not results:
        raise TimeoutError("no answer from the store")
    return results[0]


def address_towards(address: str) -> str:
    """The address of this host from which packets to `address` leave. Nothing is sent. Empty: there is no way there."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]).split("%")[0]
    except OSError:
        return ""


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return str(name)
    return None


def fault_of_named_interface() -> str:
    """What is wrong with GLOO_SOCKET_IFNAME on this host, of which gloo would say `ifa != nullptr`; empty: nothing."""
    name, own = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0], psutil.net_if_addrs()
    if not name or any(entry.family in _INTERNET for entry in own.get(name, [])):
        return ""
    return f"GLOO_SOCKET_IFNAME: no interface {name!r} with an address here, but {', '.join(sorted(own))}"


def choose_interface(addresses: list[str], rank: int) -> str:
    """Have gloo listen where the other hosts can reach this one, unless GLOO_SOCKET_IFNAME says where.

    On its own it takes the address that the host's name stands for, on many machines 127.0.1.1 or none at all.

    Args:
        addresses: each rank's, from which it reaches the main host.

    Returns:
        the address at which gloo will listen; empty where it cannot be told.
    """
    own = addresses[rank]
    if not own or ip_address(own).is_loopback:  # the main host's name stands for a loopback address on that host itself
        others = [one for one in addresses if one and not ip_address(one).is_loopback]
        own = address_towards(others[0]) if others else own
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if chosen:
        entries = psutil.net_if_addrs().get(chosen, [])
        return next((entry.address for entry in entries if entry.family in _INTERNET), "")
    name = interface_of(own) if own else None
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
    return own


def unreachable(targets: dict[str, tuple[str, int]]) -> list[str]:
    """A line for each of the named addresses and ports that cannot be connected to from here; the first few.

    Each may cost five seconds, and the other ranks wait.
    """
    faults = []
    for name, (address, port) in targets.items():
        fault = wait_for_port(address, port, deadline=0.0)
        if fault:
            faults.append(f"cannot reach {name} at {address}, port {port}: {fault}")
        if len(faults) == _FAULTS_NAMED:
            break
    return faults
