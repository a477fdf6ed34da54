"""Addresses, interfaces and ports: by which way a host reaches the others."""

from __future__ import annotations

import atexit
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, NoReturn, TypeVar

import psutil

from lrd.errors import first_line

T = TypeVar("T")

_INTERNET_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_CONNECT_SECONDS = 5.0
_POLL_SECONDS = 0.5
_MAX_UNREACHABLE_NAMED = 3

_abandoned_threads: list[threading.Thread] = []  # of calls that were not done in time
_exit_statuses: list[Any] = []  # what `sys.exit` was called with, since a thread was abandoned


def wait_for_port(
    address: str,
    port: int,
    deadline: float,
    is_final: Callable[[OSError], bool] = lambda error: False,
    on_wait: Callable[[str], None] = lambda problem: None,
) -> str:
    """Wait until something listens at a port.

    Args:
        address: IP address or name of the host.
        port: the TCP port.
        deadline: on the clock of `time.monotonic`; one attempt is made in any case.
        is_final: which errors end the wait at once.
        on_wait: is called with the problem after each attempt that failed.

    Returns:
        The problem at the deadline; empty: something listens.
    """
    while True:
        try:
            socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
            return ""
        except OSError as error:
            problem = "no answer" if isinstance(error, TimeoutError) else first_line(error)
            if is_final(error) or time.monotonic() > deadline:
                return problem
            on_wait(problem)
        time.sleep(_POLL_SECONDS)


def listen(address: str, port: int) -> socket.socket:
    """Listen at one address of this host, of IPv4 or IPv6, and at no other one.

    Args:
        address: IP address or name; of a name's addresses the first.
        port: the TCP port; 0: any free one.

    Raises:
        OSError: the name is unknown, the address is no address of this host, or the port is taken.
    """
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    family, _, _, _, target = found[0]
    return socket.create_server(target, family=family)


def listen_for_hosts(address: str, port: int) -> socket.socket:
    """Listen where other hosts reach this one by `address`.

    A name may stand for several addresses, of which another host may take any. And on many hosts
    their own name stands for 127.0.1.1, which no other host can reach. In both cases this listens
    at all addresses. `localhost`, and an address that is written out, are taken at their word.

    Raises:
        OSError: see `listen`.
    """
    listener = listen(address, port)
    if address == "localhost" or _is_ip_address(address):
        return listener

    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    addresses = {str(target[0]).split("%")[0] for *_, target in found}
    if len(addresses) == 1 and not ip_address(addresses.pop()).is_loopback:
        return listener

    port = listener.getsockname()[1]
    listener.close()
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def describe_listen_error(error: OSError) -> str:
    """Why `listen` failed, in words."""
    if error.errno == errno.EADDRINUSE:
        return "the port is taken"
    if error.errno == errno.EADDRNOTAVAIL:
        return "it is no address of this host"
    return first_line(error)


def is_own_port(port: int) -> bool:
    """Whether this process listens at a TCP port."""
    connections = psutil.Process().net_connections("tcp")
    return any(
        entry.status == psutil.CONN_LISTEN and entry.laddr.port == port for entry in connections
    )


def _is_ip_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def call_with_timeout(seconds: float, action: Callable[[], T]) -> T:
    """Call something that talks to a store, in another thread.

    A store's calls have no time limit where the network is cut in the middle of one.

    Args:
        seconds: how long to wait for it.
        action: what to call.

    Raises:
        TimeoutError: the call is not done in time; its thread is left behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, name="store", daemon=True)
    thread.start()
    thread.join(seconds)

    if errors:
        raise errors[0]
    if not results:
        abandon(thread)
        raise TimeoutError("no answer from the store")
    return results[0]


def abandon(thread: threading.Thread) -> None:
    """Give up a thread that is in a call of a library that does not return."""
    if not _abandoned_threads:
        _remember_exit_status()
    _abandoned_threads.append(thread)


def has_abandoned_threads() -> bool:
    """Whether a thread is still in a call that was given up, by `call_with_timeout` for example.

    Such a process must end by `os._exit`. If the call returned while Python cleans up, Python would
    end the thread within torch's C++ code, and that aborts the process with SIGABRT.
    """
    return any(thread.is_alive() for thread in _abandoned_threads)


def exit_at_once(status: int) -> NoReturn:
    """End this process without Python's clean-up."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it was closed before the start
            with suppress(OSError, ValueError):  # the terminal was closed
                stream.flush()
    os._exit(status)


