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

from lrd import checkpoint

from .damage import copy_of, damage_one_file
from .jobs import Failure, Job, Start
from .lab import Lab, Outcome, Trial

VICTIMS = {1: ["rank 0"], 2: ["rank 0", "rank 1", "launcher", "all"], 3: ["rank 0", "rank 2", "launcher", "all"]}
KILLS_IN_A_ROW = 5
SHORT, LONG, LONGER = "trainer.epochs=1", "trainer.epochs=4", "trainer.epochs=10"


def random_kills(lab: Lab) -> Iterator[Trial]:
    """A third of the kills for each number of ranks, shared evenly by the victims."""
    for ranks, victims in VICTIMS.items():
        quota = lab.kills // 3 + (ranks <= lab.kills % 3)
        for place, victim in enumerate(victims):
            left = quota // len(victims) + (place < quota % len(victims))
            while left > 0:
                kills = min(left, KILLS_IN_A_ROW)
                row = f"A SIGKILL at random, {ranks} rank(s), {victim}"
                yield Trial(row, partial(kill_at_random, lab, ranks, victim, kills, left), kills)
                left -= kills


def kill_at_random(
    lab: Lab, ranks: int, victim: str, kills: int, number: int, folder: Path, length: str = LONG
) -> Outcome:
    """So many kills in a row on one job; one that ends before its kill is compared, and another job goes on."""
    _, _, life = lab.undisturbed(ranks, length)
    draw = lab.draw("kills", ranks, victim, number)
    outcome = Outcome(0)
    jobs = [Job(folder / "job-0", ranks, length)]
    while outcome.times < kills:
        if kill(jobs[-1].start(), victim, draw.uniform(0, life)):
            outcome.times += 1
        else:
            compared_to_its_end(lab, jobs[-1], outcome)
            jobs.append(Job(folder / f"job-{len(jobs)}", ranks, length))
    outcome.starts = max(outcome.starts, jobs[-1].finish())
    return compared_to_its_end(lab, jobs[-1], outcome)


def compared_to_its_end(lab: Lab, job: Job, outcome: Outcome) -> Outcome:
    status = job.starts[-1].wait()
    if status:
        raise Failure(f"ended with {status}, though nobody disturbed it: {job.starts[-1].tail()}")
    return lab.compared(job, outcome)


def kill(start: Start, victim: str, after: float) -> bool:
    """SIGKILL after so many seconds. Returns whether it was still there.

    A launcher whose rank is killed is waited for. Ranks whose launcher is killed are not: the next start does.
    """
    try:
        start.process.wait(max(0.0, start.began + after - time.monotonic()))
    except psutil.TimeoutExpired:
        start.signal(victim)
        return start.wait() != 0
    return False


def ten_in_a_row(lab: Lab) -> Iterator[Trial]:
    for ranks in (1, 2):
        yield Trial(f"A ten SIGKILLs of one run, {ranks} rank(s)", partial(kill_ten_times, lab, ranks), 10)


def kill_ten_times(lab: Lab, ranks: int, folder: Path) -> Outcome:
    """Each after a few steps more than the life before came to."""
    draw = lab.draw("ten", ranks)
    job = Job(folder, ranks, LONGER)
    for _ in range(10):
        before = job.starts[-1].done if job.starts else 0
        start = job.start()
        start.reach(before + draw.randint(3, 18))
        start.signal("all")
        start.wait()
    return lab.compared(job, Outcome(10, starts=job.finish()))


