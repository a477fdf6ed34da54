"""How the ranks of one start meet, before there is a process group.

With `--max_restarts` the launcher's store outlives the ranks, and new ranks would read the
addresses of dead ones from it (pytorch issue 135712). So each start keeps its keys behind a prefix
of its own. Kills of one rank after which the first restart worked, on gloo with static rendezvous
on one host: 5 of 17 without the prefix, 21 of 21 with it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from lrd import console
from lrd.distributed import network
from lrd.distributed.job_token import NO_TOKEN, JobToken, TokenChallenge, refusal_line
from lrd.distributed.meeting import (
    LAUNCHERS_KEY,
    LAUNCHERS_MEETING_VARIABLE,
    Meeting,
    MissingParties,
    agree,
    describe_differences,
)
from lrd.errors import RunError, UserError, first_line

# Beyond the deadline, for a meeting to report by itself who is missing before it is given up.
_GRACE_SECONDS = 2.0
_MAX_DIFFERING_RANKS_NAMED = 8


@dataclass(frozen=True)
class RankGroup:
    """The ranks of this start, which have met.

    Attributes:
        store: the store for a process group; all its keys are behind `prefix`.
        prefix: the prefix of this start's keys in the launcher's store; the same on all ranks, and
            on no other start's.
        rank: the rank of this process.
        world_size: the number of ranks.
    """

    store: Store
    prefix: str
    rank: int
    world_size: int


def meet_ranks(facts: dict[str, Any], timeout: timedelta) -> RankGroup:
    """Wait until all ranks are here, and refuse to go on where they cannot work together.

    TORCHELASTIC_RESTART_COUNT does not tell starts apart: the launcher of each host counts its own.

    Args:
        facts: what must be equal on all ranks, by the key that a user knows it by; JSON.
        timeout: how long a missing rank is waited for.

    Raises:
        RunError: the launcher is gone or has to meet others first; the ranks did not come together
            in time; they cannot reach each other.
        UserError: a line for each fact that differs, and for each host that lacks the interface it
            was told.
    """
    deadline = time.monotonic() + timeout.total_seconds()

    _require_a_launcher(deadline)
    store_without_prefix, rank, world_size = _open_store(timeout)
    token = JobToken.from_environment()
    store = token.with_token_prefix(store_without_prefix)
    name = f"rank {rank} on {socket.gethostname()}"

    # A rank in another job's store is told so by the challenge of that job's launchers.
    launchers_challenge = TokenChallenge(store_without_prefix, "lrd/token/launchers", token, name)
    _require_the_same_launchers(store, launchers_challenge)

    facts_text = json.dumps(facts, sort_keys=True)
    store.set(f"lrd/facts/{rank}", facts_text)

    # Every rank reads all statements, so a statement has a digest of the facts.
    ranks = _Ranks(store, rank, world_size, deadline, timeout, token)
    challenge = TokenChallenge(
        store_without_prefix, "lrd/token/ranks", token, name, on_refused=_report_refused
    )
    meeting = ranks.meet(
        "lrd/ranks",
        {
            "host": ranks.host,
            "address": network.address_towards(os.environ["MASTER_ADDR"]),
            "interface_problem": network.check_named_interface(),
            "facts": hashlib.sha256(facts_text.encode()).hexdigest(),
        },
        challenge,
    )
    hosts = [statement["host"] for statement in meeting.statements]
    names = [f"rank {number} on {host}" for number, host in enumerate(hosts)]

    _require_interfaces(names, [statement["interface_problem"] for statement in meeting.statements])
    _require_equal_facts(store, names, [statement["facts"] for statement in meeting.statements])

    # The prefix with which the roll call finds this start's keys in the store itself.
    start = f"lrd/start/{meeting.name}"
    prefix = f"{token.key_prefix}/{start}" if token.secret else start
    addresses = [statement["address"] for statement in meeting.statements]
    address = network.set_gloo_interface(addresses, rank)
    if len(set(hosts)) > 1:
        _require_open_ports(ranks, start, names, address)

    return RankGroup(PrefixStore(start, store), prefix, rank, world_size)


def _open_store(timeout: timedelta) -> tuple[Store, int, int]:
    """The store in which the ranks meet, this process's rank, and the number of ranks.

    Raises:
        UserError: rank 0 keeps it, and cannot listen there.
        RunError: it cannot be reached, or, where rank 0 keeps it, another rank did not come.
    """
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    is_keeper = rank == 0 and not _has_launcher_store()
    rank_name = f"rank {rank} on {socket.gethostname()}"
    try:
        store = _serve(world_size, timeout) if is_keeper else _connect(world_size, timeout)
    except OSError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"{rank_name}: cannot listen at {address} (MASTER_ADDR, MASTER_PORT): "
            f"{network.describe_listen_error(error)}"
        ) from None
    except DistError as error:
        reason = first_line(error).split(". ")[0]
        raise RunError(
            f"{rank_name}: the {world_size} ranks did not come together within {timeout}: {reason}"
        ) from None
    return store, rank, world_size


def _has_launcher_store() -> bool:
    """Whether the launcher keeps the ranks' store; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _serve(world_size: int, timeout: timedelta) -> TCPStore:
    """Open the ranks' store here, at MASTER_ADDR and at no other address of this host.

    Raises:
        OSError: nothing can listen there.
        DistError: not all ranks connected in time.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    listen_fd = None
    try:
        listen_fd = network.listen_for_hosts(address, port).detach()
    except OSError as error:
        # An earlier job in this process may keep a store there, which torch then uses again.
        if error.errno != errno.EADDRINUSE or not network.is_own_port(port):
            raise
    return TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listen_fd,
    )


def _connect(world_size: int, timeout: timedelta) -> TCPStore:
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, world_size, is_master=False, timeout=timeout)


@dataclass(frozen=True)
class _Ranks:
    """This process among the ranks, for a meeting and for those that follow it."""

    store: Store
    rank: int
    world_size: int
    deadline: float
    timeout: timedelta
    token: JobToken = NO_TOKEN

    @property
    def host(self) -> str:
        return socket.gethostname()

    def meet(
        self, key: str, statement: dict[str, Any], challenge: TokenChallenge | None = None
    ) -> Meeting:
        """Meet behind a key of the store; see `agree`.

        Raises:
            RunError: not all ranks came before the deadline.
            UserError: see `agree`.
        """
        seconds_left = self.deadline - time.monotonic() + _GRACE_SECONDS
        store = PrefixStore(key, self.store)
        try:
            return network.call_with_timeout(
                seconds_left,
                lambda: agree(
                    store,
                    self.rank,
                    self.world_size,
                    self.deadline,
                    statement,
                    token=self.token,
                    challenge=challenge,
                ),
            )
        except TimeoutError as error:
            reason = f"no rank {error}" if isinstance(error, MissingParties) else str(error)
            raise RunError(
                f"rank {self.rank} on {self.host}: the {self.world_size} ranks "
                f"did not come together within {self.timeout}: {reason}"
            ) from None


def _require_a_launcher(deadline: float) -> None:
    """Raise if the launcher's store is not there, which is there before the launcher's ranks are.

    Without it, the ranks would wait until the deadline. Where rank 0 keeps the store, the other
    ranks may come before it and wait: torch would do the same, and print a stack on giving up.

    A host that does not answer may be cut off for a while; one that refuses the connection has no
    launcher any more.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    if not _has_launcher_store():
        _require_rank_0(address, port, deadline)
        return

    problem = network.wait_for_port(
        address, port, deadline, is_final=lambda error: isinstance(error, ConnectionRefusedError)
    )
    if problem:
        raise RunError(f"the launcher is gone: {address}:{port}: {problem}")


