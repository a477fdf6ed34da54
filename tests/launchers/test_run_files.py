"""What a run leaves in its directory to read: `train.log` and `metrics.csv`."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from lrd.checkpoint import store
from tests.helpers.equality import assert_same_end
from tests.helpers.launching import STEPS, launch, signal_all, start, train_command, wait_for


def read_epochs(run_dir: Path) -> list[str]:
    """The lines of `train.log` about epochs, without date and duration."""
    lines = (run_dir / "train.log").read_text().splitlines()
    epochs = [line[20:] for line in lines if line[20:].startswith("epoch ")]
    return [re.sub(r"  [\d.:]+ (s|min)$", "", epoch) for epoch in epochs]


# Slow, because test_hosts has a run that goes on, and tests/job has its files.
@pytest.mark.slow
def test_a_killed_run_goes_on_in_its_files(tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    run_dir = tmp_path / "run"
    process = start(train_command(1, run_dir, *STEPS))
    wait_for(lambda: 10 in store.list_steps(run_dir), process)
    signal_all(process, signal.SIGKILL)
    process.communicate(timeout=60)

    done = launch(train_command(1, run_dir, *STEPS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(run_dir, undisturbed[1])

    # One line per epoch, with the means over all steps of the epoch.
    assert read_epochs(run_dir)[-2:] == read_epochs(undisturbed[1])
    log = (run_dir / "train.log").read_text()
    assert log.count(" start on ") == 2
    assert log.count("the start before this one did not report its end") == 1
    assert log.count("going on after step ") == 1