def save_phases(lab: Lab) -> Iterator[Trial]:
    """Before each thing that a save does to a file: the third save, the first that deletes an older checkpoint."""
    for ranks in (1, 2):
        events = events_of(Job(lab.folder / f"dry-save-{ranks}", ranks, SHORT), "step-00000015", "step-00000020")
        chosen = range(1, len(events) + 1) if ranks == 1 else sorted({1, len(events) // 3, len(events) * 2 // 3})
        for number in chosen:
            row = f"B SIGKILL in the phases of a save, {ranks} rank(s)"
            yield Trial(row, partial(kill_in_save, lab, ranks, number))


def kill_in_save(lab: Lab, ranks: int, number: int, folder: Path) -> Outcome:
    job = Job(folder, ranks, SHORT)
    return killed_at_event(lab, job, number, "step-00000015")


def killed_at_event(lab: Lab, job: Job, number: int, begin: str) -> Outcome:
    status = job.start("kill_at", f"{number}:{begin}").wait()
    if status == 0:
        raise Failure(f"event {number} from {begin} on never came")
    return lab.compared(job, Outcome(starts=job.finish()))


def events_of(job: Job, begin: str, end: str = "no such name") -> list[str]:
    """What one start does under checkpoints/ from the first path that has `begin` in it to the first with `end`."""
    start = job.start("kill_at", f"0:{begin}")
    if start.wait():
        raise Failure(start.tail())
    events = [what.removeprefix("event ") for what, _ in start.marks() if what.startswith("event ")]
    return events[: next((at for at, what in enumerate(events) if end in what), len(events))]


def second_save_phases(lab: Lab) -> Iterator[Trial]:
    """The same in a save that replaces a checkpoint: the evaluation of its step was cut short and is made up for."""
    origin = Job(lab.folder / "cut-short", 1)
    cut_short(origin)
    job = copy_of(origin, lab.folder / "dry-second-save")
    events = events_of(job, ".step-00000029.", ".step-00000030.")
    for number in range(1, len(events) + 1):
        yield Trial(
            "B SIGKILL in the phases of a save that replaces", partial(kill_in_second_save, lab, origin, number)
        )


def cut_short(job: Job) -> None:
    """SIGTERM during the evaluation after the first epoch."""
    start = job.start("slow_evaluation", "0.5")
    start.wait_for(lambda: "evaluation" in dict(start.marks()), "the evaluation")
    start.signal("rank 0", signal.SIGTERM)
    start.expect(75)


def kill_in_second_save(lab: Lab, origin: Job, number: int, folder: Path) -> Outcome:
    return killed_at_event(lab, copy_of(origin, folder), number, ".step-00000029.")


def load_phases(lab: Lab) -> Iterator[Trial]:
    """Before each thing that a start does to the files of checkpoints before its first step."""
    for ranks in (1, 2):
        origin = Job(lab.folder / f"to-load-{ranks}", ranks, SHORT)
        leave_remains(origin, lab.draw("load", ranks))
        job = copy_of(origin, lab.folder / f"dry-load-{ranks}")
        events = events_of(job, "/checkpoints", f".{checkpoint.name(15)}.")
        chosen = range(1, len(events) + 1, 1 if ranks == 1 else max(1, len(events) // 2))
        for number in chosen:
            row = f"B SIGKILL in the phases of a load, {ranks} rank(s)"
            yield Trial(row, partial(kill_in_load, lab, origin, number))


def leave_remains(job: Job, draw: random.Random) -> None:
    """Kill a run, damage its newest checkpoint, and leave what a kill between the renames of a save leaves."""
    start = job.start()
    start.wait_for(lambda: checkpoint.steps(job.run_dir)[-1:] >= [15], "the checkpoint of step 15")
    start.signal("all")
    start.wait()
    for step in [step for step in checkpoint.steps(job.run_dir) if step > 15]:
        shutil.rmtree(checkpoint.path_of(job.run_dir, step))
    older, newest = (checkpoint.path_of(job.run_dir, step) for step in (10, 15))
    shutil.copytree(newest, newest.with_name(".step-00000020.1.tmp"))
    older.rename(older.with_name(".step-00000010.1.old.tmp"))
    damage_one_file(newest / "optimizer.pt", "one bit", draw)


def kill_in_load(lab: Lab, origin: Job, number: int, folder: Path) -> Outcome:
    return killed_at_event(lab, copy_of(origin, folder), number, "/checkpoints")


def twice_in_a_row(lab: Lab) -> Iterator[Trial]:
    for ranks in (1, 2, 3):
        for number in range(3):
            yield Trial("C SIGKILL, and again while it sets up", partial(kill_twice, lab, ranks, number), 2)


def orphans(lab: Lab) -> Iterator[Trial]:
    for ranks in (2, 3):
        yield Trial("A SIGKILL of the launcher while its ranks start", partial(kill_early, lab, ranks))


def kill_early(lab: Lab, ranks: int, folder: Path) -> Outcome:
    """Right after the launcher has started its ranks; none of them may stay."""
    job = Job(folder, ranks)
    start = job.start()
    start.wait_for(lambda: len(start.ranks()) == ranks, "the ranks")
    start.signal("launcher")
    start.wait()
    return lab.compared(job, Outcome(starts=job.finish()))


def kill_twice(lab: Lab, ranks: int, number: int, folder: Path) -> Outcome:
    draw = lab.draw("twice", ranks, number)
    job = Job(folder, ranks)
    first = job.start()
    first.reach(draw.randint(6, 45))
    set_up = first.lives()[0][0][1] - first.began
    first.signal("all")
    first.wait()
    if not kill(job.start(), "all", draw.uniform(0.3, 1.0) * set_up):
        raise Failure("the second start ended before it was killed")
    return lab.compared(job, Outcome(2, starts=job.finish()))
