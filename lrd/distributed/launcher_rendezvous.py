"""How the launchers of several hosts meet: `accelerate launch --rdzv_backend lrd`.

torch's own static rendezvous waits ten minutes in silence for a host that is missing and then
prints stack frames; and where the main host dies, the launchers of the others die with it. This
rendezvous says whom it waits for, ends in one line, and meets again when a host comes back.

It is a plug-in of torch's launcher by the entry point `torchrun.handlers`, and runs in launchers,
not in ranks.
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

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from lrd import console
from lrd.distributed import network
from lrd.distributed.job_token import JobToken, TokenChallenge, refusal_line
from lrd.distributed.meeting import (
    LAUNCHERS_KEY,
    LAUNCHERS_MEETING_VARIABLE,
    Meeting,
    MissingParties,
    agree,
    count_arrivals,
)
from lrd.errors import EXIT_USER_ERROR, UserError, first_line

_DEFAULT_PORT = 29500
_DEFAULT_TIMEOUT_SECONDS = "600"
_SECONDS_BETWEEN_NOTICES = 15.0
_SHUTDOWN_SECONDS = 5.0  # how long a launcher waits at its end, for the others or for the store
_RETRY_SECONDS = 0.5


def handler_factory() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point names: a function from a launcher's parameters to its rendezvous."""
    return LauncherRendezvous


