"""The protocol by which several parties, launchers or ranks, meet in a key-value store.

Every party knows its number and how many parties there are. A store may hold what parties left
behind that are gone by now, for example the ranks of a start that crashed; such remains must not
be taken for a party that is here.

With a job token (`lrd.distributed.job_token`), what a stranger without the token writes must not be
taken for one either, even if it repeats what parties of an earlier meeting wrote. So each proof
covers a random text that is new to the party that is to be convinced: that of party 0's proposal,
or that of the party's own statement.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.distributed.distributed_c10d import Store

from lrd.distributed.job_token import NO_TOKEN, JobToken, TokenChallenge
from lrd.errors import UserError

# Where in the store the launchers of several hosts meet.
LAUNCHERS_KEY = "lrd/launchers"

# By this environment variable a launcher tells its ranks where the launchers have met:
# "ADDRESS:PORT NAME", with the address of the store and the name of the meeting.
LAUNCHERS_MEETING_VARIABLE = "LRD_LAUNCHERS_MEETING"

_POLL_SECONDS = 0.02
_SECONDS_BEFORE_CHALLENGE = 2.0  # party 0 may only be starting
_MAX_COUNT_DIGITS = 18  # what torch's store can count


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
    token: JobToken = NO_TOKEN,
    challenge: TokenChallenge | None = None,
) -> Meeting:
    """Return when all parties are here at the same time.

    1. A party counts its arrival in the store and leaves its statement beside the count.
    2. Party 0 proposes the arrival counts that it sees, of all parties, and proposes anew as long
       as they change.
    3. A party whose own arrival is in the proposal agrees to it. One that is gone does not answer,
       so what it left behind can never complete a proposal.
    4. Once all parties agreed to one proposal, party 0 says so. Until then it says who is missing.
    5. Every other party reads that, and the statements that belong to the proposed arrivals.

    At each look, party 0 reads two keys for each party, and another party reads two keys in all.

    Args:
        store: where they meet.
        party: number of this party, in [0, num_parties).
        num_parties: number of parties.
        deadline: on the clock of `time.monotonic`.
        statement: what this party says of itself; JSON, and short, because every party reads it.
            All parties give the same keys.
        on_wait: is called by party 0 at each look, with the numbers of the parties it still waits
            for.
        token: what the other parties have to prove that they have too.
        challenge: where parties with another token are told so.

    Raises:
        UserError: party 0 has another token, or something that is not lrd writes to the store.
        MissingParties: the deadline has passed; names who is missing, as party 0 sees it, or party
            0 itself if it has not seen this party.
        TimeoutError: another process arrived under this party's number after it.
    """
    # 1. Arrive.
    count_arrivals(store, party)
    arrival = store.add(f"arrivals/{party}", 1)

    said = json.dumps([uuid.uuid4().hex, statement])
    store.set(f"says/{party}/{arrival}", said)

    this_party = _Party(store, party, num_parties, deadline, arrival, said, token, challenge)
    if party == 0:
        return this_party.lead(on_wait)
    return this_party.follow()


def count_arrivals(store: Store, party: int) -> int:
    """How often a party has arrived in a store.

    `add(key, 0)` would tell that too. But if the value is no number, it ends this process's
    connection.

    Raises:
        UserError: the value is no number.
    """
    key = f"arrivals/{party}"
    count = store.compare_set(key, "", "0")
    if not count.isdigit() or len(count) > _MAX_COUNT_DIGITS:
        raise UserError(
            f"the store's key {key} is no number: something that is not lrd writes there"
        )
    return int(count)


@dataclass(frozen=True)
class _Party:
    """A party that has arrived; see `agree`.

    Attributes:
        arrival: the number of this arrival under this party's number.
        said: a random text and the statement, as JSON.
    """

    store: Store
    number: int
    num_parties: int
    deadline: float
    arrival: int
    said: str
    token: JobToken
    challenge: TokenChallenge | None

    def lead(self, on_wait: Callable[[list[int]], None]) -> Meeting:
        """Propose, as party 0, until all others agree."""
        if self.challenge is not None:
            self.challenge.post()

        # Another store may see the same counts, and its meeting needs another name.
        proposal_id = uuid.uuid4().hex
        others = range(1, self.num_parties)
        reported_missing: tuple[str, list[int]] | None = None  # to which proposal, and who

        while True:
            # 2. Propose, and thereby agree.
            arrivals = [count_arrivals(self.store, party) for party in range(self.num_parties)]
            self._require_last_arrival(arrivals)
            proposal = json.dumps([proposal_id, arrivals])
            name = _name_meeting(proposal.encode())
            self.store.set("proposal", proposal)

            # 4. Say that all agreed, or who is missing.
            agreed = {party: self._read_agreement(name, party, arrivals[party]) for party in others}
            missing = [party for party, text in agreed.items() if text is None]
            if self.challenge is not None:
                self.challenge.report_refused()
            if not missing:
                # The others leave with this meeting from now on. Another look might see a party
                # that has come back meanwhile, and party 0 would go on waiting without them.
                texts = [self.said, *(text for text in agreed.values() if text is not None)]
                self.store.set(f"agreed/{name}", self.token.prove("agreed", name, *texts))
                return Meeting(name, arrivals, self._parse_statements(texts))

            if reported_missing != (name, missing):
                reported_missing = (name, missing)
                self.store.set(f"missing/{name}", json.dumps(missing))
            on_wait(missing)
            self._wait(missing)

    def follow(self) -> Meeting:
        """Agree to party 0's proposals until it says that all others agreed too."""
        challenge_from = time.monotonic() + _SECONDS_BEFORE_CHALLENGE
        while True:
            proposal = self.store.get("proposal") if self.store.check(["proposal"]) else b""
            arrivals = _parse_proposal(proposal, self.num_parties)
            name = _name_meeting(proposal)
            missing = [0]

            if arrivals is None:
                if self.challenge is not None and time.monotonic() > challenge_from:
                    self.challenge.require_same_token()
            elif arrivals[self.number] == self.arrival:
                # 3. Agree.
                proof = self.token.prove("agrees", name, str(self.number), self.said)
                self.store.set(f"agrees/{name}/{self.number}", proof)

                # 5. Read what was agreed.
                if self.store.check([f"agreed/{name}"]):
                    meeting = self._read_meeting(name, arrivals)
                    if meeting is not None:
                        return meeting
                if time.monotonic() > self.deadline:
                    missing = _read_missing(self.store, name, self.number)
            else:
                self._require_last_arrival(arrivals)
            self._wait(missing)

    def _require_last_arrival(self, arrivals: list[int]) -> None:
        if arrivals[self.number] > self.arrival:
            raise TimeoutError(f"another process arrived as number {self.number}")

    def _wait(self, missing: list[int]) -> None:
        """Wait for the next look; raise at the deadline, with the parties that are missing."""
        if time.monotonic() > self.deadline:
            raise MissingParties(missing)

        # One process serves the store to all parties, so more of them look less often.
        time.sleep(_POLL_SECONDS * (1 + self.num_parties / 64))

    def _read_agreement(self, name: str, party: int, arrival: int) -> str | None:
        """Read, as party 0, what a party said that agreed to the proposal of this name.

        Returns:
            None: it has not agreed, or not with this token, or it said nothing that lrd says.
        """
        key = f"agrees/{name}/{party}"
        if not self.store.check([key]):
            return None

        proof, said = self.store.multi_get([key, f"says/{party}/{arrival}"])
        text = said.decode(errors="replace")
        if not self.token.is_proven(proof, "agrees", name, str(party), text):
            return None
        return text if self._parse_statements([text]) else None

    def _read_meeting(self, name: str, arrivals: list[int]) -> Meeting | None:
        """Read, as another party, what all parties said who agreed to a proposal.

        Returns:
            None: it was not party 0 that said that all agreed, or not to what this party said. An
            earlier meeting's proof does not cover that.
        """
        keys = [f"says/{party}/{arrival}" for party, arrival in enumerate(arrivals)]
        proof, *said = self.store.multi_get([f"agreed/{name}", *keys])
        texts = [text.decode(errors="replace") for text in said]

        statements = self._parse_statements(texts)
        is_agreed = self.token.is_proven(proof, "agreed", name, *texts)
        if not is_agreed or not statements or texts[self.number] != self.said:
            return None
        return Meeting(name, arrivals, statements)

    def _parse_statements(self, texts: Iterable[str]) -> list[dict[str, Any]]:
        """The statements of parties; none if one of them is not what lrd says."""
        own_keys = json.loads(self.said)[1].keys()
        statements = []
        for text in texts:
            match _parse_json(text):
                case [str(), dict() as statement] if statement.keys() == own_keys:
                    statements.append(statement)
                case _:
                    return []
        return statements


def _name_meeting(proposal: bytes) -> str:
    return hashlib.sha256(proposal).hexdigest()[:32]


def _parse_proposal(proposal: bytes, num_parties: int) -> list[int] | None:
    """The arrival counts of a proposal; None if there is none of party 0's."""
    match _parse_json(proposal):
        case [str(), [*arrivals]] if len(arrivals) == num_parties and _are_integers(arrivals):
            return arrivals
    return None


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
    reported = _parse_json(store.get(key)) if store.check([key]) else []
    if not isinstance(reported, list) or not _are_integers(reported):
        return [0]
    return [number for number in reported if number != party] or [0]


def _parse_json(text: str | bytes) -> Any:
    """What a text from the store means, which anybody may have written; None if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _are_integers(values: list[Any]) -> bool:
    return all(isinstance(value, int) for value in values)


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
