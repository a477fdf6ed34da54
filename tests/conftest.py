"""What several files of tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import STEPS, launch, train_command


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run directories of the job with STEPS that nobody interrupted, on one rank and on two."""
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = tmp_path_factory.mktemp("undisturbed") / "run"
        done = launch(train_command(ranks, runs[ranks], *STEPS))
        assert done.returncode == 0, done.stdout + done.stderr
    return runs
