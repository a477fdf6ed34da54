"""Runs the runs of a study as child processes, some at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import torch

from lrd import console
from lrd.checkpoint.run_dir import STOP_SECONDS
from lrd.checkpoint.run_records import describe_seconds
from lrd.distributed.signals import PARENT_VARIABLE, StopSignals
from lrd.errors import EXIT_OK, EXIT_RUN_ERROR, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from lrd.host import available_cores
from lrd.study.grid import GridRun, RunState, Study, command_overrides, read_state
from lrd.study.progress import GridProgress

_SECONDS_BETWEEN_POLLS = 0.1
_LOCK_FILE = ".lock"


@dataclass
class _Child:
    """A run that is running.

    Attributes:
        run: which run it is.
        slot: its place among the `jobs` children that run at a time.
        process: the process.
        output: what it prints.
        began: when it was started, by `time.monotonic`.
    """

    run: GridRun
    slot: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    def last_words(self) -> list[str]:
        """Its error lines; if it has none, the last line that it printed."""
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()
        errors = [line.removeprefix("lrd: ") for line in lines if line.startswith("lrd: ")]
        return errors or [line for line in lines if line.strip()][-1:]


def run_grid(study: Study, runs: list[GridRun], states: dict[GridRun, RunState], jobs: int) -> int:
    """Run what is left of some runs of a study, in their order.

    A run that was interrupted goes on from its newest checkpoint. A run whose loss is not finite
    has diverged, which is a result. If a run fails by anything else, the others go on.

    Args:
        study: the study.
        runs: the runs that are this process's.
        states: what has been done of each run of the study. It is brought up to date.
        jobs: how many runs run at a time.

    Returns:
        The exit status: 75 if a signal stopped it, 1 if a run failed.

    Raises:
        UserError: a run ended with an error of the user, which would end the others too; or another
            process works on one of the runs.
    """
    queue = [run for run in runs if not states[run].is_done]
    if not queue:
        return EXIT_OK

    with _lock_runs(study, queue), StopSignals() as signals:
        pool = _Pool(study, states, jobs)
        with GridProgress(runs, states) as progress:
            try:
                while (queue or pool.children) and not signals.received and not pool.is_stopped:
                    while queue and len(pool.children) < jobs:
                        pool.start(queue.pop(0))
                    time.sleep(_SECONDS_BETWEEN_POLLS)
                    pool.collect()
                    progress.update([child.run for child in pool.children])
            finally:
                pool.stop()

    num_done = sum(states[run].is_done for run in runs)
    if signals.received or pool.is_stopped:
        reason = f" by signal {signals.received}" if signals.received else ""
        console.info(
            f"stopped{reason}: {num_done} of {len(runs)} runs are done, what was running is saved; "
            "the same command goes on from here"
        )
        return EXIT_STOPPED
    if pool.num_failed:
        console.error(f"{pool.num_failed} run(s) failed; the same command tries them again")
        return EXIT_RUN_ERROR
    return EXIT_OK


class _Pool:
    """The runs that are running.

    Args:
        study: the study.
        states: what has been done of each run; brought up to date when one ends.
        jobs: how many may run at a time.

    Attributes:
        children: what is running.
        num_failed: runs that failed, without those that diverged.
        is_stopped: whether a run was stopped by a signal that did not come through this process.
    """

    def __init__(self, study: Study, states: dict[GridRun, RunState], jobs: int) -> None:
        self.children: list[_Child] = []
        self.num_failed = 0
        self.is_stopped = False
        self._study = study
        self._states = states
        self._jobs = jobs
        self._gpus = visible_gpus()

    def start(self, run: GridRun) -> None:
        """Start or continue a run."""
        slot = min(set(range(self._jobs)) - {child.slot for child in self.children})
        command = [sys.executable, "-m", "lrd.train", str(self._study.base)]
        output = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            [*command, *command_overrides(run)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(run, slot, self._jobs, self._gpus),
            # A Ctrl-C in the terminal goes to this process alone, which passes it on.
            process_group=0,
        )
        self.children.append(_Child(run, slot, process, output))

    def collect(self) -> None:
        """Note the end of each run that has ended.

        Raises:
            UserError: a run ended with an error of the user.
        """
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            with child.output:
                self._note_end(child, child.process.returncode)

    def _note_end(self, child: _Child, status: int) -> None:
        state = read_state(child.run.run_dir)
        self._states[child.run] = state
        if status == EXIT_USER_ERROR:
            lines = [f"{child.run.name}: {line}" for line in child.last_words()]
            raise UserError("\n".join(lines))
        if status == EXIT_STOPPED:
            self.is_stopped = True
        elif status == EXIT_OK:
            seconds = time.monotonic() - child.began
            console.info(f"{child.run.name}: done after {describe_seconds(seconds)}")
        elif state.name == "diverged":
            console.info(f"{child.run.name}: diverged: {state.short_message}")
        else:
            self.num_failed += 1
            reason = [_describe_status(status), *child.last_words()[-1:]]
            console.error(f"{child.run.name}: {': '.join(reason)}")

    def stop(self) -> None:
        """Have all that runs save and leave, and wait for it."""
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            try:
                child.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            child.output.close()
            self._states[child.run] = read_state(child.run.run_dir)
        self.children.clear()


def child_environment(run: GridRun, slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """The environment of a run that shares this host with others.

    Args:
        run: the run.
        slot: its place among those that run at a time, from 0.
        jobs: how many run at a time.
        gpus: what CUDA_VISIBLE_DEVICES may name.
    """
    environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}

    share = max(1, int(available_cores()) // jobs)
    try:
        threads = min(share, int(os.environ["OMP_NUM_THREADS"]))
    except (KeyError, ValueError):
        threads = share
    environment["OMP_NUM_THREADS"] = str(max(1, threads))

    if gpus and run.recipe.trainer.device != "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    num_gpus = torch.cuda.device_count()  # does not begin to use one
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(num_gpus)]
    return [name.strip() for name in named.split(",")][:num_gpus]


@contextmanager
def _lock_runs(study: Study, runs: list[GridRun]) -> Iterator[None]:
    """A context in which no other process can run these runs; several can share a study.

    The lock is on a byte of one file for each run. The kernel releases it when this process ends,
    however it ends.

    Raises:
        UserError: another process has one of them.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    with (study.folder / _LOCK_FILE).open("a+b") as file:
        for run in runs:
            digest = hashlib.sha256(str(run.run_dir.relative_to(study.folder)).encode())
            position = int.from_bytes(digest.digest()[:7], "big")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position)
            except (BlockingIOError, PermissionError):
                raise UserError(
                    f"{run.run_dir}: another `lrd study` is working on this run; "
                    "wait for it, or share the runs with --only i/n"
                ) from None
            except OSError:  # a file system without locks; each run has a lock of its own
                break
        yield


def _describe_status(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
