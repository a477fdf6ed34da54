"""How the ranks of a start find each other: behind a prefix of the launcher's store that is this start's own.

With `--max_restarts` that store outlives the ranks, and new ones would take the addresses of dead ones from it
(pytorch issue 135712). Kills of one rank after which the first restart worked, on gloo with static rendezvous on one
host: 5 of 17 without this, 21 of 21 with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.distributed.rendezvous import rendezvous as rendezvous_of_torch

from lrd import network
from lrd.errors import RunError, UserError

INIT_METHOD = "lrd://"
LAUNCHERS = "lrd/launchers"  # where in the store lrd.hosts lets them meet
LAUNCHERS_MEETING = "LRD_LAUNCHERS_MEETING"  # environment variable of their ranks: its name
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_OF_GRACE = 2.0
_ODD_RANKS_NAMED = 8
prefix = ""  # of this start's keys in the store; the same on all its ranks
facts: dict[str, Any] = {}  # what must be equal on all ranks before any of them does anything


class Absent(TimeoutError):
    """Some did not come in time."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(", ".join(map(str, numbers)))


@dataclass(frozen=True)
class Meeting:
    """All parties, at one time.

    Attributes:
        name: no other meeting has it, in no other store either.
        arrivals: how often each party has come so far.
        said: what each said of itself.
    """

    name: str
    arrivals: list[int]
    said: list[dict[str, Any]]


def agree(
    store: Store,
    number: int,
    count: int,
    deadline: float,
    own: dict[str, Any],
    waiting: Callable[[list[int]], None] = lambda missing: None,
) -> Meeting:
    """Go on when all of `count` parties are here at once.

    Each counts its arrivals. Number 0 proposes the counts that it sees until each party has found its own among them:
    one that is gone does not answer, and what it left behind proves nothing. Each party reads a key or two at a time,
    whatever their number.

    Args:
        number: this party's.
        deadline: of `time.monotonic`.
        own: what this party says of itself; JSON, and little, for all read it.
        waiting: gets the numbers that number 0 still waits for, at each look.

    Raises:
        Absent: at the deadline; who is missing, as far as this party can tell.
        TimeoutError: another took this party's number; its own time is over.
    """
    arrival = store.add(f"arrivals/{number}", 1)
    store.set(f"says/{number}/{arrival}", json.dumps(own))
    missing, once = [0], uuid.uuid4().hex  # another store counts the same arrivals
    while True:
        if number == 0:
            store.set("proposal", json.dumps([once, [store.add(f"arrivals/{each}", 0) for each in range(count)]]))
        proposal = store.get("proposal") if store.check(["proposal"]) else b'["", []]'
        arrivals, name = json.loads(proposal)[1], hashlib.sha256(proposal).hexdigest()[:16]
        if len(arrivals) == count and arrivals[number] == arrival:
            store.set(f"agrees/{name}/{number}", "")
            if store.check([f"agreed/{name}"]):
                keys = [f"says/{each}/{times}" for each, times in enumerate(arrivals)]
                return Meeting(name, arrivals, [json.loads(said) for said in store.multi_get(keys)])
        elif len(arrivals) == count and arrivals[number] > arrival:
            raise TimeoutError(f"another came as number {number}")
        if number == 0:
            missing = [each for each in range(count) if not store.check([f"agrees/{name}/{each}"])]
            waiting(missing)
            if not missing:
                store.set(f"agreed/{name}", "")
        if time.monotonic() > deadline:
            raise Absent(missing)
        time.sleep(_SECONDS_BETWEEN_LOOKS * (1 + count / 64))  # the store answers all of them


def differences(who: list[str], said: list[dict[str, Any]]) -> str:
    """A line for each key that somebody has otherwise than the first; empty: all are the same."""
    lines = []
    for name, theirs in zip(who[1:], said[1:], strict=True):
        for key in said[0].keys() | theirs.keys():
            if theirs.get(key) != said[0].get(key):
                lines.append(f"{key}: {name} has {theirs.get(key)!r}, {who[0]} has {said[0].get(key)!r}")
    return "\n".join(sorted(lines))