def _require_rank_0(address: str, port: int, deadline: float) -> None:
    """Raise if rank 0, which keeps the store, cannot be reached before the deadline."""
    rank = int(os.environ["RANK"])
    problem = ""
    if rank == 0:  # torch connects to its own store by this name
        try:
            socket.getaddrinfo(address, port)
        except OSError as error:
            problem = first_line(error)
    else:
        problem = network.wait_for_port(
            address, port, deadline, is_final=lambda error: isinstance(error, socket.gaierror)
        )
    if problem:
        raise RunError(
            f"rank {rank} on {socket.gethostname()}: rank 0 cannot be reached at "
            f"{address}:{port} (MASTER_ADDR, MASTER_PORT): {problem}"
        )


def _report_refused(name: str) -> None:
    console.error(refusal_line(name))


def _require_the_same_launchers(store: Store, challenge: TokenChallenge) -> None:
    """Raise if the store is that of a main host that came back, or of another job.

    Ranks that were still starting would wait in it for ranks whose launcher waits for theirs.

    Args:
        store: the part of the ranks' store that parties with their token use.
        challenge: the launchers'.
    """
    address, _, meeting_name = os.environ.get(LAUNCHERS_MEETING_VARIABLE, "").partition(" ")
    if address != f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}":
        return  # no launcher of lrd keeps this store; the variable may be of one further out

    challenge.require_same_token()
    if not store.check([f"{LAUNCHERS_KEY}/agreed/{meeting_name}"]):
        raise RunError(
            "the main host was started again while this rank started; "
            "its launcher has to meet it first"
        )


