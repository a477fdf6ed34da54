"""The protocol by which several parties, launchers or ranks, meet in a key-value store.

Every party knows its number and how many parties there are. A store may hold what parties left
behind that are gone by now, for example the ranks of a start that crashed; such remains must not
be taken for a party that is here.

With a job token (`LRD_JOB_TOKEN`) the parties prove to each other that they have the same one: what
they write is authenticated by an HMAC over the name of the meeting, which is new each time. The
token itself never travels.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from lrd.errors import UserError

# Where in the store the launchers of several hosts meet.
LAUNCHERS_KEY = "lrd/launchers"

# A launcher passes the name of its meeting to its ranks in this environment variable.
LAUNCHERS_MEETING_VARIABLE = "LRD_LAUNCHERS_MEETING"

# Parties with another value of this environment variable do not meet.
JOB_TOKEN_VARIABLE = "LRD_JOB_TOKEN"

_POLL_SECONDS = 0.02
_SECONDS_BEFORE_CHALLENGE = 2.0  # party 0 may only be starting
_MAX_REFUSALS_READ = 8
_MAX_NAME_LENGTH = 100
_NO_PROPOSAL = b'["", []]'  # (store id, counts) before party 0 has proposed


class MissingParties(TimeoutError):
    """Some parties did not come in time; the message has their numbers."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(", ".join(map(str, numbers)))


@dataclass(frozen=True)
class JobToken:
    """A secret that the parties of one job share; empty: they have none, and no proof is asked for.

    Attributes:
        secret: the token. It should be random: whoever can read the store can try out short ones.
    """

    secret: bytes = b""

    @classmethod
    def from_environment(cls) -> JobToken:
        """The token that `LRD_JOB_TOKEN` has."""
        return cls(os.fsencode(os.environ.get(JOB_TOKEN_VARIABLE, "")))

    def prove(self, *facts: str) -> str:
        """A proof that who states these facts has the token; empty without one."""
        if not self.secret:
            return ""
        return hmac.new(self.secret, json.dumps(facts).encode(), hashlib.sha256).hexdigest()

    def is_proven(self, proof: str | bytes, *facts: str) -> bool:
        """Whether a proof is that of `prove`. Takes equally long wherever the two differ."""
        given = proof if isinstance(proof, bytes) else proof.encode(errors="replace")
        return hmac.compare_digest(given, self.prove(*facts).encode())

    @property
    def key_prefix(self) -> str:
        """What the keys of parties with this token begin with in a store; empty without one."""
        return f"lrd-{self.prove('keys')[:32]}/" if self.secret else ""

    def with_token_prefix(self, store: Store) -> Store:
        """The part of a store that only parties with this token use; without one, all of it."""
        return PrefixStore(self.key_prefix.rstrip("/"), store) if self.secret else store


NO_TOKEN = JobToken()


