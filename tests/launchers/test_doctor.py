"""`lrd doctor`: what it shows of the ranks, and which problems it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lrd import doctor
from lrd.doctor import RankFacts, find_problems
from tests.helpers.launching import command, launch
from tests.helpers.namespaces import hosts, launcher, missing_requirement

RANK_0 = RankFacts(
    rank=0,
    host="a",
    device="cpu",
    python="3.12.1",
    torch="2.13",
    accelerate="1.15",
    lrd="0.1",
    backend="gloo",
    interface="eth0",
    threads=1,
    cores=4,
    load=0.5,
    has_unused_gpu=False,
    free_disk=int(50e9),
)
RANK_1 = replace(RANK_0, rank=1, host="b", clock_skew=0.02, clock_skew_error=0.01)


def test_a_healthy_cluster_has_no_problems() -> None:
    assert find_problems([RANK_0, RANK_1], latency=0.0002) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"torch": "2.11"}, "torch: rank 1 on b has 2.11, rank 0 on a has 2.13"),
        ({"cores": 2}, "cores: rank 1 on b has 2, rank 0 on a has 4"),
        (
            {"clock_skew": -7.5},
            "clock: rank 1 on b is -7.5 s off; TensorBoard's times and logs will mislead",
        ),
        ({"threads": 8}, "threads: b has 8 in 1 ranks and 4 cores; set OMP_NUM_THREADS"),
        ({"load": 9.0}, "load: 9.0 on b, which has 4 cores: something else is at work"),
        (
            {"has_unused_gpu": True},
            "device: rank 1 on b has a GPU and trains on the CPU; take a launch file for GPUs",
        ),
        (
            {"interface": "lo"},
            "interface: gloo listens on the loopback interface, where other hosts cannot reach it",
        ),
    ],
)
def test_each_problem_gets_a_line(change: dict[str, object], line: str) -> None:
    assert find_problems([RANK_0, replace(RANK_1, **change)], latency=0.0) == [line]


def test_a_clock_skew_that_may_be_a_measuring_error_is_no_problem() -> None:
    unsure = replace(RANK_1, clock_skew=1.5, clock_skew_error=0.9)
    assert find_problems([RANK_0, unsure], latency=0.0) == []


def test_little_disk_is_a_problem_on_the_rank_that_writes_checkpoints() -> None:
    assert find_problems([RANK_0, replace(RANK_1, free_disk=5)], latency=0.0) == []

    (line,) = find_problems([replace(RANK_0, free_disk=int(1e9)), RANK_1], latency=0.0)
    assert line == "free disk: 1.0 GB on rank 0 on a, which writes checkpoints"


def test_a_slow_network_is_a_problem() -> None:
    (line,) = find_problems([RANK_0, RANK_1], latency=0.3)
    assert line == "network: one number takes 300.0 ms through an all-reduce; below 1 ms is usual"


@pytest.mark.usefixtures("one_thread")
def test_a_disk_that_cannot_be_looked_at_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(doctor.shutil, "disk_usage", refuse)
    with pytest.raises(SystemExit) as caught:
        doctor.main([str(tmp_path)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"lrd: {tmp_path}: Permission denied\n"


def test_ranks_of_one_host_under_the_launcher(tmp_path: Path) -> None:
    done = launch(command(2, ["-m", "lrd.doctor", str(tmp_path)]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s), backend gloo" in done.stdout
    assert "all-reduce over 2 ranks: " in done.stdout

    table_rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in table_rows] == ["0", "1"]


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement())
def test_hosts_with_a_slow_network(tmp_path: Path) -> None:
    with hosts(2, tmp_path, delay=0.02) as all_hosts:
        target = ["-m", "lrd.doctor"]
        processes = [
            host.start(launcher(all_hosts, host, 1, target, "--rdzv_backend", "lrd"))
            for host in all_hosts
        ]
        outputs = [process.communicate(timeout=120)[0] for process in processes]

    main_output = outputs[0]
    assert "host0" in main_output
    assert "host1" in main_output
    assert "eth0" in main_output
    assert "ens5" in main_output
    assert "looks wrong: network: one number takes" in main_output
