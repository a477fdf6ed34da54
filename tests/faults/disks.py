"""Full and read-only file systems: tmpfs, where one may mount."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from lrd import checkpoint

from .jobs import Failure, Job, Start
from .lab import Lab, Outcome, Trial

USER_ERROR = 2
MEGABYTES = 8
STOP = "checkpoint.on_error=stop"


class NoPrivilege(Exception):
    """One may not mount here."""


def disks(lab: Lab) -> Iterator[Trial]:
    for ranks in (1, 2):
        trials = {
            "H a full disk, room again later": full_for_a_while,
            "H a full disk until the end": full_until_the_end,
            "H a full disk, on_error=stop": full_and_stop,
            "H checkpoints/ read-only for a while": read_only_for_a_while,
            "H a start in a read-only folder": read_only_from_the_start,
        }
        for row, act in trials.items():
            yield Trial(row, partial(where_one_may_mount, act, lab, ranks))


def where_one_may_mount(act: object, lab: Lab, ranks: int, folder: Path) -> Outcome:
    try:
        return act(lab, ranks, folder)  # type: ignore[operator]
    except NoPrivilege as error:
        return Outcome(0, expected="not run", note=f"not run: no privilege to mount ({error})")


@contextmanager
def mounted(place: Path) -> Iterator[None]:
    place.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoPrivilege(str(error)) from None
    if done.returncode:
        raise NoPrivilege(done.stderr.strip())


def fill(place: Path) -> Path:
    """A file that leaves no byte."""
    filler = place / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    return filler


def filled(job: Job, start: Start) -> tuple[Path, list[int]]:
    """Fill the disk once there are checkpoints. Returns the filler, and the steps of the checkpoints then."""
    start.wait_for(lambda: len(checkpoint.steps(job.run_dir)) > 1, "two checkpoints")
    filler = fill(job.run_dir)
    return filler, checkpoint.steps(job.run_dir)


def complains(start: Start, count: int) -> None:
    start.wait_for(lambda: len(start.complaints) >= count, f"{count} complaints")


def whole(job: Job, steps: list[int]) -> None:
    """Those that are still needed of some checkpoints are untouched."""
    bad = [step for step in steps[-2:] if checkpoint.damage(checkpoint.path_of(job.run_dir, step))]
    if bad:
        raise Failure(f"the checkpoints of steps {bad} are no longer whole")


def full_for_a_while(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks)
    with mounted(job.run_dir):
        start = job.start()
        filler, steps = filled(job, start)
        complains(start, 2)
        whole(job, steps)
        filler.unlink()
        if start.wait():
            raise Failure(start.tail())
        refuse_repetition(start)
        return lab.compared(job, Outcome(expected="went on"))


def refuse_repetition(start: Start) -> None:
    """One line for each checkpoint that failed."""
    if len(set(start.complaints)) != len(start.complaints) or not all("step" in line for line in start.complaints):
        raise Failure(f"not one line for each checkpoint: {start.complaints}")


def full_until_the_end(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks)
    with mounted(job.run_dir):
        start = job.start()
        filler, steps = filled(job, start)
        start.expect(USER_ERROR)
        if "is not saved" not in start.complaints[-1]:
            raise Failure(f"does not say that the end is not saved: {start.tail()}")
        whole(job, steps)
        filler.unlink()
        return after_what_was_lost(lab, job)


def after_what_was_lost(lab: Lab, job: Job) -> Outcome:
    """Many steps were done since the last checkpoint that could be written; no bound on those is kept to."""
    return lab.compared(job, Outcome(expected="stopped", starts=job.finish(most_starts=1)), most_lost=10**6)


def full_and_stop(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks, STOP)
    with mounted(job.run_dir):
        start = job.start()
        filler, steps = filled(job, start)
        start.expect(USER_ERROR, "checkpoint")
        whole(job, steps)
        filler.unlink()
        return lab.compared(job, Outcome(expected="stopped", starts=job.finish(most_starts=1)))


def read_only_for_a_while(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks)
    place = checkpoint.folder(job.run_dir)
    with mounted(place):
        start = job.start()
        start.wait_for(lambda: len(checkpoint.steps(job.run_dir)) > 1, "two checkpoints")
        remount_read_only(place)
        steps = checkpoint.steps(job.run_dir)
        complains(start, 2)
        whole(job, steps)
        mount("-o", "remount,rw", str(place))
        if start.wait():
            raise Failure(start.tail())
        refuse_repetition(start)
        return lab.compared(job, Outcome(expected="went on"))


def remount_read_only(place: Path) -> None:
    """Once no file is open for writing there: the kernel refuses before."""
    for _ in range(500):
        with suppress(NoPrivilege):
            mount("-o", "remount,ro", str(place))
            return
        time.sleep(0.005)
    raise Failure(f"{place} could not be made read-only")


def read_only_from_the_start(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks)
    with mounted(job.run_dir):
        mount("-o", "remount,ro", str(job.run_dir))
        job.start().expect(USER_ERROR, str(job.run_dir))
        mount("-o", "remount,rw", str(job.run_dir))
        return lab.compared(job, Outcome(expected="refused", starts=job.finish(most_starts=1)))
