"""Who is missing at a meeting, and a party that comes back at the last moment."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from lrd.distributed import meeting
from lrd.distributed.job_token import NO_TOKEN, JobToken, TokenChallenge
from lrd.distributed.meeting import MissingParties
from lrd.errors import UserError


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def deadline_in(seconds: float) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize(("present", "missing"), [([1], "0"), ([0, 1], "2, 3"), ([0, 1, 2], "3")])
def test_the_missing_parties_are_named_by_the_party_whose_deadline_passes_first(
    store: dist.TCPStore, present: list[int], missing: str
) -> None:
    """Of four parties, party 3 never comes; party 1 has the first deadline."""

    def arrive(number: int) -> meeting.Meeting:
        return meeting.agree(store, number, 4, deadline_in(0.5 if number == 1 else 1.5), {})

    with ThreadPoolExecutor(4) as pool:
        arrivals = {number: pool.submit(arrive, number) for number in present}
        for number, arrival in arrivals.items():
            error = arrival.exception()
            assert isinstance(error, MissingParties)
            assert str(error) == missing, number


def test_an_error_about_missing_parties_always_has_a_number(store: dist.TCPStore) -> None:
    """Party 0 was gone before it saw that party 1, which it still waited for, agreed."""
    store.set("missing/meeting", "[1]")
    assert meeting._read_missing(store, "meeting", 1) == [0]
    assert meeting._read_missing(store, "another meeting", 1) == [0]
    assert meeting._read_missing(store, "meeting", 2) == [1]

    for noise in ("", "7", "[" * 100_000, '["1"]', "[1e999]", '{"1": 2}'):
        store.set("missing/meeting", noise)
        assert meeting._read_missing(store, "meeting", 2) == [0], noise


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\xff\0",
        b"[" * 100_000,
        b"7",
        b'["", {}]',
        b'["", [1]]',
        b'["", [1, 1e999]]',
        b'["", [1, "2"]]',
    ],
)
def test_what_is_no_proposal_of_party_0_is_none(noise: bytes) -> None:
    assert meeting._parse_proposal(b'["", [1, 2]]', 2) == [1, 2]
    assert meeting._parse_proposal(noise, 2) is None


@pytest.mark.parametrize("noise", ["text", "-1", "1" * 30, "1.5"])
def test_a_count_that_is_none_is_told_in_one_line(store: dist.TCPStore, noise: str) -> None:
    store.set("arrivals/1", noise)
    for party in range(2):
        with pytest.raises(UserError, match="the store's key arrivals/1 is no number"):
            meeting.agree(store, party, 2, deadline_in(5), {})


@pytest.mark.parametrize("noise", ["", "7", '["", 7]', '["", {"another key": 1}]'])
def test_a_party_that_says_what_lrd_does_not_say_is_not_met(
    store: dist.TCPStore, noise: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        main = pool.submit(meeting.agree, store, 0, 2, deadline_in(1), {"key": 1})
        store.set("says/1/1", noise)
        store.add("arrivals/1", 1)
        while not main.done():
            if store.check(["proposal"]):
                name = meeting._name_meeting(store.get("proposal"))
                store.set(f"agrees/{name}/1", "")
            time.sleep(0.02)
        assert isinstance(main.exception(), MissingParties)


class LastMomentStore:
    """A store in which party 1 arrives once more as soon as party 0 has said that all agreed."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)
        if key.startswith("agreed/"):
            self._store.add("arrivals/1", 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_party_0_leaves_with_the_meeting_that_it_has_announced(store: dist.TCPStore) -> None:
    """The others leave with it, so a party that comes back must not hold party 0 alone."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(meeting.agree, store, 1, 2, deadline_in(2), {})
        main_meeting = meeting.agree(LastMomentStore(store), 0, 2, deadline_in(2), {})
        other_meeting = other.result()
    assert main_meeting.arrivals == [1, 1]
    assert main_meeting == other_meeting


# ---------------------------------------------------------------------------
# A job token

TOKEN = JobToken(b"a secret of this job")
OTHER = JobToken(b"a secret of another job")


def meet(
    store: dist.Store, party: int, token: JobToken, seconds: float, refused: list[str]
) -> meeting.Meeting:
    challenge = TokenChallenge(store, "challenge", token, f"host{party}", refused.append)
    deadline = deadline_in(seconds)
    statement = {"party": party}
    return meeting.agree(
        token.with_token_prefix(store),
        party,
        2,
        deadline,
        statement,
        token=token,
        challenge=challenge,
    )


def test_parties_with_one_token_meet_and_the_token_is_in_no_key_and_no_value(
    store: dist.TCPStore,
) -> None:
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(meet, store, party, TOKEN, 5, []) for party in range(2)]
        first, second = (future.result() for future in pending)
    assert first == second
    assert first.statements == [{"party": 0}, {"party": 1}]

    written = [key.encode() + store.get(key) for key in store.list_keys() if store.check([key])]
    assert not [entry for entry in written if TOKEN.secret in entry]
    assert [key for key in store.list_keys() if key.startswith(TOKEN.key_prefix)]


@pytest.mark.parametrize(
    ("token", "other", "reason"),
    [
        (TOKEN, OTHER, "its token is not that of host0"),
        (TOKEN, NO_TOKEN, "it has none, and host0 has one"),
        (NO_TOKEN, TOKEN, "it has one, and host0 has none"),
    ],
)
def test_a_party_with_another_token_is_refused_on_both_sides_and_the_job_goes_on(
    store: dist.TCPStore, token: JobToken, other: JobToken, reason: str
) -> None:
    refused: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        party_0 = pool.submit(meet, store, 0, token, 30, refused)
        with pytest.raises(UserError) as caught:
            meet(store, 1, other, 30, [])
        assert str(caught.value) == f"LRD_JOB_TOKEN: host1 was refused: {reason}"

        while not refused:
            time.sleep(0.01)
        right = pool.submit(meet, store, 1, token, 30, [])
        assert party_0.result() == right.result()
    assert refused == ["host1"]


def test_who_sees_all_keys_and_has_no_token_is_not_met(store: dist.TCPStore) -> None:
    """A stranger's client lists the keys, and writes what party 1 would write."""
    keys = dist.PrefixStore(TOKEN.key_prefix, store)
    refused: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        party_0 = pool.submit(meet, store, 0, TOKEN, 1.5, refused)
        stranger = pool.submit(meeting.agree, keys, 1, 2, deadline_in(1.5), {"party": 1})
        for party in (party_0, stranger):
            assert isinstance(party.exception(), MissingParties)


@pytest.fixture
def earlier_meeting(store: dist.TCPStore) -> dict[str, str]:
    """All that two parties with the token wrote when they met: key without prefix -> value."""
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(meet, store, party, TOKEN, 5, []) for party in range(2)]
        for future in pending:
            future.result()

    prefix = f"{TOKEN.key_prefix}/"
    keys = [key for key in store.list_keys() if key.startswith(prefix)]
    return {key.removeprefix(prefix): store.get(key).decode() for key in keys}


