"""A rank for which the others wait is named."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.launching import (
    RECIPE,
    ROOT,
    SMALL,
    STEPS,
    command,
    launch,
    rank_processes,
    start,
    train_command,
    wait_for,
)
from tests.helpers.run_slow_rank import SECONDS
from tests.helpers.tensorboard_events import read_scalars

SCRIPT = str(ROOT / "tests" / "helpers" / "run_slow_rank.py")
FIRST, LAST = 4, 16  # the slow steps of 44
LONG_RUN = ["trainer.epochs=50", "trainer.max_steps=1000", "trainer.eval_every=50"]


def lrd_lines(output: str) -> list[str]:
    return re.findall(r"^lrd: (.*)$", output, re.MULTILINE)


# Slow, because tests/job/test_rank_speed.py has what is said of which times.
@pytest.mark.slow
def test_a_slow_rank_is_named_and_named_again_when_it_recovers(tmp_path: Path) -> None:
    recipe = [RECIPE, *SMALL, *STEPS, f"run_dir={tmp_path / 'run'}"]
    done = launch(command(2, [SCRIPT, str(FIRST), str(LAST), *recipe]))
    assert done.returncode == 0, done.stdout + done.stderr

    # On a busy machine, over so few steps, the other rank may be slow at times, too.
    of_rank_1 = [line for line in lrd_lines(done.stderr) if line.startswith("rank 1 ")]
    assert re.search(r" is slow, and the others wait for it: it computed \d+ ms", of_rank_1[0])
    assert of_rank_1[1].endswith("is as fast as the others again")

    records = read_scalars(tmp_path / "run")
    slowest = dict(records["ranks/slowest"])
    longest = dict(records["ranks/compute_seconds/max"])
    steps = range(FIRST, LAST + 1)
    assert sum(slowest[step] == 1 for step in steps) > len(steps) / 2
    assert all(longest[step] > SECONDS for step in steps)
    # What rank 0 waits for rank 1 does not count as its own.
    medians = dict(records["ranks/compute_seconds/median"])
    own = [2 * medians[step] - longest[step] for step in steps]
    assert sorted(own)[len(own) // 2] < SECONDS


@pytest.mark.slow
def test_in_a_thousand_steps_there_is_no_false_alarm(tmp_path: Path) -> None:
    done = launch(train_command(2, tmp_path / "run", *LONG_RUN))
    assert done.returncode == 0, done.stdout + done.stderr
    assert lrd_lines(done.stderr) == []


@pytest.mark.slow
def test_a_rank_with_a_third_of_its_core_is_named(tmp_path: Path) -> None:
    """It is stopped and continued over and over, as `cpulimit` does."""
    steps = [*LONG_RUN, "trainer.max_steps=200"]
    run = start(train_command(2, tmp_path / "run", *steps))
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").exists(), run)
    victim = rank_processes(run, 2)[1]
    ended = threading.Event()

    def limit() -> None:
        while not ended.is_set() and victim.is_running():
            victim.send_signal(signal.SIGSTOP)
            time.sleep(0.04)
            victim.send_signal(signal.SIGCONT)
            time.sleep(0.02)

    thread = threading.Thread(target=limit)
    thread.start()
    try:
        output = run.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    finally:
        ended.set()
        thread.join()
    assert run.returncode == 0, output
    assert any(line.startswith("rank 1 ") and " is slow" in line for line in lrd_lines(output))
