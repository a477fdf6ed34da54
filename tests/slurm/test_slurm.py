"""launch/slurm/train.sbatch under a real SLURM (cluster.sh): `pytest -m slurm`, as root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launching import RECIPE, ROOT, SMALL, environment, final_state, sha256, train_command

from lrd import checkpoint, rundir

MISSING = [tool for tool in ("sbatch", "slurmctld", "slurmd", "munged", "unshare", "ip") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: apt-get install slurm-wlm munge iproute2"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: SLURM's daemons, and namespaces for its nodes"),
]
SCRIPT = "launch/slurm/train.sbatch"
STEPS = ["trainer.epochs=12", "checkpoint.every_steps=25", "data.augment=crop"]  # 264 steps
LONG = [*STEPS, "trainer.epochs=60"]  # 1320: more than 50 s


class Cluster:
    """SLURM with the nodes n1, n2 and n3, and what one does on its login host."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [str(Path(__file__).with_name("cluster.sh")), "cat"],  # lives until its standard input ends, as with us
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        lines = iter(self._process.stdout.readline, "")
        said = ""
        while "idle n[1-3]" not in said:
            line = next(lines, None)
            assert line is not None, f"no cluster: {said}"
            said += line
        self._inside = psutil.Process(self._process.pid).children()[0].pid

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, *arguments: str, **more: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        enter = ["nsenter", "--target", str(self._inside), "--mount", "--pid", "--net", "--uts", f"--wd={ROOT}"]
        done = subprocess.run(
            [*enter, *arguments], capture_output=True, text=True, timeout=60, check=False,
            env={**environment(), "PATH": path, **more},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill_node(self, name: str, is_silent: bool) -> None:
        """All that runs on it at once; silent: as when the power goes, so that nobody hears its connections close."""
        if is_silent:
            self.run("ip", "link", "set", f"to-{name}", "down")
        self.run("bash", "-c", f"kill -KILL $(cat /etc/slurm/node.{name}.pid)")


class Job:
    """One sbatch of the script, two nodes with one rank each unless `options` say otherwise."""

    def __init__(self, cluster: Cluster, folder: Path, options: list[str], overrides: list[str], **more: str) -> None:
        self._cluster = cluster
        self.run_dir = folder / "a run"  # the blank is for the script's quotes
        options = ["--parsable", "--nodes", "2", "--output", f"{folder}/%j.log", *options]
        arguments = [RECIPE, f"run_dir={self.run_dir}", *SMALL, *overrides]
        self.number = cluster.run("sbatch", *options, SCRIPT, *arguments, **more).strip()
        self._log = folder / f"{self.number}.log"

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def facts(self) -> dict[str, str]:
        """JobState, Restarts, ExitCode, NodeList ..., as scontrol has them."""
        return dict(re.findall(r"(\w+)=(\S*)", self._cluster.run("scontrol", "show", "job", self.number)))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain: {self.facts()}\n{self.log}"
            time.sleep(0.3)

    def wait_for_end(self, state: str) -> dict[str, str]:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.facts()["JobState"] in ends, 300)
        self.wait_for(lambda: not self._cluster.run("squeue", "--noheader", "--jobs", self.number), 60)
        facts = self.facts()
        assert facts["JobState"] == state, self.log
        return facts

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: max(checkpoint.steps(self.run_dir), default=0) >= step)

    def saved_step(self) -> int:
        """Where the run says that it stopped, for which there must be a checkpoint."""
        status = rundir.read_status(self.run_dir)
        assert status is not None
        assert status["state"] == "stopped", self.log
        assert checkpoint.steps(self.run_dir)[-1] == status["step"]
        return int(status["step"])


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """The same jobs on two ranks of this machine, without SLURM and without a stop."""
    runs: dict[str, Path] = {}

    def run(overrides: list[str]) -> Path:
        key = " ".join(overrides)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("reference") / "run"
            subprocess.run(
                train_command(2, runs[key], *overrides), cwd=ROOT, env=environment(), timeout=300, check=True
            )
        return runs[key]

    return run


def assert_same_end(run_dir: Path, expected: Path) -> None:
    newest, expected_newest = final_state(run_dir)[2], final_state(expected)[2]
    assert newest.name == expected_newest.name
    for file in ("model.safetensors", "optimizer.pt"):
        assert sha256(newest / file) == sha256(expected_newest / file), file