def _meet(_: str, timeout: timedelta, **__: Any) -> Iterator[tuple[Store, int, int]]:
    """`env://` behind a prefix, when all ranks are here and `facts` are equal on all of them.

    TORCHELASTIC_RESTART_COUNT does not tell starts apart: each host's launcher counts its own.

    Raises:
        RunError: the launcher is gone or has to meet others first, or the ranks did not come together in time, or
            cannot reach each other.
        UserError: a line for each fact that differs, for each host without the interface it was told.
    """
    global prefix
    deadline = time.monotonic() + timeout.total_seconds()
    _refuse_orphans(deadline)
    store, rank, world_size = next(rendezvous_of_torch("env://", timeout=timeout))
    _refuse_another_meeting(store)
    host, address = socket.gethostname(), network.address_towards(os.environ["MASTER_ADDR"])

    def meet(place: str, own: dict[str, Any]) -> Meeting:
        left = deadline - time.monotonic() + _SECONDS_OF_GRACE
        try:
            return network.within(left, lambda: agree(PrefixStore(place, store), rank, world_size, deadline, own))
        except TimeoutError as error:
            why = f"no rank {error}" if isinstance(error, Absent) else str(error)
            raise RunError(
                f"rank {rank} on {host}: the {world_size} ranks did not come together within {timeout}: {why}"
            ) from None

    text = json.dumps(facts, sort_keys=True)
    store.set(f"lrd/facts/{rank}", text)
    fault = network.fault_of_named_interface()
    own = {"host": host, "address": address, "fault": fault, "facts": hashlib.sha256(text.encode()).hexdigest()}
    meeting = meet("lrd/ranks", own)
    who = [f"rank {number} on {one['host']}" for number, one in enumerate(meeting.said)]
    faults = [f"{name}: {one['fault']}" for name, one in zip(who, meeting.said, strict=True) if one["fault"]]
    if faults:
        raise UserError("\n".join(faults))
    _refuse_differences(store, who, [one["facts"] for one in meeting.said])
    prefix = f"lrd/start/{meeting.name}"
    listening_at = network.choose_interface([one["address"] for one in meeting.said], rank)
    if len({one["host"] for one in meeting.said}) > 1:
        _refuse_walls(meet, rank, who, listening_at)
    yield PrefixStore(prefix, store), rank, world_size


def _refuse_another_meeting(store: Store) -> None:
    """A main host that came back has another store. Ranks that were still starting would wait in it for ranks whose
    launcher waits for theirs.
    """
    name = os.environ.get(LAUNCHERS_MEETING)
    if name is not None and not store.check([f"{LAUNCHERS}/agreed/{name}"]):
        raise RunError("the main host was started again while this rank started; its launcher has to meet it first")


def _refuse_differences(store: Store, who: list[str], digests: list[str]) -> None:
    """Look at the facts themselves only where their digests differ: of a thousand ranks they are megabytes."""
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]][:_ODD_RANKS_NAMED]
    if odd:
        theirs = [json.loads(store.get(f"lrd/facts/{rank}")) for rank in (0, *odd)]
        raise UserError(differences([who[rank] for rank in (0, *odd)], theirs))


def _refuse_walls(meet: Callable[[str, dict[str, Any]], Meeting], rank: int, who: list[str], address: str) -> None:
    """Have the first rank of each host connect to those of the others, as gloo's ranks will.

    A firewall may let the launchers' port through and no other. gloo itself would take five times the timeout to say
    so, and not on all ranks.

    Raises:
        RunError: a line for each way that is closed; the same on all ranks.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    with socket.create_server((address, 0)) if is_first and address else nullcontext() as server:
        everyone = meet(f"{prefix}/open", {"at": [address, server.getsockname()[1]] if server else None}).said
        others = {who[each]: one["at"] for each, one in enumerate(everyone) if one["at"] and each != rank}
        faults = network.unreachable(others) if server else []
        everyone = meet(f"{prefix}/tried", {"faults": faults}).said
    lines = [f"{who[each]} {fault}" for each, one in enumerate(everyone) for fault in one["faults"]]
    if lines:
        advice = "all TCP ports must be open between the hosts; GLOO_SOCKET_IFNAME names the interface"
        raise RunError("\n".join([*lines, advice]))


def _refuse_orphans(deadline: float) -> None:
    """A launcher's store is there before its ranks are; they would wait for one that is gone until time is up.

    A host that does not answer may be cut off for a while; one that refuses has no launcher any more.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        fault = network.wait_for_port(address, port, deadline, lambda error: isinstance(error, ConnectionRefusedError))
        if fault:
            raise RunError(f"the launcher is gone: {address}:{port}: {fault}")


register_rendezvous_handler("lrd", _meet)  # type: ignore[no-untyped-call]
