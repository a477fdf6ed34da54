"""Several hosts, as network namespaces.

They train as one host does, name the host that is missing or differs, and resume without shared
files.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from lrd.checkpoint import store
from tests.helpers.equality import TIMES, assert_same_end, assert_same_final_state
from tests.helpers.launched_hosts import LaunchedHost, assert_all_succeed, run_dir
from tests.helpers.launching import (
    ROOT,
    STEPS,
    final_state,
    launch,
    sha256,
    start,
    train_command,
    wait_for,
)
from tests.helpers.metrics_csv import read_metrics, read_records_by_step
from tests.helpers.namespaces import Host, hosts, missing_requirement
from tests.helpers.tensorboard_events import read_scalars

pytestmark = pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement())
RESTARTS = ("--max_restarts", "3")


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with hosts(2, tmp_path) as all_hosts:
        yield all_hosts


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_hosts_train_as_one_host_does(tmp_path: Path, number: int) -> None:
    """Two ranks on each host, compared with as many ranks on one host."""
    overrides = ["trainer.max_steps=12", "data.batch_size=96"]
    with hosts(number, tmp_path) as all_hosts:
        assert_all_succeed([LaunchedHost(all_hosts, host, 2, *overrides) for host in all_hosts])

        # Only the main host writes anything.
        written = [path.name for host in all_hosts[1:] for path in host.folder.iterdir()]
        assert written == []

    done = launch(train_command(2 * number, tmp_path / "one", *STEPS, *overrides))
    assert done.returncode == 0, done.stdout + done.stderr

    checkpoint = final_state(run_dir(all_hosts[0]))[2]
    expected_checkpoint = final_state(tmp_path / "one")[2]
    assert checkpoint.name == expected_checkpoint.name == "step-00000012"
    for file in ("model.safetensors", "optimizer.pt"):
        assert sha256(checkpoint / file) == sha256(expected_checkpoint / file)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_a_host_that_died_is_started_again_the_other_host_goes_on_by_itself(
    two_hosts: list[Host], undisturbed: dict[int, Path], victim: int
) -> None:
    launched_hosts = [LaunchedHost(two_hosts, host, 1, options=RESTARTS) for host in two_hosts]
    wait_for(lambda: bool(store.list_steps(run_dir(two_hosts[0]))), launched_hosts[0].process)

    two_hosts[victim].kill()
    assert launched_hosts[victim].end() != 0
    launched_hosts[victim] = LaunchedHost(two_hosts, two_hosts[victim], 1, options=RESTARTS)

    assert_all_succeed(launched_hosts)
    assert_same_end(run_dir(two_hosts[0]), undisturbed[2])
    # The host that was left has saved, also where it is not rank 0's.
    left = run_dir(two_hosts[1 - victim])
    assert victim == 1 or store.list_steps(left)

    (line,) = launched_hosts[1 - victim].lrd_lines
    assert ("rank 1 did not answer" if victim == 1 else "rank 0 is gone") in line


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_of_one_of_two_hosts_lose_no_step(
    tmp_path: Path, two_hosts: list[Host]
) -> None:
    """A checkpoint is due after the last step alone. The host that is left saves, each time."""
    overrides = ["trainer.epochs=60", "trainer.eval_every=20", "checkpoint.every_steps=0"]
    draw = random.Random(0)

    def start_on(host: Host) -> LaunchedHost:
        return LaunchedHost(two_hosts, host, 1, *overrides, options=("--max_restarts", "100"))

    def steps_gone_on_from() -> list[int]:
        found = re.findall(r"going on after step (\d+)", output_of_ended + launched_hosts[0].output)
        return [int(step) for step in found]

    launched_hosts = [start_on(host) for host in two_hosts]
    output_of_ended = ""  # of the main host's launchers that were killed
    metrics = run_dir(two_hosts[0]) / "metrics.csv"
    wait_for(metrics.exists, launched_hosts[0].process)
    for kill in range(20):
        time.sleep(draw.uniform(0.5, 3.0))  # a start may be killed before its first step ends
        victim = draw.randrange(2)
        two_hosts[victim].kill()
        launched_hosts[victim].end()
        if victim == 0:
            output_of_ended += launched_hosts[0].output
        launched_hosts[victim] = start_on(two_hosts[victim])
        wait_for(lambda kill=kill: len(steps_gone_on_from()) > kill, launched_hosts[0].process)

    assert_all_succeed(launched_hosts)
    steps = steps_gone_on_from()
    assert len(steps) == 20
    assert steps == sorted(steps)
    assert len(set(steps)) > 10

    # 1,320 steps, which take longer than `launch` waits.
    undisturbed = start(train_command(2, tmp_path / "undisturbed" / "run", *STEPS, *overrides))
    output = undisturbed.communicate(timeout=600)[0]
    assert undisturbed.returncode == 0, output
    assert_same_final_state(run_dir(two_hosts[0]), tmp_path / "undisturbed" / "run")
    records = read_scalars(run_dir(two_hosts[0]))
    expected_records = read_scalars(tmp_path / "undisturbed" / "run")
    assert records.keys() == expected_records.keys()
    for tag in records:
        if not tag.startswith(TIMES):
            assert records[tag] == expected_records[tag], tag


@pytest.mark.slow
def test_a_main_host_that_is_replaced_while_the_other_hosts_ranks_start(
    two_hosts: list[Host], undisturbed: dict[int, Path]
) -> None:
    """The ranks would wait in the new main host's store, and its launcher for their launcher."""
    main_host, other_host = two_hosts
    launched_hosts = [LaunchedHost(two_hosts, host, 1, options=RESTARTS) for host in two_hosts]

    def find_ranks() -> list[psutil.Process]:
        ranks = []
        for process in other_host.processes():
            with suppress(psutil.NoSuchProcess):  # it may end while the processes are listed
                if "RANK" in process.environ():
                    ranks.append(process)
        return ranks

    wait_for(lambda: bool(find_ranks()), launched_hosts[1].process)
    (rank,) = find_ranks()
    rank.suspend()

    main_host.kill()
    launched_hosts[0].end()
    launched_hosts[0] = LaunchedHost(two_hosts, main_host, 1, options=RESTARTS)
    time.sleep(8)  # until its launcher listens
    rank.resume()

    assert_all_succeed(launched_hosts)
    assert launched_hosts[0].seconds < 60
    assert_same_end(run_dir(main_host), undisturbed[2])
    assert any("the main host was started again" in line for line in launched_hosts[1].lrd_lines)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[12], [12, 27]])
