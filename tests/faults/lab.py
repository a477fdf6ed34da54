"""Trials and what came of them: run two at a time, compared with undisturbed runs, summed up in rows."""

from __future__ import annotations

import random
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .jobs import INTERVAL, End, Job, processes_of

MOST_LOST = INTERVAL + 15  # a checkpoint is written in the background, while steps go on


@dataclass
class Outcome:
    """What came of one trial.

    Attributes:
        times: how often the fault was made.
        expected: what should come of it: `recovered`, `refused`, `stopped`, `unharmed`, ...
        lost, seconds: steps lost, and seconds until steps went on, of each start after a fault.
        state_equal, records_equal: to those of the undisturbed run; None: not to be compared.
        problem: what was not as it should be.
        note: anything worth a word.
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
    """One fault to be made. `act` gets a folder of its own; what it raises is the outcome's problem."""

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
        folder: for the jobs; a trial's own is deleted where nothing was wrong.
        seed: decides about the moments and places of the random faults.
        kills, mutations: how many.
    """

    def __init__(self, folder: Path, seed: int = 0, kills: int = 200, mutations: int = 1000) -> None:
        self.folder, self.seed, self.kills, self.mutations = folder, seed, kills, mutations
        self._undisturbed: dict[tuple[object, ...], tuple[Job, End, float]] = {}
        self.interrupted: dict[int, Job] = {}
        self._lock = threading.RLock()

    def draw(self, *name: object) -> random.Random:
        """A generator of its own for each trial, whatever the order in which they run."""
        return random.Random(f"{self.seed} {name}")

    def undisturbed(self, ranks: int, *overrides: str) -> tuple[Job, End, float]:
        """A run to its end with no fault, its end, and the seconds that its life took. Each is made once."""
        with self._lock:
            key = (ranks, *overrides)
            if key not in self._undisturbed:
                job = Job(self.folder / f"undisturbed-{len(self._undisturbed)}", ranks, *overrides)
                began = time.monotonic()
                job.finish(most_starts=1)
                self._undisturbed[key] = job, End.of(job.run_dir), time.monotonic() - began
            return self._undisturbed[key]

    def compared(self, job: Job, outcome: Outcome, most_lost: int = MOST_LOST) -> Outcome:
        """Fill in what a finished job shows: steps lost, seconds, and whether its end is the undisturbed run's."""
        _, expected, _ = self.undisturbed(job.ranks, *job.overrides)
        end = End.of(job.run_dir)
        outcome.lost += job.steps_lost()
        outcome.seconds += job.seconds_to_running()
        outcome.state_equal = end.state == expected.state
        outcome.records_equal = end.records == expected.records and end.has_every_step_once()
        wrong = [] if outcome.state_equal else ["the final state differs"]
        wrong += [f"a trace-back in {start.output_file}" for start in job.starts if start.has_own_traceback]
        if not outcome.records_equal:
            tags = end.records.keys() | expected.records.keys()
            odd = sorted(tag for tag in tags if end.records.get(tag) != expected.records.get(tag))
            wrong.append(f"TensorBoard differs in {', '.join(odd)}")
        if max(outcome.lost, default=0) > most_lost:
            wrong.append(f"{max(outcome.lost)} steps were lost")
        outcome.problem = "; ".join([outcome.problem, *wrong] if outcome.problem else wrong)
        return outcome

    def run(self, trials: Iterable[Trial], at_once: int = 2) -> Iterator[tuple[Trial, Outcome]]:
        """Each trial with its outcome, as they end."""
        with ThreadPoolExecutor(at_once) as pool:
            running = {pool.submit(self._run, number, trial): trial for number, trial in enumerate(trials)}
            try:
                for done in as_completed(running):
                    yield running[done], done.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _run(self, number: int, trial: Trial) -> Outcome:
        folder = self.folder / f"{re.sub('[^a-z0-9]+', '-', trial.row.lower()).strip('-')}-{number}"
        try:
            outcome = trial.act(folder)
        except Exception as error:  # whatever it is, it is this trial's, and the others go on
            outcome = Outcome(trial.times, problem=f"{type(error).__name__}: {error}")
        for process in processes_of(folder):
            process.kill()
        if not outcome.problem:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            outcome.problem += f" [{folder}]"
        return outcome


def summed_up(outcomes: Iterable[tuple[Trial, Outcome]]) -> list[Row]:
    """A row for each name, in the order of the names."""
    groups: dict[str, list[Outcome]] = {}
    for trial, outcome in outcomes:
        groups.setdefault(trial.row, []).append(outcome)
    return [_row(name, groups[name]) for name in sorted(groups)]


def _row(name: str, outcomes: list[Outcome]) -> Row:
    good = [outcome for outcome in outcomes if not outcome.problem]
    lost = [steps for outcome in outcomes for steps in outcome.lost]
    seconds = [each for outcome in outcomes for each in outcome.seconds]
    return Row(
        name,
        " or ".join(sorted({outcome.expected for outcome in outcomes})),
        sum(outcome.times for outcome in outcomes),
        sum(outcome.times for outcome in good),
        max(outcome.starts for outcome in outcomes),
        max(lost, default=None),
        round(statistics.median(seconds), 1) if seconds else None,
        _share([outcome.state_equal for outcome in outcomes]),
        _share([outcome.records_equal for outcome in outcomes]),
        sorted({outcome.note for outcome in outcomes if outcome.note}),
        [outcome.problem for outcome in outcomes if outcome.problem],
    )


def _share(flags: list[bool | None]) -> str:
    known = [flag for flag in flags if flag is not None]
    return f"{sum(known)}/{len(known)}" if known else ""


def as_json(row: Row) -> dict[str, object]:
    return asdict(row)
