"""Full and read-only file systems; these are tmpfs, and need the privilege to mount."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from lrd.checkpoint import store
from lrd.errors import UserError

from .jobs import Failure, Job, Start
from .lab import NO_LIMIT, Lab, Outcome, Trial

MEGABYTES = 8
STOP = "checkpoint.on_error=stop"


class NoPrivilege(Exception):
    """This process may not mount here."""


def disks(lab: Lab) -> Iterator[Trial]:
    trials = {
        "H a full disk, room again later": full_for_a_while,
        "H a full disk until the end": full_until_the_end,
        "H a full disk, on_error=stop": full_and_stop,
        "H checkpoints/ read-only for a while": read_only_for_a_while,
        "H a start in a read-only folder": read_only_from_the_start,
    }
    for ranks in (1, 2):
        for row, act in trials.items():
            yield Trial(row, partial(run_if_mounting_works, act, lab, ranks))


def run_if_mounting_works(
    act: Callable[[Lab, int, Path], Outcome], lab: Lab, ranks: int, folder: Path
) -> Outcome:
    try:
        return act(lab, ranks, folder)
    except NoPrivilege as error:
        return Outcome(0, expected="not run", note=f"not run: no privilege to mount ({error})")


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """Mount a small disk on a new folder."""
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoPrivilege(str(error)) from None
    if done.returncode:
        raise NoPrivilege(done.stderr.strip())


def remount_read_only(folder: Path) -> None:
    # The kernel refuses as long as a file is open for writing there.
    for _ in range(500):
        with suppress(NoPrivilege):
            mount("-o", "remount,ro", str(folder))
            return
        time.sleep(0.005)
    raise Failure(f"{folder} could not be made read-only")


def fill(folder: Path) -> Path:
    """Write a file that leaves no byte free. Returns its path."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def fill_after_two_checkpoints(job: Job, start: Start) -> tuple[Path, list[int]]:
    """Fill the disk once there are two checkpoints.

    Returns:
        The file that fills it, and the steps of the checkpoints at that moment.
    """
    start.wait_for(lambda: len(store.list_steps(job.run_dir)) > 1, "two checkpoints")
    filler = fill(job.run_dir)
    return filler, store.list_steps(job.run_dir)


def wait_for_lrd_lines(start: Start, count: int) -> None:
    start.wait_for(lambda: len(start.lrd_lines) >= count, f"{count} lines of errors")


def require_intact(job: Job, steps: list[int]) -> None:
    """Raise Failure if one of the last two of some checkpoints is damaged; older ones may go."""
    damaged = [
        step for step in steps[-2:] if store.find_damage(store.checkpoint_path(job.run_dir, step))
    ]
    if damaged:
        raise Failure(f"the checkpoints of steps {damaged} are no longer intact")


def require_one_line_a_checkpoint(start: Start) -> None:
    """Raise Failure unless each checkpoint that failed has one line."""
    lines = start.lrd_lines
    if len(set(lines)) != len(lines) or not all("step" in line for line in lines):
        raise Failure(f"not one line for each checkpoint: {lines}")


def full_for_a_while(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks)
    with mounted(job.run_dir):
        start = job.start()
        filler, steps = fill_after_two_checkpoints(job, start)
        wait_for_lrd_lines(start, 2)
        require_intact(job, steps)

        filler.unlink()
        start.wait_for_success()
        require_one_line_a_checkpoint(start)
        return lab.compare(job, Outcome(expected="went on"))


def full_until_the_end(lab: Lab, ranks: int, folder: Path) -> Outcome:
    """All steps since the last checkpoint that could be written are lost, however many."""
    job = Job(folder, ranks)
    with mounted(job.run_dir):
        start = job.start()
        filler, steps = fill_after_two_checkpoints(job, start)
        start.wait_for_error(UserError.status)
        if "is not saved" not in start.lrd_lines[-1]:
            raise Failure(f"does not report that the end is not saved: {start.tail()}")
        require_intact(job, steps)

        filler.unlink()
        return lab.finish_and_compare(job, "stopped", max_lost=NO_LIMIT)


def full_and_stop(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks, STOP)
    with mounted(job.run_dir):
        start = job.start()
        filler, steps = fill_after_two_checkpoints(job, start)
        start.wait_for_error(UserError.status, "checkpoint")
        require_intact(job, steps)

        filler.unlink()
        return lab.finish_and_compare(job, "stopped")


def read_only_for_a_while(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks)
    checkpoints = store.checkpoints_dir(job.run_dir)
    with mounted(checkpoints):
        start = job.start()
        start.wait_for(lambda: len(store.list_steps(job.run_dir)) > 1, "two checkpoints")
        remount_read_only(checkpoints)
        steps = store.list_steps(job.run_dir)
        wait_for_lrd_lines(start, 2)
        require_intact(job, steps)

        mount("-o", "remount,rw", str(checkpoints))
        start.wait_for_success()
        require_one_line_a_checkpoint(start)
        return lab.compare(job, Outcome(expected="went on"))


def read_only_from_the_start(lab: Lab, ranks: int, folder: Path) -> Outcome:
    job = Job(folder, ranks)
    with mounted(job.run_dir):
        mount("-o", "remount,ro", str(job.run_dir))
        job.start().wait_for_error(UserError.status, str(job.run_dir))

        mount("-o", "remount,rw", str(job.run_dir))
        return lab.finish_and_compare(job, "refused")
