"""SIGKILL: at random moments, in the phases of a save and of a load, twice in a row."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from lrd.checkpoint import store
from lrd.errors import EXIT_STOPPED

from .damage import copy_of, damage_file
from .jobs import Failure, Job, Start
from .lab import Lab, Outcome, Trial

VICTIMS = {
    1: ["rank 0"],
    2: ["rank 0", "rank 1", "launcher", "all"],
    3: ["rank 0", "rank 2", "launcher", "all"],
}  # by the number of ranks
KILLS_IN_A_ROW = 5

# Lengths of a job, as overrides of the recipe.
SHORT = "trainer.epochs=1"
LONG = "trainer.epochs=4"
LONGER = "trainer.epochs=10"


def random_kills(lab: Lab) -> Iterator[Trial]:
    """A third of the kills for each number of ranks, shared evenly by the victims."""
    for ranks, victims in VICTIMS.items():
        kills_with_ranks = lab.kills // 3 + (ranks <= lab.kills % 3)
        for index, victim in enumerate(victims):
            left = kills_with_ranks // len(victims) + (index < kills_with_ranks % len(victims))
            while left > 0:
                kills = min(left, KILLS_IN_A_ROW)
                row = f"A SIGKILL at random, {ranks} rank(s), {victim}"
                yield Trial(row, partial(kill_at_random, lab, ranks, victim, kills, left), kills)
                left -= kills


def kill_at_random(
    lab: Lab,
    ranks: int,
    victim: str,
    kills: int,
    number: int,
    folder: Path,
    length: str = LONG,
    overrides: tuple[str, ...] = (),
) -> Outcome:
    """Kill a job several times in a row.

    If the job ends before it is killed, it is compared, and another job takes its place.

    Args:
        victim: see `Start.signal`.
        kills: how many.
        number: tells this trial's random moments from those of others.
        length: of the job.
        overrides: further ones of the recipe.
    """
    _, seconds = lab.undisturbed(ranks, length, *overrides)
    draw = lab.draw("kills", ranks, victim, number)
    outcome = Outcome(times=0)

    jobs = [Job(folder / "job-0", ranks, length, *overrides)]
    while outcome.times < kills:
        if kill(jobs[-1].start(), victim, draw.uniform(0, seconds)):
            outcome.times += 1
        else:
            require_success_and_compare(lab, jobs[-1], outcome)
            jobs.append(Job(folder / f"job-{len(jobs)}", ranks, length, *overrides))

    outcome.starts = max(outcome.starts, jobs[-1].finish())
    return require_success_and_compare(lab, jobs[-1], outcome)


def require_success_and_compare(lab: Lab, job: Job, outcome: Outcome) -> Outcome:
    """Compare a job whose last start was not disturbed."""
    status = job.starts[-1].wait()
    if status:
        raise Failure(f"ended with {status}, though nothing disturbed it: {job.starts[-1].tail()}")
    return lab.compare(job, outcome)


def kill(start: Start, victim: str, seconds: float) -> bool:
    """Send SIGKILL some seconds after the start.

    A launcher whose rank is killed is waited for. Ranks whose launcher is killed are not: the next
    start waits for them.

    Returns:
        Whether it was still running.
    """
    try:
        start.process.wait(max(0.0, start.began + seconds - time.monotonic()))
    except psutil.TimeoutExpired:
        start.signal(victim)
        return start.wait() != 0
    return False


def ten_in_a_row(lab: Lab) -> Iterator[Trial]:
    for ranks in (1, 2):
        row = f"A ten SIGKILLs of one run, {ranks} rank(s)"
        yield Trial(row, partial(kill_ten_times, lab, ranks), 10)


def kill_ten_times(lab: Lab, ranks: int, folder: Path) -> Outcome:
    """Each start does a few steps more than the one before, and is killed."""
    draw = lab.draw("ten", ranks)
    job = Job(folder, ranks, LONGER)
    for _ in range(10):
        step_before = job.starts[-1].last_step if job.starts else 0
        start = job.start()
        start.wait_for_step(step_before + draw.randint(3, 18))
        start.signal("all")
        start.wait()
    return lab.compare(job, Outcome(10, starts=job.finish()))


def save_phases(lab: Lab) -> Iterator[Trial]:
    """Before each operation on a file that the third save does, the first that deletes another."""
    for ranks in (1, 2):
        dry_job = Job(lab.folder / f"dry-save-{ranks}", ranks, SHORT)
        num_events = len(events_of(dry_job, "step-00000015", "step-00000020"))
        chosen = range(1, num_events + 1)
        if ranks > 1:
            chosen = sorted({1, num_events // 3, num_events * 2 // 3})

        for number in chosen:
            row = f"B SIGKILL in the phases of a save, {ranks} rank(s)"
            yield Trial(row, partial(kill_in_save, lab, ranks, number))


def kill_in_save(lab: Lab, ranks: int, number: int, folder: Path) -> Outcome:
    return kill_at_event(lab, Job(folder, ranks, SHORT), number, "step-00000015")


def kill_at_event(lab: Lab, job: Job, number: int, first: str) -> Outcome:
    """Kill rank 0 before an operation on a file under checkpoints/.

    Args:
        number: of the operation, from 1.
        first: the operations are counted from the first on a path that contains this.
    """
    status = job.start("kill_at", f"{number}:{first}").wait()
    if status == 0:
        raise Failure(f"operation {number} from {first} on never came")
    return lab.compare(job, Outcome(starts=job.finish()))


def events_of(job: Job, first: str, end: str = "no such name") -> list[str]:
    """List the operations of one start on files under checkpoints/.

    Args:
        first: from the first on a path that contains this.
        end: before the first on a path that contains this.
    """
    start = job.start("kill_at", f"0:{first}")
    start.wait_for_success()

    events = []
    for what, _ in start.marks():
        if what.startswith("event "):
            if end in what:
                break
            events.append(what)
    return events


def second_save_phases(lab: Lab) -> Iterator[Trial]:
    """The same in a save that replaces a checkpoint.

    The evaluation of that checkpoint's step was cut short, and is made up for.
    """
    origin = Job(lab.folder / "cut-short", 1)
    cut_evaluation_short(origin)
    dry_job = copy_of(origin, lab.folder / "dry-second-save")
    num_events = len(events_of(dry_job, ".step-00000029.", ".step-00000030."))

    for number in range(1, num_events + 1):
        row = "B SIGKILL in the phases of a save that replaces a checkpoint of the same step"
        yield Trial(row, partial(kill_in_second_save, lab, origin, number))


def cut_evaluation_short(job: Job) -> None:
    """Send SIGTERM during the evaluation after the first epoch."""
    start = job.start("slow_evaluation", "0.5")
    start.wait_for(lambda: "evaluation" in dict(start.marks()), "the evaluation")
    start.signal("rank 0", signal.SIGTERM)
    start.wait_for_error(EXIT_STOPPED)


def kill_in_second_save(lab: Lab, origin: Job, number: int, folder: Path) -> Outcome:
    return kill_at_event(lab, copy_of(origin, folder), number, ".step-00000029.")


def load_phases(lab: Lab) -> Iterator[Trial]:
    """Before each operation on the files of checkpoints that a start does before its first step."""
    for ranks in (1, 2):
        origin = Job(lab.folder / f"to-load-{ranks}", ranks, SHORT)
        leave_remains(origin, lab.draw("load", ranks))
        dry_job = copy_of(origin, lab.folder / f"dry-load-{ranks}")
        num_events = len(events_of(dry_job, "/checkpoints", f".{store.checkpoint_name(15)}."))

        interval = 1 if ranks == 1 else max(1, num_events // 2)
        for number in range(1, num_events + 1, interval):
            row = f"B SIGKILL in the phases of a load, {ranks} rank(s)"
            yield Trial(row, partial(kill_in_load, lab, origin, number))


def leave_remains(job: Job, draw: random.Random) -> None:
    """Kill a run, damage its newest checkpoint, and leave what a kill in a save leaves."""
    start = job.start()
    start.wait_for(lambda: store.list_steps(job.run_dir)[-1:] >= [15], "the checkpoint of step 15")
    start.signal("all")
    start.wait()
    for step in store.list_steps(job.run_dir):
        if step > 15:
            shutil.rmtree(store.checkpoint_path(job.run_dir, step))

    # As if it had been killed between the renames of a save.
    older = store.checkpoint_path(job.run_dir, 10)
    newest = store.checkpoint_path(job.run_dir, 15)
    shutil.copytree(newest, newest.with_name(".step-00000020.1.tmp"))
    older.rename(older.with_name(".step-00000010.1.old.tmp"))
    damage_file(newest / "optimizer.pt", "one bit", draw)


def kill_in_load(lab: Lab, origin: Job, number: int, folder: Path) -> Outcome:
    return kill_at_event(lab, copy_of(origin, folder), number, "/checkpoints")


def orphans(lab: Lab) -> Iterator[Trial]:
    for ranks in (2, 3):
        row = "A SIGKILL of the launcher while its ranks start"
        yield Trial(row, partial(kill_launcher_early, lab, ranks))


def kill_launcher_early(lab: Lab, ranks: int, folder: Path) -> Outcome:
    """Kill the launcher right after it has started its ranks; none of them may stay."""
    job = Job(folder, ranks)
    start = job.start()
    start.wait_for(lambda: len(start.ranks()) == ranks, "the ranks")
    start.signal("launcher")
    start.wait()
    return lab.compare(job, Outcome(starts=job.finish()))


def twice_in_a_row(lab: Lab) -> Iterator[Trial]:
    for ranks in (1, 2, 3):
        for number in range(3):
            row = "C SIGKILL, and again while the restarted run sets up"
            yield Trial(row, partial(kill_twice, lab, ranks, number), 2)


def kill_twice(lab: Lab, ranks: int, number: int, folder: Path) -> Outcome:
    draw = lab.draw("twice", ranks, number)
    job = Job(folder, ranks)
    first_start = job.start()
    first_start.wait_for_step(draw.randint(6, 45))
    _, was_set_up = first_start.lives()[0][0]
    seconds_to_set_up = was_set_up - first_start.began
    first_start.signal("all")
    first_start.wait()

    if not kill(job.start(), "all", draw.uniform(0.3, 1.0) * seconds_to_set_up):
        raise Failure("the second start ended before it was killed")
    return lab.compare(job, Outcome(2, starts=job.finish()))
