"""What a rank of recovery.py runs: training, which notes when it comes to which point.

    recovery_rank.py MARKS RECIPE [section.key=value ...]

Each line of the file MARKS has the rank, the time in seconds, and the point.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

START = "process starts"
IMPORTED = "imports"
MET = "ranks meet"
SET_UP = "data, network, checkpoint"
STEPPED = "first step"
SAW = "the other rank sees it"
SAVED = "state saved"
LEFT = "rank leaves"

COST_VARIABLE = (
    "RECOVERY_COST"  # in the environment, if the copies of every second step are left out
)


def mark(what: str) -> None:
    with Path(sys.argv[1]).open("a", encoding="utf-8") as stream:
        stream.write(f"{os.environ['RANK']} {time.time()} {what}\n")


def train_and_mark() -> None:
    """Train, and note the points."""
    began = psutil.Process().create_time()
    with Path(sys.argv[1]).open("a", encoding="utf-8") as stream:
        stream.write(f"{os.environ['RANK']} {began} {START}\n")

    from lrd import train
    from lrd.job import setup, survivor
    from lrd.job.progress import Progress

    mark(IMPORTED)

    def marking(module: Any, name: str, before: str = "", after: str = "") -> None:
        function = getattr(module, name)

        def marked(*arguments: Any, **options: Any) -> Any:
            if before:
                mark(before)
            result = function(*arguments, **options)
            if after:
                mark(after)
            return result

        setattr(module, name, marked)

    after_step = Progress.after_step

    def marking_after_step(progress: Any, *arguments: Any) -> None:
        after_step(progress, *arguments)
        mark(f"step {progress.job.step}")

    Progress.after_step = marking_after_step  # type: ignore[method-assign]
    marking(setup, "start_rank", after=MET)
    marking(train, "train", before=SET_UP)
    marking(train, "report_failure", before=SAW)
    marking(survivor, "save_state", after=SAVED)
    marking(train, "exit_process", before=LEFT)
    train.main(sys.argv[2:])


def take_every_second_copy() -> None:
    """Leave out the copies of every second step."""
    from lrd.job.buffers import BufferSnapshot

    take = BufferSnapshot.take

    def take_in_odd_steps(snapshot: BufferSnapshot, step: int) -> None:
        if step % 2:
            take(snapshot, step)

    BufferSnapshot.take = take_in_odd_steps  # type: ignore[method-assign]


if __name__ == "__main__":
    if COST_VARIABLE in os.environ:
        take_every_second_copy()
    train_and_mark()