class LauncherRendezvous(RendezvousHandler):
    """Lets the launchers of all hosts meet, and meet again.

    The launcher of the main host (machine 0) keeps a TCPStore, which all launchers and their ranks
    use.

    Args:
        parameters: the launcher's parameters. The endpoint is `--main_process_ip` and
            `--main_process_port`; `timeout` of `--rdzv_conf` is how long a missing host is waited
            for, in seconds (default 600).
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.num_machines = parameters.max_nodes
        self.run_id = parameters.run_id
        self.timeout = _parse_timeout(parameters.get("timeout", _DEFAULT_TIMEOUT_SECONDS))

        self.address, self.port = parse_rendezvous_endpoint(parameters.endpoint, _DEFAULT_PORT)
        if not parameters.endpoint and self.num_machines == 1:
            # Accelerate names no endpoint for a single machine; any free port will do.
            self.address = "127.0.0.1"
            self.port = 0

        self.machine_rank = _find_machine_rank(parameters.get("rank"), self.num_machines)
        self.name = f"{socket.gethostname()} (machine_rank {self.machine_rank})"
        if self.machine_rank >= self.num_machines:
            _exit_with_error(
                f"--machine_rank: is {self.machine_rank}, but --num_machines is {self.num_machines}"
            )

        self._token = JobToken.from_environment()
        self._server: TCPStore | None = None  # on the main host
        self._store: PrefixStore | None = None  # the launchers' store, since they met
        self._arrivals: list[int] = []  # arrivals of each machine, when they met
        self._last_notice = 0.0

        # The ranks inherit this. Otherwise torch prints stack frames when a store goes away.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until the launchers of all hosts are here.

        Ends the launcher, in one line, where they do not come.
        """
        deadline = time.monotonic() + self.timeout
        self._last_notice = time.monotonic()

        while True:
            store = self._serve(deadline) if self.machine_rank == 0 else self._join(deadline)
            try:
                meeting = self._meet(store, deadline)
                break
            except UserError as error:  # another token than the main host's, for example
                _exit_with_error(str(error))
            except TimeoutError as error:
                reason = f"no machine {error}" if isinstance(error, MissingParties) else str(error)
                _exit_with_error(
                    f"{self.name}: the hosts did not come together "
                    f"within {self.timeout:.0f} s: {reason}"
                )
            except DistError as error:
                # The launchers of the other hosts outlive the main one and wait for its return.
                if time.monotonic() > deadline:
                    _exit_with_error(
                        f"{self.name}: the hosts did not come together "
                        f"within {self.timeout:.0f} s: the main host is gone: {first_line(error)}"
                    )
                self._notice("the main host is gone again")
                time.sleep(_RETRY_SECONDS)

        # All launchers see the same statements, so all of them end here.
        for statement in meeting.statements:
            if statement["machines"] != self.num_machines:
                _exit_with_error(
                    f"--num_machines: {statement['name']} has {statement['machines']}, "
                    f"{self.name} has {self.num_machines}"
                )

        self._arrivals = meeting.arrivals
        self._store = PrefixStore(
            f"{LAUNCHERS_KEY}/{meeting.name}", self._token.with_token_prefix(store)
        )
        # The ranks inherit it.
        os.environ[LAUNCHERS_MEETING_VARIABLE] = f"{self.address}:{self.port} {meeting.name}"

        bootstrap = RendezvousStoreInfo(self.address, self.port)
        return RendezvousInfo(self._store, self.machine_rank, self.num_machines, bootstrap)

    def num_nodes_waiting(self) -> int:
        """Count the launchers that came back since the last meeting, on the main host.

        torch's launcher restarts its ranks if there are any. The old ranks of those launchers are
        gone, whatever the ranks here believe. The launchers of the other hosts would have to ask
        over the network, and hang with it.
        """
        if self.machine_rank != 0 or self._server is None:
            return 0

        store = PrefixStore(LAUNCHERS_KEY, self._token.with_token_prefix(self._server))
        num_waiting = 0
        for machine, arrivals in enumerate(self._arrivals):
            if count_arrivals(store, machine) > arrivals:
                num_waiting += 1
        return num_waiting

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
        """Leave.

        The main host's launcher leaves last: the store goes with it, and the others still read from
        it.
        """
        if self._store is not None:
            with suppress(TimeoutError, DistError):
                network.call_with_timeout(_SHUTDOWN_SECONDS, self._leave)
        return True

    def _leave(self) -> None:
        assert self._store is not None
        if self.machine_rank != 0:
            self._store.set(f"left/{self.machine_rank}", "")
            return

        others = [f"left/{machine}" for machine in range(1, self.num_machines)]
        while not self._store.check(others):
            time.sleep(0.05)

    def _meet(self, store: TCPStore, deadline: float) -> Meeting:
        """Meet in a store.

        Raises:
            TimeoutError: not all come.
            DistError: the store goes away.
            UserError: see `agree`.
        """
        challenge = TokenChallenge(
            store, "lrd/token/launchers", self._token, self.name, on_refused=self._report_refused
        )
        statement = {"name": self.name, "machines": self.num_machines}

        # The meeting ends by itself at the deadline and names who is missing. The time limit, a
        # little later, is for a network that is cut in the middle of a call.
        seconds_left = max(1.0, deadline - time.monotonic()) + 1.0
        return network.call_with_timeout(
            seconds_left,
            lambda: agree(
                PrefixStore(LAUNCHERS_KEY, self._token.with_token_prefix(store)),
                party=self.machine_rank,
                num_parties=self.num_machines,
                deadline=deadline,
                statement=statement,
                on_wait=self._notice_missing,
                token=self._token,
                challenge=challenge,
            ),
        )

    def _serve(self, deadline: float) -> TCPStore:
        """The store of all launchers and ranks. It is kept from one meeting to the next."""
        while self._server is None:
            try:
                self._server = self._open_server()
            except (OSError, DistError) as error:
                # A host's own name may become known only after the launcher has started.
                is_name_unknown = isinstance(error, socket.gaierror)
                if not is_name_unknown or time.monotonic() > deadline:
                    _exit_with_error(self._describe_server_error(error))
                self._notice(f"waiting for the name {self.address}: {first_line(error)}")
                time.sleep(_RETRY_SECONDS)
        return self._server

    def _open_server(self) -> TCPStore:
        """Open the store, at the address by which the hosts reach it and at no other one.

        A socket that TCPStore opens by itself listens on all interfaces, and its errors say less.

        Raises:
            OSError: nothing can listen at the address and port.
        """
        has_other_hosts = self.num_machines > 1
        listen = network.listen_for_hosts if has_other_hosts else network.listen
        listener = listen(self.address, self.port)
        self.port = listener.getsockname()[1]  # port 0 asked for any free port
        return TCPStore(
            self.address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def _describe_server_error(self, error: OSError | DistError) -> str:
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.EADDRNOTAVAIL:
            return (
                f"--main_process_ip: {self.address} is no address of {self.name}, "
                "which is to be the main host"
            )
        if code == errno.EADDRINUSE:
            return f"--main_process_port: {self.port} is taken on {self.name}"
        return f"--main_process_ip: {self.address} on {self.name}: {first_line(error)}"

    def _join(self, deadline: float) -> TCPStore:
        """Connect to the main host's store."""
        main_host = f"the main host at {self.address}:{self.port}"
        while True:
            problem = network.wait_for_port(
                self.address,
                self.port,
                deadline,
                on_wait=lambda problem: self._notice(f"waiting for {main_host}: {problem}"),
            )
            if problem:
                _exit_with_error(
                    f"--main_process_ip: {self.name} could not reach {main_host} "
                    f"in {self.timeout:.0f} s: {problem}"
                )

            try:
                seconds_left = max(1.0, deadline - time.monotonic())
                return network.call_with_timeout(seconds_left, self._connect)
            except (DistError, TimeoutError) as error:
                # Something else listens at the port, or the main host has just died.
                if time.monotonic() > deadline:
                    _exit_with_error(
                        f"--main_process_port: {main_host} does not speak to {self.name}: "
                        f"{first_line(error)}"
                    )
                time.sleep(_RETRY_SECONDS)

    def _connect(self) -> TCPStore:
        return TCPStore(self.address, self.port, is_master=False, wait_for_workers=False)

    def _report_refused(self, name: str) -> None:
        console.error(f"{self.name}: {refusal_line(name)}")

    def _notice_missing(self, missing: list[int]) -> None:
        machines = ", ".join(map(str, missing))
        self._notice(
            f"waiting for machine {machines} of {self.num_machines} at {self.address}:{self.port}"
        )

    def _notice(self, line: str) -> None:
        """Print a line, at most every few seconds."""
        if time.monotonic() - self._last_notice > _SECONDS_BETWEEN_NOTICES:
            self._last_notice = time.monotonic()
            console.error(f"{self.name}: {line}")


def _parse_timeout(configured: object) -> float:
    try:
        return float(str(configured))
    except ValueError:
        _exit_with_error(f"--rdzv_conf: timeout is {configured}, must be a number of seconds")


def _find_machine_rank(configured: str | None, num_machines: int) -> int:
    """The number of this host; a single one needs none.

    torch passes it to the static rendezvous alone, so here it is read from the launcher's command
    line. A `machine_rank` in accelerate's config file is not found there.
    """
    machine_rank = configured
    if machine_rank is None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(
            "--machine_rank", "--machine-rank", "--node_rank", "--node-rank", dest="machine_rank"
        )
        machine_rank = parser.parse_known_args()[0].machine_rank

    if machine_rank is None and num_machines == 1:
        return 0
    if machine_rank is None:
        _exit_with_error(
            "--machine_rank: give it on the command line; it cannot be read from the config file"
        )
    if not machine_rank.isdecimal():
        _exit_with_error(
            f"--machine_rank: is {machine_rank}; "
            "must be 0 on the main host, 1, 2, ... on the others"
        )
    return int(machine_rank)


def _exit_with_error(line: str) -> NoReturn:
    console.error(line)
    if network.has_abandoned_threads():
        network.exit_at_once(EXIT_USER_ERROR)
    sys.exit(EXIT_USER_ERROR)
