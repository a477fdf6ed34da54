"""Several hosts, as network namespaces: they train as one does, say who is missing, go on without shared files."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launching import RECIPE, ROOT, SMALL, STEPS, final_state, launch, scalars, sha256, train_command, wait_for
from network import Host, hosts, launcher, why_not
from PIL import Image
from test_resume import assert_same_end

from lrd import checkpoint

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
TRAIN = ["-m", "lrd.train", RECIPE, "run_dir=run", *SMALL, *STEPS]


class Launched:
    """A launcher on a host, and what it and its ranks said so far."""

    def __init__(
        self, own: list[Host], host: Host, ranks: int, *overrides: str, options: tuple[str, ...] = (), **more: str
    ) -> None:
        self.host, self.said = host, ""
        self.began = time.monotonic()
        every = ("--rdzv_backend", "lrd", "--rdzv_conf", "timeout=60", *options)
        self.process = host.start(launcher(own, host, ranks, [*TRAIN, *overrides], *every), **more)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def end(self, timeout: float = 120) -> int:
        """Wait for the end. Returns the status; `seconds` is how long it took in all."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.host.name} hangs; it said:\n{self.said}") from None
        self.seconds = time.monotonic() - self.began
        self._reader.join()
        return status

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("lrd: ")]


def run_dir(host: Host) -> Path:
    return host.folder / "run"


