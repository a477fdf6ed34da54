"""A sample of the fault campaign; all of it is `python -m tests.faults`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from faults.kills import SHORT, kill_at_random, kill_in_save
from faults.lab import Lab, Trial

BEFORE_A_RENAME = 13  # of the things that a save does to files: the checkpoint is written and not yet published


def test_runs_that_are_killed_end_like_one_that_is_not(tmp_path: Path) -> None:
    lab = Lab(tmp_path, seed=1)
    trials = [
        Trial("one of two ranks", partial(kill_at_random, lab, 2, "rank 1", 2, 0, length=SHORT)),
        Trial("one rank", partial(kill_at_random, lab, 1, "rank 0", 2, 0, length=SHORT)),
        Trial("in a save", partial(kill_in_save, lab, 1, BEFORE_A_RENAME)),
    ]
    outcomes = list(lab.run(trials))
    assert [outcome.problem for _, outcome in outcomes if outcome.problem] == []
    assert sum(outcome.times for _, outcome in outcomes) == 5
    assert all(outcome.state_equal and outcome.records_equal for _, outcome in outcomes)
