"""What several files of tests compare with."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from launching import STEPS, launch, train_command


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run directories of the job with STEPS that nobody interrupted, on one rank and on two.

    Of two processes that run the tests one trains them, the other waits.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"
    folder.mkdir(exist_ok=True)
    runs = {ranks: folder / f"{ranks}" / "run" for ranks in (1, 2)}
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for ranks, run_dir in runs.items():
            if not (run_dir.parent / "done").exists():
                done = launch(train_command(ranks, run_dir, *STEPS))
                assert done.returncode == 0, done.stdout + done.stderr
                (run_dir.parent / "done").touch()
    return runs