def _require_interfaces(names: list[str], problems: list[str]) -> None:
    lines = [f"{name}: {problem}" for name, problem in zip(names, problems, strict=True) if problem]
    if lines:
        raise UserError("\n".join(lines))


def _require_equal_facts(store: Store, names: list[str], digests: list[str]) -> None:
    """Raise if the ranks' facts differ.

    The facts are read only where their digests differ, because a thousand ranks' facts are
    megabytes.
    """
    # The first few name the keys that differ; a thousand ranks' lines would hide them.
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not differing:
        return

    compared = [0, *differing[:_MAX_DIFFERING_RANKS_NAMED]]
    facts = [json.loads(store.get(f"lrd/facts/{rank}")) for rank in compared]
    raise UserError(describe_differences([names[rank] for rank in compared], facts))


def _require_open_ports(ranks: _Ranks, prefix: str, names: list[str], address: str) -> None:
    """Have the first rank of each host connect to those of the other hosts, as gloo's ranks will.

    A firewall may let the launchers' port through and no other. gloo itself would take five times
    the timeout to say so, and not on all ranks.

    Raises:
        RunError: a line for each connection that failed; the same on all ranks.
    """
    is_first_on_host = os.environ.get("LOCAL_RANK", "0") == "0"
    endpoint = None
    problems = []

    with ExitStack() as stack:
        # A rank that raised here would leave the others waiting, so its problem is passed on.
        if is_first_on_host and address:
            try:
                server = stack.enter_context(network.listen(address, 0))
                endpoint = [address, server.getsockname()[1]]
            except OSError as error:
                problems.append(f"cannot listen at {address}: {first_line(error)}")
        listening = ranks.meet(f"{prefix}/open", {"endpoint": endpoint}).statements

        if endpoint is not None:
            endpoints = {
                names[rank]: statement["endpoint"]
                for rank, statement in enumerate(listening)
                if statement["endpoint"] and rank != ranks.rank
            }
            problems += network.find_unreachable(endpoints)

        # The servers listen until all ranks have tried.
        tried = ranks.meet(f"{prefix}/tried", {"problems": problems}).statements

    lines = [
        f"{names[rank]} {problem}"
        for rank, statement in enumerate(tried)
        for problem in statement["problems"]
    ]
    if lines:
        advice = (
            "all TCP ports must be open between the hosts; GLOO_SOCKET_IFNAME names the interface"
        )
        raise RunError("\n".join([*lines, advice]))
