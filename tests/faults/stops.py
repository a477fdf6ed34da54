"""Signals that ask a run to stop, and ranks that stand still."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lrd.errors import EXIT_STOPPED, RunError

from .jobs import Failure, Job, Start
from .lab import Lab, Outcome, Trial

SECONDS_TO_STOP = 30.0
TIMEOUT = "trainer.timeout_minutes=0.1"
VICTIMS = {1: ["rank 0"], 2: ["rank 0", "rank 1", "ranks"]}  # by the number of ranks


def signals(lab: Lab) -> Iterator[Trial]:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for ranks, victims in VICTIMS.items():
            for victim in victims:
                row = f"D {number.name} to {victim} of {ranks}"
                yield Trial(row, partial(stop_by_signal, lab, ranks, victim, number))
    for number in (signal.SIGTERM, signal.SIGINT):
        row = f"D {number.name} to the launcher"
        yield Trial(row, partial(stop_by_signal, lab, 2, "launcher", number))

    for ranks in (1, 2):
        row = f"D SIGTERM in an evaluation, {ranks} rank(s)"
        yield Trial(row, partial(stop_evaluation, lab, ranks))
        yield Trial("D SIGTERM in the last evaluation", partial(stop_last_evaluation, lab, ranks))
    yield Trial("D a second SIGTERM", partial(stop_twice, lab))


def stop_by_signal(
    lab: Lab, ranks: int, victim: str, number: signal.Signals, folder: Path
) -> Outcome:
    job = Job(folder, ranks)
    start = job.start()
    start.wait_for_step(lab.draw("signal", victim, number).randint(6, 40))
    start.signal(victim, number)
    require_stop(start, number, is_sent_to_launcher=victim == "launcher")
    return finish_without_loss(lab, job)


def require_stop(start: Start, number: signal.Signals, is_sent_to_launcher: bool = False) -> None:
    """Wait until it has saved and stopped in time, with its status and a line."""
    if is_sent_to_launcher:
        # A launcher that was asked to stop does not report the exit statuses of its ranks.
        start.wait(SECONDS_TO_STOP)
    else:
        start.wait_for_error(EXIT_STOPPED, seconds=SECONDS_TO_STOP)

    # A launcher passes SIGINT on as it is, or ends its ranks by SIGTERM.
    lines = [f"stopped by signal {sent:d} after step" for sent in (number, signal.SIGTERM)]
    if not any(line in start.output for line in lines):
        raise Failure(f"does not report that it was stopped: {start.tail()}")


def finish_without_loss(lab: Lab, job: Job) -> Outcome:
    outcome = lab.finish_and_compare(job)
    if any(outcome.lost):
        outcome.problem += f"steps lost: {outcome.lost}"
    return outcome


def stop_evaluation(lab: Lab, ranks: int, folder: Path, *overrides: str) -> Outcome:
    job = Job(folder, ranks, *overrides)
    start = job.start("slow_evaluation", "1")
    start.wait_for(lambda: "evaluation" in dict(start.marks()), "the evaluation")
    time.sleep(1.5)
    start.signal("rank 0", signal.SIGTERM)
    require_stop(start, signal.SIGTERM)
    return finish_without_loss(lab, job)


def stop_last_evaluation(lab: Lab, ranks: int, folder: Path) -> Outcome:
    return stop_evaluation(lab, ranks, folder, "trainer.epochs=1")


def stop_twice(lab: Lab, folder: Path) -> Outcome:
    """A second signal, three seconds after the first, ends the run at once."""
    job = Job(folder, 1)
    start = job.start("slow_evaluation", "30")
    start.wait_for(lambda: "evaluation" in dict(start.marks()), "the evaluation")
    start.signal("rank 0", signal.SIGTERM)
    time.sleep(3)
    start.signal("rank 0", signal.SIGTERM)
    status = start.wait(5)
    if status != -signal.SIGTERM:
        raise Failure(f"a second signal ended it with {status}: {start.tail()}")
    return lab.finish_and_compare(job)


def standstills(lab: Lab) -> Iterator[Trial]:
    for rank in (1, 0):
        yield Trial(f"E SIGSTOP of rank {rank} of 2", partial(stand_still, lab, rank))
    row = "E SIGSTOP and SIGCONT within the timeout"
    yield Trial(row, partial(stand_still_for_a_while, lab))


def stand_still(lab: Lab, rank: int, folder: Path) -> Outcome:
    """The other rank names the one that stands still, which the launcher kills 30 s later."""
    job = Job(folder, 2)
    start = job.start("none", "-", TIMEOUT)
    start.wait_for_step(20)
    start.signal(f"rank {rank}", signal.SIGSTOP)
    start.wait_for_error(RunError.status, f"rank {rank}")
    return lab.finish_and_compare(job)


def stand_still_for_a_while(lab: Lab, folder: Path) -> Outcome:
    job = Job(folder, 2)
    start = job.start("none", "-", TIMEOUT)
    start.wait_for_step(20)
    start.signal("rank 1", signal.SIGSTOP)
    time.sleep(3)
    start.signal("rank 1", signal.SIGCONT)
    start.wait_for_success()
    return lab.compare(job, Outcome(expected="unharmed"))