def test_the_newest_checkpoint_comes_from_the_host_that_has_it(
    two_hosts: list[Host], undisturbed: dict[int, Path], stops: list[int]
) -> None:
    """The hosts change places at each start, so that rank 0 has no checkpoint, or older ones."""
    overrides_of_starts = [[f"trainer.max_steps={step}"] for step in stops]
    overrides_of_starts.append([])  # the last start goes on to the end

    for start_number, overrides in enumerate(overrides_of_starts):
        places = two_hosts if start_number % 2 == 0 else two_hosts[::-1]
        launched_hosts = [
            LaunchedHost(places, host, 1, *overrides, options=("--machine_rank", str(rank)))
            for rank, host in enumerate(places)
        ]
        assert_all_succeed(launched_hosts)
        assert launched_hosts[1].lrd_lines == []

        if start_number > 0:
            main_has = "none" if start_number == 1 else "none after step 12"
            assert (
                f"run: rank 1 on {places[1].name} has a checkpoint of step "
                f"{stops[start_number - 1]}, rank 0 has {main_has}: "
            ) in launched_hosts[0].output
        assert not list(places[0].folder.rglob("*.tmp"))
        assert not list(places[0].folder.rglob(".transfer*"))

    final_run_dir = run_dir(places[0])
    checkpoint = final_state(final_run_dir)[2]
    expected_checkpoint = final_state(undisturbed[2])[2]
    for file in ("model.safetensors", "optimizer.pt"):
        assert sha256(checkpoint / file) == sha256(expected_checkpoint / file)

    records = read_scalars(final_run_dir)
    expected_records = read_scalars(undisturbed[2])
    for tag in expected_records:
        if tag == "train/loss" or tag.startswith(("lr/", "probes/")):
            assert records[tag] == expected_records[tag]
    assert read_metrics(final_run_dir) == read_records_by_step(final_run_dir)


def test_a_missing_host_is_named_in_time(two_hosts: list[Host]) -> None:
    launched = LaunchedHost(two_hosts, two_hosts[0], 1, options=("--rdzv_conf", "timeout=3"))
    assert launched.end() == 2
    assert launched.lrd_lines == [
        "lrd: host0 (machine_rank 0): the hosts did not come together within 3 s: no machine 1"
    ]
    assert "Traceback" not in launched.output
    assert launched.seconds < 30


@pytest.mark.parametrize(
    "wrong_address",
    [
        pytest.param("10.77.0.99", marks=pytest.mark.slow),  # no host has it
        pytest.param("10.77.0.2", marks=pytest.mark.slow),  # the other host has it
        pytest.param("no-such-host", marks=pytest.mark.slow),  # does not resolve
    ],
)
def test_a_wrong_main_process_ip_is_named_in_time(
    two_hosts: list[Host], wrong_address: str
) -> None:
    options = ("--main_process_ip", wrong_address, "--rdzv_conf", "timeout=3")
    launched_hosts = [LaunchedHost(two_hosts, host, 1, options=options) for host in two_hosts]
    for launched in launched_hosts:
        assert launched.end(60) == 2, launched.output
        (line,) = launched.lrd_lines
        assert line.startswith("lrd: --main_process_ip: ")
        assert wrong_address in line
        assert launched.host.name in line
        assert "Traceback" not in launched.output