class TokenChallenge:
    """How a party that has another token than party 0 learns it, and leaves its name.

    Parties with different tokens use different keys, so they would wait for each other in silence.
    Whoever reaches the store can write here too, so nothing here decides who is met.

    Args:
        store: the store itself, whose keys all parties see.
        key: of the challenge.
        token: this party's.
        name: this party's, for messages.
        on_refused: is called by party 0 with the name of each party that was refused.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        token: JobToken,
        name: str,
        on_refused: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._store = store
        self._key = key
        self._token = token
        self._name = name
        self._on_refused = on_refused
        self._num_read = 0

    def post(self) -> None:
        """Say, as party 0, which token is asked for, without giving it away."""
        nonce = uuid.uuid4().hex
        challenge = {
            "name": self._name,
            "nonce": nonce,
            "proof": self._token.prove("challenge", nonce),
        }
        self._store.set(self._key, json.dumps(challenge))

    def report_refused(self) -> None:
        """Report, as party 0, who has left a name since the last call; a few of them at most."""
        key = f"{self._key}/refused/{self._num_read}"
        if self._num_read < _MAX_REFUSALS_READ and self._store.check([key]):
            self._num_read += 1
            self._on_refused(_clean(self._store.get(key).decode(errors="replace")))

    def require_same_token(self) -> None:
        """Leave the name and raise if the party 0 that is here has another token.

        Raises:
            UserError: says whose token differs from whose.
        """
        try:
            challenge = json.loads(
                self._store.get(self._key) if self._store.check([self._key]) else ""
            )
            party_0, nonce, proof = (str(challenge[key]) for key in ("name", "nonce", "proof"))
        except (ValueError, LookupError, TypeError, RecursionError):
            return  # there is none yet, or a stranger has written there
        if self._token.is_proven(proof, "challenge", nonce):
            return

        for number in range(_MAX_REFUSALS_READ):
            key = f"{self._key}/refused/{number}"
            if not self._store.check([key]):
                self._store.set(key, self._name)
                break
        raise UserError(self._describe_refusal(_clean(party_0), has_token=bool(proof)))

    def _describe_refusal(self, party_0: str, has_token: bool) -> str:
        refused = f"{JOB_TOKEN_VARIABLE}: {self._name} was refused:"
        if not self._token.secret:
            return f"{refused} it has none, and {party_0} has one"
        if not has_token:
            return f"{refused} it has one, and {party_0} has none"
        return f"{refused} it has not that of {party_0}"


def describe_refused(name: str) -> str:
    """What party 0 says of a party that was refused."""
    return f"refused {name}, whose {JOB_TOKEN_VARIABLE} is missing or not that of this job"


def _clean(name: str) -> str:
    """A name from the store, which anybody may have written, for a message."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    return printable[:_MAX_NAME_LENGTH]


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
        token: what the other parties have to prove that they have too.
        challenge: where parties with another token are told so.

    Raises:
        UserError: party 0 has another token.
        MissingParties: the deadline has passed; names who is missing, as party 0 sees it, or party
            0 itself if it has not seen this party.
        TimeoutError: another process arrived under this party's number after it.
    """
    # 1. Arrive.
    arrival = store.add(f"arrivals/{party}", 1)
    statement_text = json.dumps(statement)
    store.set(f"says/{party}/{arrival}", statement_text)
    challenge_from = time.monotonic() + _SECONDS_BEFORE_CHALLENGE
    if party == 0 and challenge is not None:
        challenge.post()

    # Another store may see the same counts, and its meeting needs another name.
    store_id = uuid.uuid4().hex
    reported_missing: tuple[str, list[int]] | None = None  # what party 0 last wrote, and for whom

    while True:
        # 2. Propose.
        if party == 0:
            counts = [store.add(f"arrivals/{other}", 0) for other in range(num_parties)]
            store.set("proposal", json.dumps([store_id, counts]))

        proposal = store.get("proposal") if store.check(["proposal"]) else _NO_PROPOSAL
        arrivals = _parse_proposal(proposal)
        name = hashlib.sha256(proposal).hexdigest()[:16]

        # 3. Agree, and 5. read what was agreed.
        is_proposed = len(arrivals) == num_parties and arrivals[party] == arrival
        if is_proposed:
            proof = token.prove("agrees", name, str(party), statement_text)
            store.set(f"agrees/{name}/{party}", proof)
            if store.check([f"agreed/{name}"]):
                meeting = _read_meeting(store, name, arrivals, token)
                if meeting is not None:
                    return meeting
        elif len(arrivals) == num_parties and arrivals[party] > arrival:
            raise TimeoutError(f"another process arrived as number {party}")
        elif not arrivals and challenge is not None and time.monotonic() > challenge_from:
            challenge.require_same_token()

        # 4. Say that all agreed, or who is missing.
        if party == 0:
            agreed = [
                _read_agreement(store, name, other, counts[other], token)
                for other in range(num_parties)
            ]
            missing = [other for other, text in enumerate(agreed) if text is None]
            if challenge is not None:
                challenge.report_refused()
            on_wait(missing)
            if not missing:
                # The others leave with this meeting from now on. Another look might see a party
                # that has come back meanwhile, and party 0 would go on waiting without them.
                texts = [text for text in agreed if text is not None]
                store.set(f"agreed/{name}", token.prove("agreed", name, *texts))
                return Meeting(name, arrivals, [json.loads(text) for text in texts])

            if reported_missing != (name, missing):
                reported_missing = (name, missing)
                store.set(f"missing/{name}", json.dumps(missing))

        if time.monotonic() > deadline:
            if party != 0:
                missing = _read_missing(store, name, party) if is_proposed else [0]
            raise MissingParties(missing)

        # One process serves the store to all parties, so more of them look less often.
        time.sleep(_POLL_SECONDS * (1 + num_parties / 64))


def _parse_proposal(proposal: bytes) -> list[int]:
    """The arrival counts of a proposal; none if it is not one of party 0's."""
    try:
        counts = json.loads(proposal)[1]
        return [int(count) for count in counts]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def _read_agreement(
    store: Store, name: str, party: int, arrival: int, token: JobToken
) -> str | None:
    """Read what a party said that agreed to party 0's proposal.

    Returns:
        Its statement; None if it has not agreed, or not with this token.
    """
    key = f"agrees/{name}/{party}"
    if not store.check([key]):
        return None

    proof, statement = store.multi_get([key, f"says/{party}/{arrival}"])
    text = statement.decode(errors="replace")
    return text if token.is_proven(proof, "agrees", name, str(party), text) else None


def _read_meeting(store: Store, name: str, arrivals: list[int], token: JobToken) -> Meeting | None:
    """Read what the parties said who agreed to a proposal.

    Returns:
        None: it was not party 0 that said that all agreed to these statements.
    """
    keys = [f"says/{party}/{arrival}" for party, arrival in enumerate(arrivals)]
    proof, *statements = store.multi_get([f"agreed/{name}", *keys])
    texts = [statement.decode(errors="replace") for statement in statements]
    if not token.is_proven(proof, "agreed", name, *texts):
        return None
    return Meeting(name, arrivals, [json.loads(text) for text in texts])


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