def end_well(launched: list[Launched]) -> None:
    for one in launched:
        assert one.end() == 0, one.said


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Host]]:
    with hosts(2, tmp_path) as own:
        yield own


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_hosts_train_as_one_host_does(tmp_path: Path, number: int) -> None:
    """Two ranks each, compared with as many ranks on one host; only the main host writes anything."""
    more = ["trainer.max_steps=12", "data.batch_size=96"]
    with hosts(number, tmp_path) as own:
        end_well([Launched(own, host, 2, *more) for host in own])
        assert [path.name for host in own[1:] for path in host.folder.iterdir()] == []
    done = launch(train_command(2 * number, tmp_path / "one", *STEPS, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    here, there = final_state(tmp_path / "one")[2], final_state(run_dir(own[0]))[2]
    assert here.name == there.name == "step-00000012"
    for file in ("model.safetensors", "optimizer.pt"):
        assert sha256(here / file) == sha256(there / file)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_host_that_died_comes_back_and_the_run_goes_on_by_itself(
    two: list[Host], undisturbed: dict[int, Path], victim: int
) -> None:
    launched = [Launched(two, host, 1, options=("--max_restarts", "3")) for host in two]
    wait_for(lambda: bool(checkpoint.steps(run_dir(two[0]))), launched[0].process)
    two[victim].kill()
    assert launched[victim].end() != 0
    launched[victim] = Launched(two, two[victim], 1, options=("--max_restarts", "3"))
    end_well(launched)
    assert_same_end(run_dir(two[0]), undisturbed[2])
    (line,) = launched[1 - victim].complaints
    assert "rank 1 did not answer" in line if victim else "rank 0 is gone" in line


@pytest.mark.slow
def test_a_main_host_that_is_replaced_while_the_other_hosts_ranks_start(
    two: list[Host], undisturbed: dict[int, Path]
) -> None:
    """They would wait in the new one's store, and its launcher for theirs."""
    again = ("--max_restarts", "3")
    launched = [Launched(two, host, 1, options=again) for host in two]

    def ranks() -> list[psutil.Process]:
        return [process for process in two[1].processes() if "RANK" in process.environ()]

    wait_for(lambda: bool(ranks()), launched[1].process)
    (rank,) = ranks()
    rank.suspend()
    two[0].kill()
    launched[0].end()
    launched[0] = Launched(two, two[0], 1, options=again)
    time.sleep(8)  # its launcher listens
    rank.resume()
    end_well(launched)
    assert launched[0].seconds < 60
    assert_same_end(run_dir(two[0]), undisturbed[2])
    assert any("the main host was started again" in line for line in launched[1].complaints)


@pytest.mark.parametrize("stops", [[12], pytest.param([12, 27], marks=pytest.mark.slow)])
def test_the_newest_checkpoint_comes_from_the_host_that_has_it(
    two: list[Host], undisturbed: dict[int, Path], stops: list[int]
) -> None:
    """The hosts change places each time, so that rank 0 has no checkpoint, or older ones."""
    for number, stop in enumerate([*([f"trainer.max_steps={step}"] for step in stops), []]):
        places = two if number % 2 == 0 else [two[1], two[0]]
        launched = [
            Launched(places, host, 1, *stop, options=("--machine_rank", str(rank))) for rank, host in enumerate(places)
        ]
        end_well(launched)
        assert launched[1].complaints == []
        if number:
            lacking = "none" if number == 1 else "none after step 12"
            line = (
                f"run: rank 1 on {places[1].name} has a checkpoint of step {stops[number - 1]}, rank 0 has {lacking}: "
            )
            assert line in launched[0].said
        assert not list(places[0].folder.rglob("*.tmp"))
    last = run_dir(places[0])
    newest, expected = final_state(last)[2], final_state(undisturbed[2])[2]
    for file in ("model.safetensors", "optimizer.pt"):
        assert sha256(newest / file) == sha256(expected / file)
    records, wanted = scalars(last), scalars(undisturbed[2])
    for tag in (tag for tag in wanted if tag == "train/loss" or tag.startswith(("lr/", "probes/"))):
        assert records[tag] == wanted[tag]


def test_a_host_that_is_missing_is_named_in_time(two: list[Host]) -> None:
    here = Launched(two, two[0], 1, options=("--rdzv_conf", "timeout=3"))
    assert here.end() == 2
    (line,) = here.complaints
    assert line == "lrd: host0 (machine_rank 0): the hosts did not come together within 3 s: no machine 1"
    assert "Traceback" not in here.said
    assert here.seconds < 30


@pytest.mark.parametrize(
    "wrong", ["10.77.0.99", *(pytest.param(each, marks=pytest.mark.slow) for each in ("10.77.0.2", "no-such-host"))]
)
def test_a_wrong_main_process_ip_is_named_in_time(two: list[Host], wrong: str) -> None:
    """An address that nobody has, the other host's, and a name that does not resolve."""
    options = ("--main_process_ip", wrong, "--rdzv_conf", "timeout=3")
    launched = [Launched(two, host, 1, options=options) for host in two]
    for one in launched:
        assert one.end(60) == 2, one.said
        (line,) = one.complaints
        assert line.startswith("lrd: --main_process_ip: ")
        assert wrong in line
        assert one.host.name in line
        assert "Traceback" not in one.said


@pytest.mark.slow
def test_a_port_that_something_else_has_is_named_in_time(two: list[Host]) -> None:
    """By accelerate on the main host; the others meet somebody who does not speak as a launcher does."""
    listen = "import socket, time; one = socket.create_server(('', 29500)); print('here', flush=True); time.sleep(300)"
    other = two[0].start(["python3", "-c", listen])
    assert other.stdout is not None
    assert other.stdout.readline() == "here\n"
    launched = [Launched(two, host, 1, options=("--rdzv_conf", "timeout=6")) for host in two]
    assert launched[0].end(60) != 0
    assert "port `29500`, but another process is utilizing it" in launched[0].said
    assert launched[1].end(60) == 2
    (line,) = launched[1].complaints
    assert line.startswith("lrd: --main_process_port: the main host at 10.77.0.1:29500 does not speak to host1")


@pytest.mark.parametrize(
    ("override", "theirs", "ours"),
    [
        ("lr_dropout.seed=8", "8", "None"),
        pytest.param("checkpoint.every_steps=7", "7", "5", marks=pytest.mark.slow),
        pytest.param("data.dataset=imagefolder", "'imagefolder'", "'digits'", marks=pytest.mark.slow),
    ],
)
def test_hosts_with_other_recipes_are_refused_with_host_and_key(
    two: list[Host], override: str, theirs: str, ours: str
) -> None:
    line = f"{override.split('=')[0]}: rank 1 on host1 has {theirs}, rank 0 on host0 has {ours}"
    launched = [Launched(two, two[0], 1), Launched(two, two[1], 1, override)]
    for one in launched:
        assert one.end() != 0
        assert f"lrd: {line}" in one.complaints
        assert len(one.complaints) == 1
        assert "exitcode  : 2" in one.said
        assert "lrd/train.py" not in one.said
    assert not run_dir(two[0]).exists()


def put_images(root: Path, shade: int) -> None:
    """Two classes, 64 images for training and 8 for the test, of which the shade of one can differ."""
    for part, count in (("train", 32), ("test", 4)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                colour = (shade, 0, 0) if number == 0 else (number, 100, 100)
                Image.new("RGB", (8, 8), colour).save(root / part / label / f"{number:02}.png")


@pytest.mark.slow
def test_a_host_without_the_data_or_with_others_says_so_before_anything_starts(two: list[Host]) -> None:
    own_data = ["data.dataset=imagefolder", "data.root=data", "data.augment=none"]
    put_images(two[0].folder / "data", 10)
    launched = [Launched(two, host, 2, *own_data) for host in two]
    assert all(one.end() != 0 for one in launched)
    missing = "data.root: data/train is not a folder; imagefolder needs train/<class>/* and test/<class>/* there"
    assert launched[0].complaints == [f"lrd: rank 2 on host1: {missing}"]
    put_images(two[1].folder / "data", 11)
    launched = [Launched(two, host, 2, *own_data) for host in two]
    assert all(one.end() != 0 for one in launched)
    lines = launched[0].complaints
    assert [line.split(" has ")[0] for line in lines] == [f"lrd: data.fingerprint: rank {r} on host1" for r in (2, 3)]
    assert not run_dir(two[0]).exists()


@pytest.mark.slow
def test_a_host_with_other_code_is_refused(two: list[Host]) -> None:
    """A copy of the package with one comment more, by PYTHONPATH."""
    shutil.copytree(ROOT / "lrd", two[1].folder / "lrd")
    with (two[1].folder / "lrd" / "mask.py").open("a") as stream:
        stream.write("# one comment more\n")
    launched = [Launched(two, two[0], 1), Launched(two, two[1], 1, PYTHONPATH=str(two[1].folder))]
    for one in launched:
        assert one.end() != 0
        (line,) = one.complaints
        assert line.startswith("lrd: lrd's source files: rank 1 on host1 has ")


@pytest.mark.slow
def test_ranks_that_cannot_reach_each_other_say_so_at_once(two: list[Host]) -> None:
    """What a firewall does that lets the launchers' port through and nothing else."""
    launched = [Launched(two, host, 1, GLOO_SOCKET_IFNAME="lo") for host in two]
    for one in launched:
        assert one.end() != 0
        assert one.seconds < 60
        lines = one.complaints
        assert len(lines) == 3, one.said
        assert lines[0].startswith("lrd: rank 0 on host0 cannot reach rank 1 on host1 at 127.0.0.1, port ")
        assert lines[1].startswith("lrd: rank 1 on host1 cannot reach rank 0 on host0 at 127.0.0.1, port ")
        assert lines[2].startswith("lrd: all TCP ports must be open between the hosts; ")
