"""A network that fails while hosts train: the run finishes, or stops in time and a restart resumes. Never silence.

`pytest -m slow tests/test_cuts.py`, as root.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import final_state, launch, sha256, train_command, wait_for
from network import Host, hosts, why_not
from test_hosts import Launched, end_well, run_dir
from test_resume import assert_same_end

from lrd import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
RESTARTS = ("--max_restarts", "3")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Host]]:
    with hosts(2, tmp_path) as own:
        yield own


def start_both(two: list[Host], minutes: float, options: tuple[str, ...] = ()) -> list[Launched]:
    """Started, and at work."""
    launched = [Launched(two, host, 1, f"trainer.timeout_minutes={minutes}", options=options) for host in two]
    wait_for(lambda: bool(checkpoint.steps(run_dir(two[0]))), launched[0].process)
    return launched


def cut(two: list[Host], how: str, is_cut: bool) -> None:
    if how == "link":
        two[1].set_link("down" if is_cut else "up")
    else:
        two[int(how[-1])].set_deaf(is_cut)


@pytest.mark.parametrize("how", ["link", "packets to 1", "packets to 0"])
def test_a_cut_stops_both_hosts_in_time_and_a_restart_resumes(
    two: list[Host], undisturbed: dict[int, Path], how: str
) -> None:
    launched = start_both(two, minutes=0.2)
    cut(two, how, True)
    began = time.monotonic()
    for one in launched:
        assert one.end() == 1
        (line,) = one.complaints
        assert "Timed out" in line or "Connection closed" in line  # by the one whose time was up first
        assert "rank 1 did not answer" in line if one is launched[0] else "or the way there is cut" in line
    assert time.monotonic() - began < 12 + 30  # the timeout, the roll call, and a machine that does other things
    assert any("Timed out" in one.said for one in launched)
    cut(two, how, False)
    end_well([Launched(two, host, 1) for host in two])
    assert_same_end(run_dir(two[0]), undisturbed[2])


def test_half_a_minute_without_network_is_waited_for(two: list[Host], undisturbed: dict[int, Path]) -> None:
    launched = start_both(two, minutes=2)
    cut(two, "link", True)
    time.sleep(30)
    cut(two, "link", False)
    end_well(launched)
    assert_same_end(run_dir(two[0]), undisturbed[2])
    assert launched[0].complaints == launched[1].complaints == []


@pytest.mark.parametrize("how", ["link", "packets to 1"])
def test_half_a_minute_beyond_the_timeout_is_a_restart_by_the_launchers(
    two: list[Host], undisturbed: dict[int, Path], how: str
) -> None:
    launched = start_both(two, minutes=0.1, options=RESTARTS)
    cut(two, how, True)
    time.sleep(30)
    cut(two, how, False)
    end_well(launched)
    assert_same_end(run_dir(two[0]), undisturbed[2])
    assert any("rank 1 did not answer" in line for line in launched[0].complaints)


def test_a_cut_while_the_hosts_meet_ends_in_time(tmp_path: Path) -> None:
    """The third is missing, the second is cut off while it waits for it."""
    with hosts(3, tmp_path) as own:
        launched = [Launched(own, host, 1, options=("--rdzv_conf", "timeout=15")) for host in own[:2]]
        time.sleep(7)
        own[1].set_link("down")
        began = time.monotonic()
        for one in launched:
            assert one.end(60) == 2
            assert "the hosts did not come together within 15 s" in one.complaints[-1]
        assert time.monotonic() - began < 30


def test_300_ms_of_delay_are_slow_and_change_nothing(tmp_path: Path) -> None:
    few = ["trainer.max_steps=6", "trainer.fingerprint_every=3"]
    with hosts(2, tmp_path, delay=0.15) as own:
        launched = [Launched(own, host, 1, *few) for host in own]
        for one in launched:
            assert one.end(280) == 0, one.said
        there = final_state(run_dir(own[0]))[2]
        assert launch(train_command(2, tmp_path / "one", "trainer.epochs=2", "checkpoint.every_steps=5",
                                    "data.augment=crop", *few)).returncode == 0  # fmt: skip
    here = final_state(tmp_path / "one")[2]
    for file in ("model.safetensors", "optimizer.pt"):
        assert sha256(here / file) == sha256(there / file)
