"""How the launchers of several hosts find each other: `accelerate launch --rdzv_backend lrd`.

torch's own static rendezvous waits ten minutes without a word for a host that is missing and then shows stack frames;
and where the main host dies, the launchers of the others die with it. This one says whom it waits for, ends in one
line, and has the launchers meet again when a host comes back.

A plug-in of torch's launcher by the entry point `torchrun.handlers`: it runs in launchers, not in ranks.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from lrd import console, network
from lrd.errors import EXIT_USER_ERROR, first_line
from lrd.rendezvous import LAUNCHERS, LAUNCHERS_MEETING, Absent, agree

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_TO_LEAVE = 5.0


def plug_in() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point names."""
    return Hosts


class Hosts(RendezvousHandler):
    """The launchers' meeting.

    Args:
        parameters: of the launcher. The endpoint is `--main_process_ip` and `--main_process_port`; `timeout` of
            `--rdzv_conf` is in seconds, default 600: until a missing host is an error.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.machines = parameters.max_nodes
        self.address, self.port = parse_rendezvous_endpoint(parameters.endpoint, 29500)
        if not parameters.endpoint and self.machines == 1:  # accelerate names none then; a free port will do
            self.address, self.port = "127.0.0.1", 0
        self.run_id = parameters.run_id
        self.seconds = _seconds(parameters.get("timeout", "600"))
        self.number = _machine_rank(parameters.get("rank"))
        self.name = f"{socket.gethostname()} (machine_rank {self.number})"
        self._server: TCPStore | None = None
        self._store: PrefixStore | None = None  # of the launchers since they met
        self._met: list[int] = []
        self._said = 0.0
        # For the ranks, which inherit it: torch gives a store that went the frames of a crash.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if self.number >= self.machines:
            _leave(f"--machine_rank: is {self.number}, but --num_machines is {self.machines}")

    def next_rendezvous(self) -> RendezvousInfo:
        deadline, self._said = time.monotonic() + self.seconds, time.monotonic()
        own = {"name": self.name, "machines": self.machines}
        while True:
            store = self._serve(deadline) if self.number == 0 else self._join(deadline)
            arrivals = PrefixStore(LAUNCHERS, store)
            try:
                meeting = network.within(
                    max(1.0, deadline - time.monotonic()) + 1.0,
                    lambda: agree(arrivals, self.number, self.machines, deadline, own, self._wait_for),  # noqa: B023
                )
                break
            except TimeoutError as error:
                why = f"no machine {error}" if isinstance(error, Absent) else str(error)
                _leave(f"{self.name}: the hosts did not come together within {self.seconds:.0f} s: {why}")
            except DistError:
                self._say("the main host is gone again")
        for one in meeting.said:
            if one["machines"] != self.machines:
                _leave(f"--num_machines: {one['name']} has {one['machines']}, {self.name} has {self.machines}")
        self._met = meeting.arrivals
        self._store = PrefixStore(f"{LAUNCHERS}/{meeting.name}", store)
        os.environ[LAUNCHERS_MEETING] = meeting.name  # for the ranks
        bootstrap = RendezvousStoreInfo(self.address, self.port)
        return RendezvousInfo(self._store, self.number, self.machines, bootstrap)

    def _serve(self, deadline: float) -> TCPStore:
        """The store of all launchers and ranks, kept on the main host."""
        while self._server is None:
            try:
                family, kind, _, _, target = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)[0]
                with socket.socket(family, kind) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(target)
                self._server = TCPStore(self.address, self.port, is_master=True, wait_for_workers=False)
                self.port = self._server.port
            except (OSError, DistError) as error:
                is_name = isinstance(error, socket.gaierror)  # one's own may come to be known later than one starts
                if not is_name or time.monotonic() > deadline:
                    _leave(self._describe(error))
                self._say(f"waiting for the name {self.address}: {first_line(error)}")
                time.sleep(0.5)
        return self._server

    def _describe(self, error: OSError | DistError) -> str:
        if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
            return f"--main_process_ip: {self.address} is no address of {self.name}, which is to be the main host"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            return f"--main_process_port: {self.port} is taken on {self.name}"
        return f"--main_process_ip: {self.address} on {self.name}: {first_line(error)}"

    def _join(self, deadline: float) -> TCPStore:
        where = f"the main host at {self.address}:{self.port}"
        while True:
            fault = network.wait_for_port(
                self.address, self.port, deadline, waiting=lambda fault: self._say(f"waiting for {where}: {fault}")
            )
            if fault:
                _leave(f"--main_process_ip: {self.name} could not reach {where} in {self.seconds:.0f} s: {fault}")
            try:
                return network.within(max(1.0, deadline - time.monotonic()), self._connect)
            except (DistError, TimeoutError) as error:  # something else has the port, or the main host just died
                if time.monotonic() > deadline:
                    _leave(f"--main_process_port: {where} does not speak to {self.name}: {first_line(error)}")

    def _connect(self) -> TCPStore:
        return TCPStore(self.address, self.port, is_master=False, wait_for_workers=False)

    def _wait_for(self, missing: list[int]) -> None:
        machines = ", ".join(map(str, missing))
        self._say(f"waiting for machine {machines} of {self.machines} at {self.address}:{self.port}")

    def _say(self, line: str) -> None:
        """Now and then."""
        if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            console.complain(f"lrd: {self.name}: {line}")

    def num_nodes_waiting(self) -> int:
        """On the main host, whether another launcher came back: its ranks are gone, whatever those here believe.

        The launchers elsewhere would have to ask over the network, and hang with it.
        """
        if self.number != 0 or self._server is None:
            return 0
        arrivals = PrefixStore(LAUNCHERS, self._server)
        return sum(arrivals.add(f"arrivals/{each}", 0) > times for each, times in enumerate(self._met))

    def get_backend(self) -> str:
        return "lrd"

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        """The main host's launcher leaves last, for the store goes with it and the others still ask it for the end."""
        if self._store is not None:
            with suppress(TimeoutError, DistError):
                network.within(_SECONDS_TO_LEAVE, self._take_leave)
        return True

    def _take_leave(self) -> None:
        assert self._store is not None
        if self.number != 0:
            self._store.set(f"left/{self.number}", "")
            return
        while not self._store.check([f"left/{each}" for each in range(1, self.machines)]):
            time.sleep(0.05)


def _seconds(configured: object) -> float:
    try:
        return float(str(configured))
    except ValueError:
        _leave(f"--rdzv_conf: timeout is {configured}, must be a number of seconds")


def _machine_rank(configured: str | None) -> int:
    """torch hands it to the static rendezvous alone; here it is read from the command line, as all know it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--machine_rank", "--machine-rank", "--node_rank", "--node-rank", dest="rank")
    rank = parser.parse_known_args()[0].rank if configured is None else configured
    if rank is None or not rank.isdecimal():
        _leave(f"--machine_rank: is {rank}; must be 0 on the main host, 1, 2, ... on the others")
    return int(rank)


def _leave(line: str) -> NoReturn:
    console.complain(f"lrd: {line}")
    sys.exit(EXIT_USER_ERROR)
