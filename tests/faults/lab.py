"""Runs trials, two at a time, compares them with undisturbed runs, and sums them up in rows."""

from __future__ import annotations

import random
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from .jobs import INTERVAL, End, Job, processes_of

# Steps go on while a checkpoint is written in the background.
MAX_LOST = INTERVAL + 15
NO_LIMIT = 10**6


@dataclass
class Outcome:
    """What came of one trial.

    Attributes:
        times: how often the fault was made.
        expected: what should come of it: `recovered`, `refused`, `stopped`, `unharmed`, ...
        lost: steps lost at each start after a fault.
        seconds: until steps went on, for each start after a fault.
        starts: how many it took to finish the run.
        state_equal: whether the final state equals the undisturbed run's; None: not compared.
        records_equal: the same of TensorBoard's records.
        problem: what was not as it should be; empty: nothing.
        note: anything worth knowing.
    """

    times: int = 1
    expected: str = "recovered"
    lost: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    starts: int = 1
    state_equal: bool | None = None
    records_equal: bool | None = None
    problem: str = ""
    note: str = ""


@dataclass
class Trial:
    """One fault to make.

    Attributes:
        row: the name of the row that sums up all trials of this kind.
        act: makes the fault in a folder of its own. If it raises, that is the outcome's problem.
        times: how often it makes the fault.
    """

    row: str
    act: Callable[[Path], Outcome]
    times: int = 1


@dataclass
class Row:
    """What came of all trials of one name."""

    fault: str
    expected: str
    times: int = 0
    as_expected: int = 0
    most_starts: int = 0
    steps_lost_max: int | None = None
    seconds_to_running_median: float | None = None
    state_equal: str = ""
    records_equal: str = ""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Lab:
    """Where trials are made.

    Args:
        folder: for the jobs. The folder of a trial is deleted if nothing was wrong.
        seed: decides the moments and places of random faults.
        kills: how many random kills.
        mutations: how many random mutations.

    Attributes:
        interrupted: by the number of ranks, jobs that were killed; see `damage.interrupted`.
    """

    def __init__(
        self, folder: Path, seed: int = 0, kills: int = 200, mutations: int = 1000
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.kills = kills
        self.mutations = mutations
        self.interrupted: dict[int, Job] = {}

        self._undisturbed: dict[tuple[object, ...], tuple[End, float]] = {}
        self._lock = threading.RLock()

    def draw(self, *name: object) -> random.Random:
        """Make a trial's random generator; it does not depend on the order of the trials."""
        return random.Random(f"{self.seed} {name}")

    def undisturbed(self, ranks: int, *overrides: str) -> tuple[End, float]:
        """Run a job to its end with no fault; each is run once.

        Returns:
            How it ended, and the seconds that it took.
        """
        with self._lock:
            key = (ranks, *overrides)
            if key not in self._undisturbed:
                job = Job(self.folder / f"undisturbed-{len(self._undisturbed)}", ranks, *overrides)
                began = time.monotonic()
                job.finish(max_starts=1)
                end = End.read(job.run_dir)
                self._undisturbed[key] = (end, time.monotonic() - began)
            return self._undisturbed[key]

    def compare(self, job: Job, outcome: Outcome, max_lost: int = MAX_LOST) -> Outcome:
        """Compare a finished job with the undisturbed one.

        Args:
            outcome: is filled in.
            max_lost: steps that a start may lose.

        Returns:
            The outcome.
        """
        expected_end, _ = self.undisturbed(job.ranks, *job.overrides)
        end = End.read(job.run_dir)
        outcome.lost += job.steps_lost()
        outcome.seconds += job.seconds_to_running()
        outcome.state_equal = end.state == expected_end.state
        outcome.records_equal = end.records == expected_end.records and end.has_every_step_once()

        problems = [outcome.problem] if outcome.problem else []
        if not outcome.state_equal:
            problems.append("the final state differs")
        for start in job.starts:
            if start.has_lrd_traceback:
                problems.append(f"a traceback in {start.output_file}")
        if not outcome.records_equal:
            tags = sorted(end.records.keys() | expected_end.records.keys())
            different = [
                tag for tag in tags if end.records.get(tag) != expected_end.records.get(tag)
            ]
            problems.append(f"TensorBoard differs in {', '.join(different)}")
        if max(outcome.lost, default=0) > max_lost:
            problems.append(f"{max(outcome.lost)} steps were lost")

        outcome.problem = "; ".join(problems)
        return outcome

    def finish_and_compare(
        self, job: Job, expected: str = "recovered", max_lost: int = MAX_LOST
    ) -> Outcome:
        """Finish a job by one start, and compare it with the undisturbed one."""
        outcome = Outcome(expected=expected, starts=job.finish(max_starts=1))
        return self.compare(job, outcome, max_lost)

    def run(
        self, trials: Iterable[Trial], num_parallel: int = 2
    ) -> Iterator[tuple[Trial, Outcome]]:
        """Yield each trial with its outcome, in the order in which they end."""
        with ThreadPoolExecutor(num_parallel) as pool:
            running = {
                pool.submit(self._run, number, trial): trial for number, trial in enumerate(trials)
            }
            try:
                for done in as_completed(running):
                    yield running[done], done.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _run(self, number: int, trial: Trial) -> Outcome:
        name = re.sub("[^a-z0-9]+", "-", trial.row.lower()).strip("-")
        folder = self.folder / f"{name}-{number}"
        try:
            outcome = trial.act(folder)
        except Exception as error:  # of whatever kind: the other trials go on
            outcome = Outcome(trial.times, problem=f"{type(error).__name__}: {error}")

        for process in processes_of(folder):
            process.kill()
        if outcome.problem:
            outcome.problem += f" [{folder}]"
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return outcome


def sum_up(outcomes: Iterable[tuple[Trial, Outcome]]) -> list[Row]:
    """Make a row for each name, in alphabetical order."""
    outcomes_by_name: dict[str, list[Outcome]] = {}
    for trial, outcome in outcomes:
        outcomes_by_name.setdefault(trial.row, []).append(outcome)
    return [_make_row(name, outcomes_by_name[name]) for name in sorted(outcomes_by_name)]


def _make_row(name: str, outcomes: list[Outcome]) -> Row:
    as_expected = [outcome for outcome in outcomes if not outcome.problem]
    lost = [steps for outcome in outcomes for steps in outcome.lost]
    seconds = [value for outcome in outcomes for value in outcome.seconds]
    return Row(
        fault=name,
        expected=" or ".join(sorted({outcome.expected for outcome in outcomes})),
        times=sum(outcome.times for outcome in outcomes),
        as_expected=sum(outcome.times for outcome in as_expected),
        most_starts=max(outcome.starts for outcome in outcomes),
        steps_lost_max=max(lost, default=None),
        seconds_to_running_median=round(statistics.median(seconds), 1) if seconds else None,
        state_equal=_share_of_true([outcome.state_equal for outcome in outcomes]),
        records_equal=_share_of_true([outcome.records_equal for outcome in outcomes]),
        notes=sorted({outcome.note for outcome in outcomes if outcome.note}),
        problems=[outcome.problem for outcome in outcomes if outcome.problem],
    )


def _share_of_true(flags: list[bool | None]) -> str:
    """As `true/all`, without those that were not compared."""
    compared = [flag for flag in flags if flag is not None]
    return f"{sum(compared)}/{len(compared)}" if compared else ""
