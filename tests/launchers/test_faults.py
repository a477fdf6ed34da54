"""A sample of the fault campaign; `python -m tests.faults` runs all of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.faults.kills import SHORT, kill_at_random, kill_in_save
from tests.faults.lab import Lab, Trial

# Of the operations on files that a save does: the checkpoint is written and not yet published.
BEFORE_A_RENAME = 13


@pytest.mark.slow
def test_killed_runs_end_like_an_undisturbed_run(tmp_path: Path) -> None:
    lab = Lab(tmp_path, seed=1)
    trials = [
        Trial("one rank", partial(kill_at_random, lab, 1, "rank 0", 1, 0, length=SHORT)),
        Trial("in a save", partial(kill_in_save, lab, 1, BEFORE_A_RENAME)),
    ]
    outcomes = [outcome for _, outcome in lab.run(trials)]

    assert [outcome.problem for outcome in outcomes if outcome.problem] == []
    assert sum(outcome.times for outcome in outcomes) == 2
    assert all(outcome.state_equal and outcome.records_equal for outcome in outcomes)
