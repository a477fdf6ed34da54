"""The secret that the launchers and ranks of one job share, and how one without it is told so.

With `LRD_JOB_TOKEN` the parties of a meeting prove to each other that they have the same secret,
which itself never travels.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed.distributed_c10d import PrefixStore, Store

from lrd.errors import UserError

# Parties with another value of this environment variable do not meet.
JOB_TOKEN_VARIABLE = "LRD_JOB_TOKEN"

_NUM_REFUSAL_KEYS = 8
_MAX_REFUSALS_REPORTED = 8  # anybody may write there, without end
_MAX_NAME_LENGTH = 100


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
        """A proof that who states these facts has the token; empty without one.

        It is an HMAC-SHA256 over the facts. Whoever has read it can show it again, so one of the
        facts has to be new to the party that is to be convinced.
        """
        if not self.secret:
            return ""
        return hmac.new(self.secret, json.dumps(facts).encode(), hashlib.sha256).hexdigest()

    def is_proven(self, proof: str | bytes, *facts: str) -> bool:
        """Whether a proof is that of `prove`. Takes equally long wherever the two differ."""
        given = proof if isinstance(proof, bytes) else proof.encode(errors="replace")
        return hmac.compare_digest(given, self.prove(*facts).encode())

    @property
    def key_prefix(self) -> str:
        """The prefix of the keys of parties with this token in a store; empty without one."""
        return f"lrd-{self.prove('keys')[:32]}" if self.secret else ""

    def with_token_prefix(self, store: Store) -> Store:
        """The part of a store that only parties with this token use; without one, all of it."""
        return PrefixStore(self.key_prefix, store) if self.secret else store


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
        self._num_looks = 0
        self._num_reported = 0

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
        """Report, as party 0, who has left a name. Call it again and again.

        Each call looks at one of the places for names.
        """
        key = f"{self._key}/refused/{self._num_looks % _NUM_REFUSAL_KEYS}"
        self._num_looks += 1
        if self._num_reported == _MAX_REFUSALS_REPORTED or not self._store.check([key]):
            return

        name = self._store.get(key).decode(errors="replace")
        self._store.delete_key(key)  # the next one may leave its name
        self._num_reported += 1
        self._on_refused(_clean(name))

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

        for number in range(_NUM_REFUSAL_KEYS):
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
        return f"{refused} its token is not that of {party_0}"


def refusal_line(name: str) -> str:
    """What party 0 says of a party that was refused."""
    return f"refused {name}, whose {JOB_TOKEN_VARIABLE} is missing or not that of this job"


def _clean(name: str) -> str:
    """A name from the store, which anybody may have written, for a message."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    return printable[:_MAX_NAME_LENGTH]
