"""Who is missing at a meeting, and a party that comes back at the last moment."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from lrd.distributed import meeting
from lrd.distributed.meeting import MissingParties


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
