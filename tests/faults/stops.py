"""Signals that ask a run to stop, and ranks that stand still."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .jobs import Failure, Job, Start
from .lab import Lab, Outcome, Trial

STOPPED = 75  # of a rank
SECONDS_TO_LEAVE = 30.0
TIMEOUT = "trainer.timeout_minutes=0.1"
WANTED = {1: ["rank 0"], 2: ["rank 0", "rank 1", "ranks"]}


def signals(lab: Lab) -> Iterator[Trial]:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for ranks, victims in WANTED.items():
            for victim in victims:
                row = f"D {number.name} to {victim} of {ranks}"
                yield Trial(row, partial(stop_by_signal, lab, ranks, victim, number))
    for number in (signal.SIGTERM, signal.SIGINT):
        yield Trial(f"D {number.name} to the launcher", partial(stop_by_signal, lab, 2, "launcher", number))
    for ranks in (1, 2):
        yield Trial(f"D SIGTERM in an evaluation, {ranks} rank(s)", partial(stop_evaluation, lab, ranks))
        yield Trial("D SIGTERM in the last evaluation", partial(stop_last_evaluation, lab, ranks))
    yield Trial("D a second SIGTERM", partial(stop_twice, lab))


def stop_by_signal(lab: Lab, ranks: int, victim: str, number: signal.Signals, folder: Path) -> Outcome:
    job = Job(folder, ranks)
    start = job.start()
    start.reach(lab.draw("signal", victim, number).randint(6, 40))
    start.signal(victim, number)
    leaves(start, number, is_told_by_launcher=victim == "launcher")
    return without_loss(lab, job)


def leaves(start: Start, number: signal.Signals, is_told_by_launcher: bool = False) -> None:
    """It saves and leaves in time, with its status and a line."""
    if is_told_by_launcher:
        start.wait(SECONDS_TO_LEAVE)  # a launcher that was asked to stop does not tell its ranks' statuses
    else:
        start.expect(STOPPED, seconds=SECONDS_TO_LEAVE)
    allowed = (number, signal.SIGTERM)  # a launcher passes SIGINT on as it is, or ends its ranks by SIGTERM
    if not any(f"stopped by signal {each:d} after step" in start.output for each in allowed):
        raise Failure(f"does not say that it was stopped: {start.tail()}")


def without_loss(lab: Lab, job: Job) -> Outcome:
    outcome = lab.compared(job, Outcome(starts=job.finish(most_starts=1)))
    if any(outcome.lost):
        outcome.problem += f"steps lost: {outcome.lost}"
    return outcome


def stop_evaluation(lab: Lab, ranks: int, folder: Path, *overrides: str) -> Outcome:
    job = Job(folder, ranks, *overrides)
    start = job.start("slow_evaluation", "1")
    start.wait_for(lambda: "evaluation" in dict(start.marks()), "the evaluation")
    time.sleep(1.5)
    start.signal("rank 0", signal.SIGTERM)
    leaves(start, signal.SIGTERM)
    return without_loss(lab, job)


def stop_last_evaluation(lab: Lab, ranks: int, folder: Path) -> Outcome:
    return stop_evaluation(lab, ranks, folder, "trainer.epochs=1")


def stop_twice(lab: Lab, folder: Path) -> Outcome:
    """The second signal ends it at once, three seconds after the first."""
    job = Job(folder, 1)
    start = job.start("slow_evaluation", "30")
    start.wait_for(lambda: "evaluation" in dict(start.marks()), "the evaluation")
    start.signal("rank 0", signal.SIGTERM)
    time.sleep(3)
    start.signal("rank 0", signal.SIGTERM)
    status = start.wait(5)
    if status != -signal.SIGTERM:
        raise Failure(f"a second signal ended it with {status}: {start.tail()}")
    return lab.compared(job, Outcome(starts=job.finish(most_starts=1)))


def standstills(lab: Lab) -> Iterator[Trial]:
    for rank in (1, 0):
        yield Trial(f"E SIGSTOP of rank {rank} of 2", partial(stand_still, lab, rank))
    yield Trial("E SIGSTOP and SIGCONT within the timeout", partial(stand_still_for_a_while, lab))


def stand_still(lab: Lab, rank: int, folder: Path) -> Outcome:
    """The other rank says who is missing; the launcher ends the one that stands still 30 s later."""
    job = Job(folder, 2)
    start = job.start("none", "-", TIMEOUT)
    start.reach(20)
    start.signal(f"rank {rank}", signal.SIGSTOP)
    start.expect(1, f"rank {rank}")
    return lab.compared(job, Outcome(starts=job.finish(most_starts=1)))


def stand_still_for_a_while(lab: Lab, folder: Path) -> Outcome:
    job = Job(folder, 2)
    start = job.start("none", "-", TIMEOUT)
    start.reach(20)
    start.signal("rank 1", signal.SIGSTOP)
    time.sleep(3)
    start.signal("rank 1", signal.SIGCONT)
    start.expect(0)
    return lab.compared(job, Outcome(expected="unharmed"))
