"""Hosts for the tests: network namespaces on one switch.

Each host has a name, an address and a network interface of its own. Its link can be cut or slowed
down, and packets to it can be dropped. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil

from tests.helpers.launching import ROOT, environment

INTERFACES = ("eth0", "ens5", "enp3s0f1", "net1")
SLOW_WIRE = str(ROOT / "tests" / "helpers" / "slow_wire.py")
_numbers = count()


def _run(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


@dataclass
class Host:
    """One network namespace, as a host of a job.

    Attributes:
        number: counts the hosts from 0.
        switch: the namespace that holds the other end of the host's cable.
        folder: where its commands run; the other hosts share nothing of it.
    """

    number: int
    name: str
    namespace: str
    switch: str
    interface: str
    address: str
    folder: Path

    @property
    def port(self) -> str:
        """The switch's end of the host's cable."""
        return f"port{self.number}"

    def command(self, arguments: list[str]) -> list[str]:
        """Build the command that runs `arguments` on this host, under its name."""
        set_name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.namespace, *set_name, *arguments]

    def start(self, arguments: list[str], **variables: str) -> subprocess.Popen[str]:
        """Start a command on this host, with further environment variables."""
        return subprocess.Popen(
            self.command(arguments),
            cwd=self.folder,
            env={**environment(), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[psutil.Process]:
        """The processes in the namespace, without those that end while they are listed."""
        found = []
        for pid in _run("ip", "netns", "pids", self.namespace).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def kill(self) -> None:
        """Kill all its processes at once, as if the power failed."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def set_link(self, state: str) -> None:
        """Pull the cable out at the switch (`down`) or plug it in again (`up`)."""
        _run("ip", "-n", self.switch, "link", "set", self.port, state)

    def set_deaf(self, is_deaf: bool) -> None:
        """Drop the packets to this host, unnoticed by their sender; those that it sends arrive."""
        path = f"/sys/class/net/{self.interface}/address"
        address = _run("ip", "netns", "exec", self.namespace, "cat", path).strip()

        # The switch sends what is for this address to a port that leads nowhere.
        action = "replace" if is_deaf else "del"
        options = ["static", "sticky"] if is_deaf else []
        entry = [address, "dev", "nowhere", "master", *options]
        _run("bridge", "-n", self.switch, "fdb", action, *entry)

    def limit(self, megabits: int) -> None:
        """Limit the bandwidth of the link, in Mbit/s, in both directions."""
        shape = ["root", "tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
        for namespace, device in ((self.switch, self.port), (self.namespace, self.interface)):
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, *shape)

    def sent_bytes(self) -> int:
        """Return how many bytes it has sent since the start, all headers included."""
        counter = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(_run("ip", "netns", "exec", self.namespace, "cat", counter))


def missing_requirement() -> str:
    """Return why network namespaces cannot be used here; empty if they can."""
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
    """Create hosts for the time of a `with` block; all their processes end with it.

    Args:
        number: of hosts.
        folder: each host gets a folder in it.
        delay: seconds from a host to the switch and back.
    """
    prefix = f"lrd-{os.getpid()}-{next(_numbers)}"
    switch = f"{prefix}-switch"
    wires: list[subprocess.Popen[str]] = []
    all_hosts = [
        Host(
            number=i,
            name=f"host{i}",
            namespace=f"{prefix}-host{i}",
            switch=switch,
            interface=INTERFACES[i],
            address=f"10.77.0.{i + 1}",
            folder=folder / f"host{i}",
        )
        for i in range(number)
    ]

    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", switch, "link", "add", "nowhere", "type", "veth", "peer", "name", "end")
        _run("ip", "-n", switch, "link", "set", "nowhere", "master", "switch", "up")
        _run("ip", "-n", switch, "link", "set", "switch", "up")

        for host in all_hosts:
            host.folder.mkdir(parents=True, exist_ok=True)
            _run("ip", "netns", "add", host.namespace)
            if delay:
                wires.append(_connect_slowly(host, delay))
            else:
                far_end = ["peer", "name", host.interface, "netns", host.namespace]
                _run("ip", "-n", switch, "link", "add", host.port, "type", "veth", *far_end)
            _bring_up(host)

        yield all_hosts

    finally:
        for wire in wires:
            wire.kill()
            wire.communicate()

        for host in all_hosts:
            if Path("/run/netns", host.namespace).exists():
                host.kill()
                _run("ip", "netns", "del", host.namespace)
        if Path("/run/netns", switch).exists():
            _run("ip", "netns", "del", switch)


def _connect_slowly(host: Host, delay: float) -> subprocess.Popen[str]:
    """Connect a host to the switch by a process that delays all packets."""
    wire = [sys.executable, SLOW_WIRE, str(delay), host.port, host.interface]
    process = subprocess.Popen(
        ["ip", "netns", "exec", host.switch, *wire], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    _run("ip", "-n", host.switch, "link", "set", host.interface, "netns", host.namespace)
    return process


def _bring_up(host: Host) -> None:
    _run("ip", "-n", host.switch, "link", "set", host.port, "master", "switch", "up")
    _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
    for device in ("lo", host.interface):
        _run("ip", "-n", host.namespace, "link", "set", device, "up")


def launcher(
    all_hosts: list[Host], host: Host, ranks: int, target: list[str], *options: str
) -> list[str]:
    """Build the command that a user types on one of the hosts.

    Args:
        all_hosts: of the job; the first is the main host.
        host: where the command is typed.
        ranks: on each host.
        target: what each rank runs.
        options: further ones of `accelerate launch`.
    """
    config_file = str(ROOT / "launch" / "accelerate" / "hosts-cpu.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    size = ["--num_machines", str(len(all_hosts)), "--num_processes", str(ranks * len(all_hosts))]
    place = ["--machine_rank", str(host.number), "--main_process_ip", all_hosts[0].address]
    return [*launch, *size, *place, *options, *target]
