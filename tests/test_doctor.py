"""`lrd doctor`: what it shows of the ranks, and what it finds wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from launching import command, launch
from network import hosts, launcher, why_not

from lrd.doctor import Facts, complaints

WELL = Facts(0, "a", "cpu", "3.12.1", "2.13", "1.15", "0.1", "gloo", "eth0", 1, 4, 0.5, False, int(50e9))
BOTH = [WELL, replace(WELL, rank=1, host="b", skew=0.02, skew_error=0.01)]


def test_where_all_is_well_nothing_is_said() -> None:
    assert complaints(BOTH, 0.0002) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"torch": "2.11"}, "torch: rank 1 on b has 2.11, rank 0 on a has 2.13"),
        ({"cores": 2}, "cores: rank 1 on b has 2, rank 0 on a has 4"),
        ({"skew": -7.5}, "clock: rank 1 on b is -7.5 s off; TensorBoard's times and logs will mislead"),
        ({"threads": 8}, "threads: b has 8 in 1 ranks and 4 cores; set OMP_NUM_THREADS"),
        ({"load": 9.0}, "load: 9.0 on b, which has 4 cores: something else is at work"),
        ({"has_unused_gpu": True}, "device: rank 1 on b has a GPU and trains on the CPU; take a launch file for GPUs"),
        ({"interface": "lo"}, "interface: gloo listens on the loopback interface, where other hosts cannot reach it"),
    ],
)
def test_what_looks_wrong_is_said_in_words(change: dict[str, object], line: str) -> None:
    assert complaints([BOTH[0], replace(BOTH[1], **change)], 0.0) == [line]


def test_a_clock_that_cannot_be_read_exactly_is_no_fault() -> None:
    assert complaints([BOTH[0], replace(BOTH[1], skew=1.5, skew_error=0.9)], 0.0) == []


def test_little_disk_counts_where_checkpoints_are_written_and_a_slow_network_is_told() -> None:
    assert complaints([BOTH[0], replace(BOTH[1], free_disk=5)], 0.0) == []
    (line,) = complaints([replace(BOTH[0], free_disk=int(1e9)), BOTH[1]], 0.0)
    assert line == "free disk: 1.0 GB on rank 0 on a, which writes checkpoints"
    (line,) = complaints(BOTH, 0.3)
    assert line == "network: one number takes 300.0 ms through an all-reduce; below 1 ms is usual"


def test_ranks_of_one_host_under_the_launcher(tmp_path: Path) -> None:
    done = launch(command(2, ["-m", "lrd.doctor", str(tmp_path)]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s), backend gloo" in done.stdout
    assert "all-reduce over 2 ranks: " in done.stdout
    assert [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")] == ["0", "1"]


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_hosts_with_a_long_cable(tmp_path: Path) -> None:
    with hosts(2, tmp_path, delay=0.02) as own:
        target = ["-m", "lrd.doctor"]
        started = [host.start(launcher(own, host, 1, target, "--rdzv_backend", "lrd")) for host in own]
        said, _ = (process.communicate(timeout=120)[0] for process in started)
    assert "host0" in said
    assert "host1" in said
    assert "eth0" in said
    assert "ens5" in said
    assert "looks wrong: network: one number takes" in said