def _remember_exit_status() -> None:
    """Have `sys.exit` note its status: an exit handler is not told it.

    Without this, a user's own program that calls `sys.exit(3)` after lrd gave up a call, to a
    mirror for example, would end with status 0. lrd's own programs end by `exit_at_once`.
    """
    leave = sys.exit

    def note_and_leave(status: Any = None) -> NoReturn:
        _exit_statuses.append(status)
        leave(status)

    sys.exit = note_and_leave


def _exit_past_abandoned_threads() -> None:
    """End a program that is not lrd's own, before Python's clean-up."""
    if not has_abandoned_threads():
        return

    # Python sets `last_value` for an uncaught exception, other than that of `sys.exit`.
    status = 1 if hasattr(sys, "last_value") else 0
    if _exit_statuses:
        last = _exit_statuses[-1]
        status = last if isinstance(last, int) else int(last is not None)
    exit_at_once(status)


atexit.register(_exit_past_abandoned_threads)


def address_towards(address: str) -> str:
    """The address of this host from which packets to `address` leave. Nothing is sent.

    Returns:
        An IP address; empty where there is no way to `address`.
    """
    # Connecting a UDP socket sends nothing: the system only looks up the route, and with it the
    # address of this end.
    discard_port = 9
    try:
        found = socket.getaddrinfo(address, discard_port, type=socket.SOCK_DGRAM)
        family, kind, _, _, target = found[0]
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


def check_named_interface() -> str:
    """Check that this host has the interface that GLOO_SOCKET_IFNAME names.

    gloo itself would only say `ifa != nullptr`.

    Returns:
        The problem in one line; empty: there is none.
    """
    name = _named_interface()
    interfaces = psutil.net_if_addrs()
    entries = interfaces.get(name, [])
    if not name or any(entry.family in _INTERNET_FAMILIES for entry in entries):
        return ""
    return (
        f"GLOO_SOCKET_IFNAME: no interface {name!r} with an address here, "
        f"but {', '.join(sorted(interfaces))}"
    )


def set_gloo_interface(addresses: list[str], rank: int) -> str:
    """Set GLOO_SOCKET_IFNAME to the interface where the other hosts reach this one, if it is unset.

    Left to itself gloo takes the address that the host's name stands for: on many machines
    127.0.1.1, on some none at all.

    Args:
        addresses: for each rank, the address from which it reaches the main host; empty: none.
        rank: the rank of this process.

    Returns:
        The address at which gloo will listen; empty where it cannot be told.
    """
    address = addresses[rank]

    # On the main host itself its name may stand for a loopback address.
    if not address or ip_address(address).is_loopback:
        remote = [other for other in addresses if other and not ip_address(other).is_loopback]
        if remote:
            address = address_towards(remote[0])

    named = _named_interface()
    if named:
        entries = psutil.net_if_addrs().get(named, [])
        internet = [entry.address for entry in entries if entry.family in _INTERNET_FAMILIES]
        return internet[0] if internet else ""

    interface = interface_of(address) if address else None
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return address


def find_unreachable(endpoints: dict[str, tuple[str, int]]) -> list[str]:
    """Which of the named endpoints cannot be connected to from here.

    Only the first few are found: each may cost five seconds, and the other ranks wait.

    Args:
        endpoints: name -> (address, port).

    Returns:
        A line for each.
    """
    problems: list[str] = []
    for name, (address, port) in endpoints.items():
        problem = wait_for_port(address, port, deadline=0.0)
        if problem:
            problems.append(f"cannot reach {name} at {address}, port {port}: {problem}")
        if len(problems) == _MAX_UNREACHABLE_NAMED:
            break
    return problems


def _named_interface() -> str:
    """The first interface that GLOO_SOCKET_IFNAME names; empty: none."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
