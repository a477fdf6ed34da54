"""SIGKILL of one of several ranks: the others save what they have, so no step is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .jobs import Job
from .kills import LONG
from .lab import Lab, Outcome, Trial

_NUMBERS_OF_RANKS = (2, 3, 4)
_KILLS_IN_A_ROW = 4
_MOST_STEPS_BETWEEN_KILLS = 20
_LONGEST_STEP_SECONDS = 0.2  # a kill comes at any moment of a step

# Without survivors a kill would lose all steps of its start.
_NO_CHECKPOINTS = "checkpoint.every_steps=0"


def survivors(lab: Lab) -> Iterator[Trial]:
    """Half of the random kills, shared by the numbers of ranks."""
    kills = lab.kills // 2
    for index, ranks in enumerate(_NUMBERS_OF_RANKS):
        left = kills // len(_NUMBERS_OF_RANKS) + (index < kills % len(_NUMBERS_OF_RANKS))
        while left > 0:
            in_a_row = min(left, _KILLS_IN_A_ROW)
            row = f"A SIGKILL of any rank of {ranks}, the others save"
            yield Trial(row, partial(kill_any_rank, lab, ranks, in_a_row, left), in_a_row)
            left -= in_a_row


def kill_any_rank(lab: Lab, ranks: int, kills: int, number: int, folder: Path) -> Outcome:
    """Kill one rank of each start after a few steps.

    Args:
        number: tells this trial's random moments from those of others.
    """
    draw = lab.draw("survivors", ranks, number)
    job = Job(folder, ranks, LONG, _NO_CHECKPOINTS)
    for _ in range(kills):
        last_step = max([start.last_step for start in job.starts], default=0)
        start = job.start()
        start.wait_for_step(last_step + draw.randint(1, _MOST_STEPS_BETWEEN_KILLS))
        time.sleep(draw.uniform(0, _LONGEST_STEP_SECONDS))
        start.signal(f"rank {draw.randrange(ranks)}")
        start.wait()
    return lab.compare(job, Outcome(kills, starts=job.finish()), max_lost=0)
