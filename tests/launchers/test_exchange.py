"""`trainer.gradient_exchange: kept` in real runs: resumes, records, and what is refused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lrd.checkpoint import store
from tests.helpers.equality import TIMES, assert_same_final_state
from tests.helpers.launching import (
    STEPS,
    launch,
    rank_processes,
    signal_all,
    start,
    train_command,
    wait_for,
)
from tests.helpers.tensorboard_events import read_scalars

KEPT = ("trainer.gradient_exchange=kept", "lr_dropout.keep_prob=0.3", "data.batch_size=96")


@pytest.mark.slow  # as other runs that are killed; what is its own is in tests/exchange
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_that_is_killed_ends_like_an_undisturbed_one(tmp_path: Path, ranks: int) -> None:
    """Once all its processes are killed, once one rank: the others cannot save the state."""
    overrides = (*STEPS, *KEPT, f"trainer.epochs={2 if ranks == 2 else 3}")
    undisturbed = launch(train_command(ranks, tmp_path / "undisturbed", *overrides))
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr

    command = train_command(ranks, tmp_path / "run", *overrides)
    launcher = start(command)
    wait_for(lambda: 5 in store.list_steps(tmp_path / "run"), launcher)
    signal_all(launcher, signal.SIGKILL)
    launcher.communicate(timeout=60)

    launcher = start(command)
    wait_for(lambda: 15 in store.list_steps(tmp_path / "run"), launcher)
    rank_processes(launcher, ranks)[1].kill()
    launcher.communicate(timeout=60)
    assert max(store.list_steps(tmp_path / "run")) % 5 == 0

    done = launch(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_final_state(tmp_path / "run", tmp_path / "undisturbed")
    records = read_scalars(tmp_path / "run")
    expected = read_scalars(tmp_path / "undisturbed")
    assert records.keys() == expected.keys()
    assert "train/grad_norm_of_rank_0" in records
    assert "train/grad_norm" not in records
    for tag in records:
        if not tag.startswith(TIMES):
            assert records[tag] == expected[tag], tag


@pytest.mark.slow
def test_a_run_may_change_between_the_two_exchanges_and_loses_rounding_alone(
    tmp_path: Path,
) -> None:
    losses = {}
    for name, exchanges in (("all", ("all", "all")), ("mixed", ("kept", "all"))):
        run_dir = tmp_path / name
        for exchange, last_step in zip(exchanges, (4, 8), strict=True):
            overrides = (*KEPT, f"trainer.gradient_exchange={exchange}", "trainer.epochs=1")
            done = launch(train_command(2, run_dir, *overrides, f"trainer.max_steps={last_step}"))
            assert done.returncode == 0, done.stdout + done.stderr
        losses[name] = [value for _, value in read_scalars(run_dir)["train/loss"]]
    assert len(losses["all"]) == 8
    assert losses["mixed"] == pytest.approx(losses["all"], rel=1e-2)
