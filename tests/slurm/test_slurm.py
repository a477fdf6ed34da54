"""launch/slurm/train.sbatch under a real SLURM, see cluster.sh: `pytest -m slurm`, as root."""

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

from lrd.checkpoint import run_dir, store
from tests.helpers.launching import (
    RECIPE,
    ROOT,
    SMALL,
    environment,
    final_state,
    sha256,
    train_command,
)

MISSING = [
    tool
    for tool in ("sbatch", "slurmctld", "slurmd", "munged", "unshare", "ip")
    if shutil.which(tool) is None
]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"needs {', '.join(MISSING)}: apt-get install slurm-wlm munge iproute2",
    ),
    pytest.mark.skipif(
        os.geteuid() != 0, reason="needs root: SLURM's daemons, and namespaces for its nodes"
    ),
]
CLUSTER = str(Path(__file__).with_name("cluster.sh"))
SCRIPT = "launch/slurm/train.sbatch"

# Overrides of the recipe: 264 steps, and 1,320 steps, which take more than 50 s.
STEPS = ["trainer.epochs=12", "checkpoint.every_steps=25", "data.augment=crop"]
LONG = [*STEPS, "trainer.epochs=60"]


class Cluster:
    """SLURM with the nodes n1, n2 and n3, and what one does on its login host."""

    def __init__(self) -> None:
        # The cluster lives until `cat` ends, with its standard input.
        self._process = subprocess.Popen(
            [CLUSTER, "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None

        output = ""
        while "idle n[1-3]" not in output:
            line = self._process.stdout.readline()
            assert line, f"no cluster: {output}"
            output += line
        self._login_pid = psutil.Process(self._process.pid).children()[0].pid

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, *arguments: str, **variables: str) -> str:
        """Run a command on the login host, with further environment variables.

        Returns:
            What it printed.
        """
        target = ["--target", str(self._login_pid), "--mount", "--pid", "--net", "--uts"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["nsenter", *target, f"--wd={ROOT}", *arguments],
            env={**environment(), "PATH": path, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill_node(self, name: str, is_silent: bool) -> None:
        """Kill all that runs on a node at once.

        Args:
            is_silent: as if the power failed, so that no host sees its connections close.
        """
        if is_silent:
            self.run("ip", "link", "set", f"to-{name}", "down")
        self.run("bash", "-c", f"kill -KILL $(cat /etc/slurm/node.{name}.pid)")


class Job:
    """One sbatch of the script.

    Args:
        folder: for the run directory and the log.
        options: of sbatch. Unless they are given, there are two nodes with one rank each.
        overrides: of the recipe.
        variables: environment variables of the script.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        options: list[str],
        overrides: list[str],
        **variables: str,
    ) -> None:
        self._cluster = cluster
        self.run_dir = folder / "a run"  # the blank tests the script's quotes
        all_options = ["--parsable", "--nodes", "2", "--output", f"{folder}/%j.log", *options]
        arguments = [RECIPE, f"run_dir={self.run_dir}", *SMALL, *overrides]
        output = cluster.run("sbatch", *all_options, SCRIPT, *arguments, **variables)
        self.number = output.strip()
        self._log = folder / f"{self.number}.log"

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def facts(self) -> dict[str, str]:
        """Return what scontrol shows: JobState, Restarts, ExitCode, NodeList, ..."""
        output = self._cluster.run("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", output))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain: {self.facts()}\n{self.log}"
            time.sleep(0.3)

    def wait_for_end(self, state: str) -> dict[str, str]:
        """Wait until the job has ended in a state. Returns its facts."""
        final_states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.facts()["JobState"] in final_states, 300)

        list_job = ["squeue", "--noheader", "--jobs", self.number]
        self.wait_for(lambda: not self._cluster.run(*list_job), 60)

        facts = self.facts()
        assert facts["JobState"] == state, self.log
        return facts

    def wait_for_step(self, step: int) -> None:
        """Wait for a checkpoint of a step or a later one."""
        self.wait_for(lambda: max(store.list_steps(self.run_dir), default=0) >= step)

    def saved_step(self) -> int:
        """Return the step after which the run was stopped; there must be a checkpoint of it."""
        status = run_dir.read_status(self.run_dir)
        assert status is not None
        assert status["state"] == "stopped", self.log
        assert store.list_steps(self.run_dir)[-1] == status["step"]
        return int(status["step"])


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def run_without_slurm(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[list[str]], Path]:
    """Trains with some overrides on two ranks of this machine, without a stop.

    It returns the run directory. Each job is trained once.
    """
    run_dirs: dict[str, Path] = {}

    def run(overrides: list[str]) -> Path:
        key = " ".join(overrides)
        if key not in run_dirs:
            run_dir = tmp_path_factory.mktemp("reference") / "run"
            subprocess.run(
                train_command(2, run_dir, *overrides),
                cwd=ROOT,
                env=environment(),
                timeout=300,
                check=True,
            )
            run_dirs[key] = run_dir
        return run_dirs[key]

    return run


def assert_same_files(run_dir: Path, expected_run_dir: Path) -> None:
    """Compare the newest checkpoints."""
    newest = final_state(run_dir)[2]
    expected_newest = final_state(expected_run_dir)[2]
    assert newest.name == expected_newest.name
    for file in ("model.safetensors", "optimizer.pt"):
        assert sha256(newest / file) == sha256(expected_newest / file), file


def announce_time_limit(cluster: Cluster, job: Job) -> None:
    """Send the signal that SLURM sends before the time limit."""
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)


def test_at_a_time_limit_the_job_is_requeued_and_goes_on(
    tmp_path: Path, cluster: Cluster, run_without_slurm: Callable[[list[str]], Path]
) -> None:
    """SLURM sends the signal 10 to 40 s before the limit of one minute.

    The limit is lifted while the job waits to go on.
    """
    job = Job(cluster, tmp_path, ["--time=1", "--signal=B:USR1@10"], LONG)
    job.wait_for(lambda: job.facts()["Restarts"] == "1")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    saved_step = job.saved_step()

    assert job.wait_for_end("COMPLETED")["Restarts"] == "1"
    assert f"going on after step {saved_step}" in job.log
    assert_same_files(job.run_dir, run_without_slurm(LONG))


@pytest.mark.parametrize(
    ("node_index", "is_silent"),
    [(0, True), (1, True), (1, False)],
    ids=["first", "second", "second, not silent"],
)
def test_when_a_node_dies_the_job_is_requeued_without_it(
    tmp_path: Path,
    cluster: Cluster,
    run_without_slurm: Callable[[list[str]], Path],
    node_index: int,
    is_silent: bool,
) -> None:
    def list_nodes(facts: dict[str, str]) -> list[str]:
        return cluster.run("scontrol", "show", "hostnames", facts["NodeList"]).split()

    job = Job(cluster, tmp_path, [], STEPS)
    job.wait_for_step(50)
    victim = list_nodes(job.facts())[node_index]
    cluster.kill_node(victim, is_silent)

    facts = job.wait_for_end("COMPLETED")
    assert facts["Restarts"] == "1"
    assert victim not in list_nodes(facts)
    assert "going on after step" in job.log
    assert_same_files(job.run_dir, run_without_slurm(STEPS))


def test_after_scancel_the_run_is_saved_and_another_job_goes_on(
    tmp_path: Path, cluster: Cluster, run_without_slurm: Callable[[list[str]], Path]
) -> None:
    job = Job(cluster, tmp_path, [], STEPS)
    job.wait_for_step(25)
    cluster.run("scancel", job.number)
    assert job.wait_for_end("CANCELLED")["Restarts"] == "0"
    saved_step = job.saved_step()

    next_job = Job(cluster, tmp_path, ["--nodes", "1"], STEPS, RANKS_PER_NODE="2")
    next_job.wait_for_end("COMPLETED")
    assert f"going on after step {saved_step}" in next_job.log
    assert_same_files(job.run_dir, run_without_slurm(STEPS))


def test_a_user_error_ends_the_job_without_a_requeue(tmp_path: Path, cluster: Cluster) -> None:
    job = Job(cluster, tmp_path, [], ["optimizer.learning_rate=0.1"])
    facts = job.wait_for_end("FAILED")
    assert facts["Restarts"] == "0"
    assert facts["ExitCode"] == "1:0"
    assert "lrd: optimizer.learning_rate: " in job.log
    assert "requeued" not in job.log


def test_requeues_are_counted(tmp_path: Path, cluster: Cluster) -> None:
    job = Job(cluster, tmp_path, [], STEPS, REQUEUES="0")
    job.wait_for_step(25)
    announce_time_limit(cluster, job)
    facts = job.wait_for_end("FAILED")
    assert facts["Restarts"] == "0"
    assert facts["ExitCode"] == "75:0"
    job.saved_step()


def test_a_signal_before_the_ranks_start_requeues_the_job_at_once(
    tmp_path: Path, cluster: Cluster
) -> None:
    """There is no rank that it could stop. At the time limit it would be too late to requeue."""
    job = Job(cluster, tmp_path, [], [*STEPS, "trainer.epochs=200"], REQUEUES="1")
    job.wait_for(lambda: "slurm_script" in cluster.run("ps", "-e", "-o", "args"))
    announce_time_limit(cluster, job)
    job.wait_for(lambda: job.facts()["Restarts"] == "1")

    cluster.run("scancel", job.number)
    job.wait_for_end("CANCELLED")


def test_ranks_that_hang_are_killed_and_the_job_is_requeued(
    tmp_path: Path, cluster: Cluster
) -> None:
    """They are suspended and ignore the signal: the job is requeued without them 60 s later."""
    job = Job(cluster, tmp_path, [], STEPS)
    job.wait_for_step(25)
    cluster.run("pkill", "-STOP", "--full", "^[^ ]*python.* -m lrd.train")
    announce_time_limit(cluster, job)
    job.wait_for(lambda: job.facts()["Restarts"] == "1")

    cluster.run("scancel", job.number)
    job.wait_for_end("CANCELLED")


def test_two_jobs_on_the_same_nodes(
    tmp_path: Path, cluster: Cluster, run_without_slurm: Callable[[list[str]], Path]
) -> None:
    jobs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        jobs.append(Job(cluster, tmp_path / name, ["--nodelist", "n1,n2"], STEPS))

    for job in jobs:
        job.wait_for_end("COMPLETED")
        assert_same_files(job.run_dir, run_without_slurm(STEPS))


def test_if_a_job_has_gpus_the_launch_file_for_gpus_is_taken(
    tmp_path: Path, cluster: Cluster
) -> None:
    """The nodes have GPUs for SLURM, but none for torch."""
    job = Job(cluster, tmp_path, ["--gpus-per-node", "2"], STEPS)
    job.wait_for_end("FAILED")
    assert "lrd: accelerate launch asks for GPUs, as it does where neither a launch file" in job.log
