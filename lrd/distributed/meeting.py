"""The protocol by which several parties, launchers or ranks, meet in a key-value store.

Every party knows its number and how many parties there are. A store may hold what parties left
behind that are gone by now, for example the ranks of a start that crashed; such remains must not
be taken for a party that is here.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.distributed_c10d import Store

# Where in the store the launchers of several hosts meet.
LAUNCHERS_KEY = "lrd/launchers"

# A launcher passes the name of its meeting to its ranks in this environment variable.
LAUNCHERS_MEETING_VARIABLE = "LRD_LAUNCHERS_MEETING"

_POLL_SECONDS = 0.02
_NO_PROPOSAL = b'["", []]'  # (store id, counts) before party 0 has proposed


class MissingParties(TimeoutError):
    """Some parties did not come in time; the message has their numbers."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(", ".join(map(str, numbers)))


@dataclass(frozen=True)
class Meeting:
    """A moment at which all parties were here.

    Attributes:
        name: a name that no other meeting has, in this store or in another one.
        arrivals: for each party, how often it has arrived in this store so far.
        statements: for each party, what it said of itself.
    """

    name: str
    arrivals: list[int]
    statements: list[dict[str, Any]]


def agree(
    store: Store,
    party: int,
    num_parties: int,
    deadline: float,
    statement: dict[str, Any],
    on_wait: Callable[[list[int]], None] = lambda missing: None,
) -> Meeting:
    """Return when all parties are here at the same time.

    1. A party counts its arrival in the store and leaves its statement beside the count.
    2. Party 0 proposes the arrival counts that it sees, of all parties, and proposes anew as long
       as they change.
    3. A party whose own arrival is in the proposal agrees to it. One that is gone does not answer,
       so what it left behind can never complete a proposal.
    4. Once all parties agreed to one proposal, party 0 says so. Until then it says who is missing.
    5. Every party reads that, and the statements that belong to the proposed arrivals.

    At each look, party 0 reads two keys for each party, and another party reads two keys in all.

    Args:
        store: where they meet.
        party: number of this party, in [0, num_parties).
        num_parties: number of parties.
        deadline: on the clock of `time.monotonic`.
        statement: what this party says of itself; JSON, and short, because every party reads it.
        on_wait: is called by party 0 at each look, with the numbers of the parties it still waits
            for.

    Raises:
        MissingParties: the deadline has passed; names who is missing, as party 0 sees it, or party
            0 itself if it has not seen this party.
        TimeoutError: another process arrived under this party's number after it.
    """
    # 1. Arrive.
    arrival = store.add(f"arrivals/{party}", 1)
    store.set(f"says/{party}/{arrival}", json.dumps(statement))

    # Another store may see the same counts, and its meeting needs another name.
    store_id = uuid.uuid4().hex
    reported_missing: tuple[str, list[int]] | None = None  # what party 0 last wrote, and for whom

    while True:
        # 2. Propose.
        if party == 0:
            counts = [store.add(f"arrivals/{other}", 0) for other in range(num_parties)]
            store.set("proposal", json.dumps([store_id, counts]))

        proposal = store.get("proposal") if store.check(["proposal"]) else _NO_PROPOSAL
        arrivals = json.loads(proposal)[1]
        name = hashlib.sha256(proposal).hexdigest()[:16]

        # 3. Agree, and 5. read what was agreed.
        is_proposed = len(arrivals) == num_parties and arrivals[party] == arrival
        if is_proposed:
            store.set(f"agrees/{name}/{party}", "")
            if store.check([f"agreed/{name}"]):
                return _read_meeting(store, name, arrivals)
        elif len(arrivals) == num_parties and arrivals[party] > arrival:
            raise TimeoutError(f"another process arrived as number {party}")

        # 4. Say that all agreed, or who is missing.
        if party == 0:
            missing = [
                other for other in range(num_parties) if not store.check([f"agrees/{name}/{other}"])
            ]
            on_wait(missing)
            if not missing:
                # The others leave with this meeting from now on. Another look might see a party
                # that has come back meanwhile, and party 0 would go on waiting without them.
                store.set(f"agreed/{name}", "")
                return _read_meeting(store, name, arrivals)

            if reported_missing != (name, missing):
                reported_missing = (name, missing)
                store.set(f"missing/{name}", json.dumps(missing))

        if time.monotonic() > deadline:
            if party != 0:
                missing = _read_missing(store, name, party) if is_proposed else [0]
            raise MissingParties(missing)

        # One process serves the store to all parties, so more of them look less often.
        time.sleep(_POLL_SECONDS * (1 + num_parties / 64))


def _read_meeting(store: Store, name: str, arrivals: list[int]) -> Meeting:
    """Read what the parties said who agreed to a proposal."""
    keys = [f"says/{party}/{arrival}" for party, arrival in enumerate(arrivals)]
    statements = [json.loads(value) for value in store.multi_get(keys)]
    return Meeting(name, arrivals, statements)


def _read_missing(store: Store, name: str, party: int) -> list[int]:
    """Read which other parties are missing, as party 0 last saw it.

    Args:
        store: where they meet.
        name: of party 0's proposal.
        party: number of this party, which is not missing.

    Returns:
        Their numbers; [0] if party 0 reports nobody else and yet does not say that all agreed.
    """
    key = f"missing/{name}"
    reported = json.loads(store.get(key)) if store.check([key]) else []
    return [number for number in reported if number != party] or [0]


def describe_differences(names: list[str], facts: list[dict[str, Any]]) -> str:
    """Compare what several parties state, each with the first.

    Args:
        names: of the parties, for the message.
        facts: for each party, key -> value.

    Returns:
        A line for each key that a party has otherwise than the first one; empty: there is no
        difference.
    """
    lines = []
    for name, party_facts in zip(names[1:], facts[1:], strict=True):
        for key in facts[0].keys() | party_facts.keys():
            if party_facts.get(key) != facts[0].get(key):
                value = party_facts.get(key)
                first_value = facts[0].get(key)
                lines.append(f"{key}: {name} has {value!r}, {names[0]} has {first_value!r}")

    return "\n".join(sorted(lines))
