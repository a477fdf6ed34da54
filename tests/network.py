"""Hosts for the tests: network namespaces on one switch, each with a name, an address and an interface of its own.

Needs root and iproute2. A link can be cut, and packets dropped in one direction.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil
from launching import ROOT, environment

INTERFACES = ("eth0", "ens5", "enp3s0f1", "net1")
_numbers = count()


def _run(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


@dataclass
class Host:
    """One namespace. Its commands run in `folder`: nothing of it is shared with the other hosts."""

    number: int
    name: str
    namespace: str
    switch: str  # the namespace that holds the other end of its cable
    interface: str
    address: str
    folder: Path

    @property
    def port(self) -> str:
        return f"port{self.number}"

    def command(self, arguments: list[str]) -> list[str]:
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.namespace, *named, *arguments]

    def start(self, arguments: list[str], **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(arguments), cwd=self.folder, env={**environment(), **more},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(int(pid)) for pid in _run("ip", "netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """All its processes at once, as when the power goes."""
        for process in self.processes():
            process.kill()

    def set_link(self, state: str) -> None:
        """`down`: the cable is pulled out at the switch."""
        _run("ip", "-n", self.switch, "link", "set", self.port, state)

    def set_deaf(self, is_deaf: bool) -> None:
        """Packets to it are lost, without a word to the sender; its own go out."""
        address = _run("ip", "netns", "exec", self.namespace, "cat", f"/sys/class/net/{self.interface}/address").strip()
        entry = ["fdb", "replace" if is_deaf else "del", address, "dev", "nowhere", "master"]
        _run("bridge", "-n", self.switch, *entry, *(["static", "sticky"] if is_deaf else []))

    def limit(self, megabits: int) -> None:
        """What it sends, by the switch and by itself."""
        for namespace, device in ((self.switch, self.port), (self.namespace, self.interface)):
            shape = ["root", "tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, *shape)

    def sent_bytes(self) -> int:
        """On the wire since the start, all headers included."""
        counter = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(_run("ip", "netns", "exec", self.namespace, "cat", counter))


def why_not() -> str:
    """Why there can be no such hosts here; empty: there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "bridge", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)}"
    probe = f"lrd-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "del", probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


@contextmanager
def hosts(number: int, folder: Path, delay: float = 0.0) -> Iterator[list[Host]]:
    """So many hosts; all their processes end with the block. `delay`: seconds from a host to the switch and back."""
    prefix, wires = f"lrd-{os.getpid()}-{next(_numbers)}", []
    switch = f"{prefix}-switch"
    own = [
        Host(i, f"host{i}", f"{prefix}-host{i}", switch, INTERFACES[i], f"10.77.0.{i + 1}", folder / f"host{i}")
        for i in range(number)
    ]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", switch, "link", "add", "nowhere", "type", "veth", "peer", "name", "end")
        _run("ip", "-n", switch, "link", "set", "nowhere", "master", "switch", "up")
        _run("ip", "-n", switch, "link", "set", "switch", "up")
        for host in own:
            host.folder.mkdir(parents=True, exist_ok=True)
            _run("ip", "netns", "add", host.namespace)
            if delay:
                wires.append(_lay_long_cable(host, delay))
            else:
                far_end = ["peer", "name", host.interface, "netns", host.namespace]
                _run("ip", "-n", switch, "link", "add", host.port, "type", "veth", *far_end)
            _set_up(host)
        yield own
    finally:
        for wire in wires:
            wire.kill()
            wire.communicate()
        for host in own:
            if Path("/run/netns", host.namespace).exists():
                host.kill()
                _run("ip", "netns", "del", host.namespace)
        if Path("/run/netns", switch).exists():
            _run("ip", "netns", "del", switch)


def _lay_long_cable(host: Host, delay: float) -> subprocess.Popen[str]:
    wire = [sys.executable, str(ROOT / "tests" / "wire.py"), str(delay), host.port, host.interface]
    process = subprocess.Popen(["ip", "netns", "exec", host.switch, *wire], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    _run("ip", "-n", host.switch, "link", "set", host.interface, "netns", host.namespace)
    return process


def _set_up(host: Host) -> None:
    _run("ip", "-n", host.switch, "link", "set", host.port, "master", "switch", "up")
    _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
    for device in ("lo", host.interface):
        _run("ip", "-n", host.namespace, "link", "set", device, "up")


def launcher(own: list[Host], host: Host, ranks: int, target: list[str], *options: str) -> list[str]:
    """What a user types on `host`: `ranks` on each of the hosts."""
    config_file = str(ROOT / "launch" / "accelerate" / "hosts-cpu.yaml")
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file),
        *("--num_machines", str(len(own)), "--num_processes", str(ranks * len(own))),
        *("--machine_rank", str(host.number), "--main_process_ip", own[0].address, *options, *target),
    ]
