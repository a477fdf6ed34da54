"""A network that fails while hosts train: the run finishes, or it stops in time and can be resumed.

As root: `pytest -m slow tests/launchers/test_cuts.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrd.checkpoint import store
from tests.helpers.equality import assert_same_end
from tests.helpers.launched_hosts import LaunchedHost, assert_all_succeed, run_dir
from tests.helpers.launching import STEPS, final_state, launch, sha256, train_command, wait_for
from tests.helpers.namespaces import Host, hosts, missing_requirement

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement()),
]
RESTARTS = ("--max_restarts", "3")


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with hosts(2, tmp_path) as all_hosts:
        yield all_hosts


def start_both(
    two_hosts: list[Host], minutes: float, options: tuple[str, ...] = ()
) -> list[LaunchedHost]:
    """Start a rank on each host, and wait until they train.

    Args:
        minutes: the ranks' timeout.
        options: further ones of `accelerate launch`.
    """
    timeout = f"trainer.timeout_minutes={minutes}"
    launched_hosts = [
        LaunchedHost(two_hosts, host, 1, timeout, options=options) for host in two_hosts
    ]
    wait_for(lambda: bool(store.list_steps(run_dir(two_hosts[0]))), launched_hosts[0].process)
    return launched_hosts


def set_cut(two_hosts: list[Host], what: str, is_cut: bool) -> None:
    """Cut off what the name of a test case says, or restore it."""
    if what == "link":
        two_hosts[1].set_link("down" if is_cut else "up")
    else:
        host_number = int(what[-1])
        two_hosts[host_number].set_deaf(is_cut)


@pytest.mark.parametrize("what", ["link", "packets to 1", "packets to 0"])
def test_a_cut_stops_both_hosts_in_time_and_a_restart_resumes(
    two_hosts: list[Host], undisturbed: dict[int, Path], what: str
) -> None:
    launched_hosts = start_both(two_hosts, minutes=0.2)
    set_cut(two_hosts, what, True)
    began = time.monotonic()

    reports = ["rank 1 did not answer", "or the way there is cut"]
    for launched, report in zip(launched_hosts, reports, strict=True):
        assert launched.end() == 1
        (line,) = launched.lrd_lines
        # The host whose time is up first closes its connections.
        assert "Timed out" in line or "Connection closed" in line
        assert report in line

    # 12 s of timeout, then the roll call; the machine may be busy with something else.
    assert time.monotonic() - began < 12 + 30
    assert any("Timed out" in launched.output for launched in launched_hosts)

    set_cut(two_hosts, what, False)
    assert_all_succeed([LaunchedHost(two_hosts, host, 1) for host in two_hosts])
    assert_same_end(run_dir(two_hosts[0]), undisturbed[2])


def test_the_run_waits_out_half_a_minute_without_network(
    two_hosts: list[Host], undisturbed: dict[int, Path]
) -> None:
    launched_hosts = start_both(two_hosts, minutes=2)
    set_cut(two_hosts, "link", True)
    time.sleep(30)
    set_cut(two_hosts, "link", False)

    assert_all_succeed(launched_hosts)
    assert_same_end(run_dir(two_hosts[0]), undisturbed[2])
    for launched in launched_hosts:
        assert launched.lrd_lines == []


@pytest.mark.parametrize("what", ["link", "packets to 1"])
def test_after_a_cut_longer_than_the_timeout_the_launchers_restart_the_ranks(
    two_hosts: list[Host], undisturbed: dict[int, Path], what: str
) -> None:
    launched_hosts = start_both(two_hosts, minutes=0.1, options=RESTARTS)
    set_cut(two_hosts, what, True)
    time.sleep(30)
    set_cut(two_hosts, what, False)

    assert_all_succeed(launched_hosts)
    assert_same_end(run_dir(two_hosts[0]), undisturbed[2])
    assert any("rank 1 did not answer" in line for line in launched_hosts[0].lrd_lines)


def test_a_cut_while_the_hosts_meet_ends_in_time(tmp_path: Path) -> None:
    """The third host is missing, and the second is cut off while it waits for it."""
    with hosts(3, tmp_path) as all_hosts:
        options = ("--rdzv_conf", "timeout=15")
        launched_hosts = [
            LaunchedHost(all_hosts, host, 1, options=options) for host in all_hosts[:2]
        ]
        time.sleep(7)
        all_hosts[1].set_link("down")
        began = time.monotonic()

        for launched in launched_hosts:
            assert launched.end(60) == 2
            assert "the hosts did not come together within 15 s" in launched.lrd_lines[-1]
        assert time.monotonic() - began < 30


def test_300_ms_of_delay_are_slow_and_change_no_result(tmp_path: Path) -> None:
    overrides = ["trainer.max_steps=6", "trainer.fingerprint_every=3"]
    with hosts(2, tmp_path, delay=0.15) as all_hosts:
        launched_hosts = [LaunchedHost(all_hosts, host, 1, *overrides) for host in all_hosts]
        for launched in launched_hosts:
            assert launched.end(280) == 0, launched.output
        checkpoint = final_state(run_dir(all_hosts[0]))[2]

    assert launch(train_command(2, tmp_path / "one", *STEPS, *overrides)).returncode == 0
    expected_checkpoint = final_state(tmp_path / "one")[2]
    for file in ("model.safetensors", "optimizer.pt"):
        assert sha256(checkpoint / file) == sha256(expected_checkpoint / file)