@pytest.mark.slow
def test_a_port_taken_by_another_program_is_named_in_time(two_hosts: list[Host]) -> None:
    """On the main host by accelerate; on the other one because no launcher answers there."""
    listen = (
        "import socket, time; server = socket.create_server(('', 29500)); "
        "print('listening', flush=True); time.sleep(300)"
    )
    other_program = two_hosts[0].start(["python3", "-c", listen])
    assert other_program.stdout is not None
    assert other_program.stdout.readline() == "listening\n"

    options = ("--rdzv_conf", "timeout=6")
    launched_hosts = [LaunchedHost(two_hosts, host, 1, options=options) for host in two_hosts]

    assert launched_hosts[0].end(60) != 0
    message = "port `29500`, but another process is utilizing it"
    assert message in launched_hosts[0].output

    assert launched_hosts[1].end(60) == 2
    (line,) = launched_hosts[1].lrd_lines
    assert line.startswith(
        "lrd: --main_process_port: the main host at 10.77.0.1:29500 does not speak to host1"
    )


# Slow, because test_own_parts has ranks that differ.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "value_on_host1", "value_on_host0"),
    [
        ("lr_dropout.seed=8", "8", "None"),
        ("checkpoint.every_steps=7", "7", "5"),
        ("data.dataset=imagefolder", "'imagefolder'", "'digits'"),
    ],
)
def test_a_host_with_another_recipe_is_refused_with_host_and_key_named(
    two_hosts: list[Host], override: str, value_on_host1: str, value_on_host0: str
) -> None:
    launched_hosts = [
        LaunchedHost(two_hosts, two_hosts[0], 1),
        LaunchedHost(two_hosts, two_hosts[1], 1, override),
    ]

    key = override.split("=")[0]
    difference = f"rank 1 on host1 has {value_on_host1}, rank 0 on host0 has {value_on_host0}"
    for launched in launched_hosts:
        assert launched.end() != 0
        assert launched.lrd_lines == [f"lrd: {key}: {difference}"]
        assert "exitcode  : 2" in launched.output
        assert "lrd/train.py" not in launched.output
    assert not run_dir(two_hosts[0]).exists()


def write_images(root: Path, shade: int) -> None:
    """Write two classes, with 64 images for training and 8 for the test.

    Args:
        shade: of the first image of each class; the other images are always the same.
    """
    for part, count in (("train", 32), ("test", 4)):
        for label in ("cat", "dog"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                colour = (shade, 0, 0) if number == 0 else (number, 100, 100)
                Image.new("RGB", (8, 8), colour).save(folder / f"{number:02}.png")


@pytest.mark.slow
def test_a_host_without_the_data_or_with_other_data_is_named_before_anything_starts(
    two_hosts: list[Host],
) -> None:
    overrides = ["data.dataset=imagefolder", "data.root=data", "data.augment=none"]

    write_images(two_hosts[0].folder / "data", shade=10)
    launched_hosts = [LaunchedHost(two_hosts, host, 2, *overrides) for host in two_hosts]
    assert all(launched.end() != 0 for launched in launched_hosts)
    assert launched_hosts[0].lrd_lines == [
        "lrd: rank 2 on host1: data.root: data/train is not a folder; "
        "imagefolder needs images in <class>/* there"
    ]

    write_images(two_hosts[1].folder / "data", shade=11)
    launched_hosts = [LaunchedHost(two_hosts, host, 2, *overrides) for host in two_hosts]
    assert all(launched.end() != 0 for launched in launched_hosts)
    assert [line.split(" has ")[0] for line in launched_hosts[0].lrd_lines] == [
        "lrd: data.fingerprint: rank 2 on host1",
        "lrd: data.fingerprint: rank 3 on host1",
    ]
    assert not run_dir(two_hosts[0]).exists()


@pytest.mark.slow
def test_a_host_with_other_code_is_refused(two_hosts: list[Host]) -> None:
    """It has a copy of the package with one more comment, found by PYTHONPATH."""
    folder = two_hosts[1].folder
    shutil.copytree(ROOT / "lrd", folder / "lrd")
    with (folder / "lrd" / "philox.py").open("a") as file:
        file.write("# one more comment\n")

    launched_hosts = [
        LaunchedHost(two_hosts, two_hosts[0], 1),
        LaunchedHost(two_hosts, two_hosts[1], 1, PYTHONPATH=str(folder)),
    ]
    for launched in launched_hosts:
        assert launched.end() != 0
        (line,) = launched.lrd_lines
        assert line.startswith("lrd: lrd's source files: rank 1 on host1 has ")


@pytest.mark.slow
def test_ranks_that_cannot_reach_each_other_are_named_at_once(two_hosts: list[Host]) -> None:
    """As with a firewall that lets only the launchers' port through."""
    launched_hosts = [
        LaunchedHost(two_hosts, host, 1, GLOO_SOCKET_IFNAME="lo") for host in two_hosts
    ]
    for launched in launched_hosts:
        assert launched.end() != 0
        assert launched.seconds < 60

        lines = launched.lrd_lines
        assert len(lines) == 3, launched.output
        assert lines[0].startswith(
            "lrd: rank 0 on host0 cannot reach rank 1 on host1 at 127.0.0.1, port "
        )
        assert lines[1].startswith(
            "lrd: rank 1 on host1 cannot reach rank 0 on host0 at 127.0.0.1, port "
        )
        assert lines[2].startswith("lrd: all TCP ports must be open between the hosts; ")