def test_a_time_limit(tmp_path: Path, cluster: Cluster, reference: Callable[[list[str]], Path]) -> None:
    """SLURM signals 10 to 40 s before the limit of one minute. The limit is lifted while the job waits to go on."""
    job = Job(cluster, tmp_path, ["--time=1", "--signal=B:USR1@10"], LONG)
    job.wait_for(lambda: job.facts()["Restarts"] == "1")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    stopped = job.saved_step()
    assert job.wait_for_end("COMPLETED")["Restarts"] == "1"
    assert f"going on after step {stopped}" in job.log
    assert_same_end(job.run_dir, reference(LONG))


@pytest.mark.parametrize(
    ("which", "is_silent"), [(0, True), (1, True), (1, False)], ids=["first", "second", "second, not silent"]
)
def test_a_node_that_dies(
    tmp_path: Path, cluster: Cluster, reference: Callable[[list[str]], Path], which: int, is_silent: bool
) -> None:
    job = Job(cluster, tmp_path, [], STEPS)
    job.wait_for_step(50)
    nodes = cluster.run("scontrol", "show", "hostnames", job.facts()["NodeList"]).split()
    cluster.kill_node(nodes[which], is_silent)
    facts = job.wait_for_end("COMPLETED")
    assert facts["Restarts"] == "1"
    assert nodes[which] not in cluster.run("scontrol", "show", "hostnames", facts["NodeList"]).split()
    assert "going on after step" in job.log
    assert_same_end(job.run_dir, reference(STEPS))


def test_scancel_saves(tmp_path: Path, cluster: Cluster, reference: Callable[[list[str]], Path]) -> None:
    job = Job(cluster, tmp_path, [], STEPS)
    job.wait_for_step(25)
    cluster.run("scancel", job.number)
    assert job.wait_for_end("CANCELLED")["Restarts"] == "0"
    stopped = job.saved_step()
    again = Job(cluster, tmp_path, ["--nodes", "1"], STEPS, RANKS_PER_NODE="2")
    again.wait_for_end("COMPLETED")
    assert f"going on after step {stopped}" in again.log
    assert_same_end(job.run_dir, reference(STEPS))


def test_an_error_ends_the_job_once(tmp_path: Path, cluster: Cluster) -> None:
    job = Job(cluster, tmp_path, [], ["optimizer.learning_rate=0.1"])
    facts = job.wait_for_end("FAILED")
    assert facts["Restarts"] == "0"
    assert facts["ExitCode"] == "1:0"
    assert "lrd: optimizer.learning_rate: " in job.log
    assert "requeued" not in job.log


def test_requeues_are_counted(tmp_path: Path, cluster: Cluster) -> None:
    job = Job(cluster, tmp_path, [], STEPS, REQUEUES="0")
    job.wait_for_step(25)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # what SLURM does before the time limit
    facts = job.wait_for_end("FAILED")
    assert (facts["Restarts"], facts["ExitCode"]) == ("0", "75:0")
    job.saved_step()


def test_a_signal_before_the_ranks_start(tmp_path: Path, cluster: Cluster) -> None:
    """It finds none that it could stop. The job is requeued all the same, and not at the limit, when it is too late."""
    job = Job(cluster, tmp_path, [], [*STEPS, "trainer.epochs=200"], REQUEUES="1")
    job.wait_for(lambda: "slurm_script" in cluster.run("ps", "-e", "-o", "args"))
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for(lambda: job.facts()["Restarts"] == "1")
    cluster.run("scancel", job.number)
    job.wait_for_end("CANCELLED")


def test_ranks_that_hang_are_killed(tmp_path: Path, cluster: Cluster) -> None:
    """They are stopped, and so do not heed the signal: 60 s later the job is requeued without them."""
    job = Job(cluster, tmp_path, [], STEPS)
    job.wait_for_step(25)
    cluster.run("pkill", "-STOP", "--full", "^[^ ]*python.* -m lrd.train")
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for(lambda: job.facts()["Restarts"] == "1")
    cluster.run("scancel", job.number)
    job.wait_for_end("CANCELLED")


def test_two_jobs_on_the_same_nodes(tmp_path: Path, cluster: Cluster, reference: Callable[[list[str]], Path]) -> None:
    jobs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        jobs.append(Job(cluster, tmp_path / name, ["--nodelist", "n1,n2"], STEPS))
    for job in jobs:
        job.wait_for_end("COMPLETED")
        assert_same_end(job.run_dir, reference(STEPS))


def test_gpus_choose_the_launch_file(tmp_path: Path, cluster: Cluster) -> None:
    """Two GPUs a node by SLURM's account, none by torch's."""
    job = Job(cluster, tmp_path, ["--gpus-per-node", "2"], STEPS)
    job.wait_for_end("FAILED")
    assert "lrd: the launch file asks for GPUs, but this host has no CUDA device" in job.log