def store_of_a_stranger(
    earlier_meeting: dict[str, str], party: int
) -> tuple[dist.TCPStore, dist.Store]:
    """A new store with all that was written then, to which a party comes for the first time.

    Returns:
        The store, and the part of it behind the token's prefix.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    keys = TOKEN.with_token_prefix(store)
    for key, value in earlier_meeting.items():
        if key != f"arrivals/{party}":
            keys.set(key, value)
    return store, keys


def test_who_repeats_an_earlier_meeting_does_not_meet_party_1(
    earlier_meeting: dict[str, str],
) -> None:
    store, keys = store_of_a_stranger(earlier_meeting, party=1)

    with ThreadPoolExecutor(1) as pool:
        party_1 = pool.submit(meet, store, 1, TOKEN, 1, [])
        while not party_1.done():
            keys.set("says/1/1", earlier_meeting["says/1/1"])
        assert isinstance(party_1.exception(), MissingParties)


def test_who_repeats_an_earlier_meeting_does_not_meet_party_0(
    earlier_meeting: dict[str, str],
) -> None:
    store, keys = store_of_a_stranger(earlier_meeting, party=0)

    with ThreadPoolExecutor(1) as pool:
        main = pool.submit(meet, store, 0, TOKEN, 1, [])
        while not main.done():
            for key in ("proposal", "says/0/1"):
                keys.set(key, earlier_meeting[key])
        assert isinstance(main.exception(), MissingParties)


NOISE = [b"", b"\xff\0", b"[" * 100_000, b'["", {}]', b'{"a": 1}', b"7"]


@pytest.mark.parametrize("noise", NOISE)
def test_noise_in_the_keys_that_anybody_knows_harms_no_party_with_a_token(
    store: dist.TCPStore, noise: bytes
) -> None:
    text = noise.decode("latin-1")
    for key in ("challenge", "challenge/refused/0", "proposal", "arrivals/0", "arrivals/1"):
        store.set(key, text)

    # What a stranger can write who lists the keys, and who changes none that is in use.
    keys = TOKEN.with_token_prefix(store)
    for key in ("proposal", "says/0/1", "says/1/1", "missing/x", "agreed/x", "agrees/x/1"):
        keys.set(key, text)

    refused: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(meet, store, party, TOKEN, 20, refused) for party in range(2)]
        assert pending[0].result() == pending[1].result()
    for name in refused:
        assert len(name) <= 100
        assert name.isprintable()
