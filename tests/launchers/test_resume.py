"""A run that is killed and started again equals the run that was not killed."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from lrd.checkpoint import store
from lrd.errors import EXIT_STOPPED
from tests.helpers.checkpoints import flip_a_bit
from tests.helpers.equality import NUM_STEPS, assert_same_end, assert_same_final_state
from tests.helpers.launching import STEPS, launch, signal_all, start, train_command, wait_for
from tests.helpers.tensorboard_events import read_scalars


def start_and_signal(run_dir: Path, ranks: int, step: int, signal_number: int) -> tuple[int, str]:
    """Start a run, and send a signal to the launcher and its ranks at a checkpoint.

    Args:
        step: of the checkpoint that is waited for.

    Returns:
        The exit status, and what was printed.
    """
    process = start(train_command(ranks, run_dir, *STEPS))
    wait_for(lambda: step in store.list_steps(run_dir), process)
    signal_all(process, signal_number)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


# Slow, because other tests show the same: test_faults on one rank, test_roll_call on two ranks,
# test_hosts on two hosts.
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_in_the_middle_of_an_epoch_ends_like_an_undisturbed_one(
    tmp_path: Path, undisturbed: dict[int, Path], ranks: int
) -> None:
    start_and_signal(tmp_path / "run", ranks, 10, signal.SIGKILL)
    newest_step = max(store.list_steps(tmp_path / "run"))
    assert 10 <= newest_step < NUM_STEPS

    done = launch(train_command(ranks, tmp_path / "run", *STEPS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {newest_step}" in done.stdout
    assert_same_end(tmp_path / "run", undisturbed[ranks])


# Slow, because tests/cli has the signals, and other tests have the resume.
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_after_sigterm_the_run_saves_at_the_next_step_and_ends_with_its_status(
    tmp_path: Path, undisturbed: dict[int, Path], ranks: int
) -> None:
    status, output = start_and_signal(tmp_path / "run", ranks, 5, signal.SIGTERM)
    if ranks == 1:
        assert status == EXIT_STOPPED, output
    # The launcher prints this if a rank does not end by itself.
    assert "forcefully exiting" not in output

    last_step = max(store.list_steps(tmp_path / "run"))
    assert f"stopped by signal 15 after step {last_step}, saved" in output
    assert launch(train_command(ranks, tmp_path / "run", *STEPS)).returncode == 0
    assert_same_end(tmp_path / "run", undisturbed[ranks])


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_end(
    tmp_path: Path, undisturbed: dict[int, Path]
) -> None:
    launcher = start(train_command(2, tmp_path / "run", *STEPS))
    wait_for(lambda: 5 in store.list_steps(tmp_path / "run"), launcher)

    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    _, still_running = psutil.wait_procs(ranks, timeout=30)
    assert still_running == []
    assert max(store.list_steps(tmp_path / "run")) < NUM_STEPS

    assert launch(train_command(2, tmp_path / "run", *STEPS)).returncode == 0
    assert_same_end(tmp_path / "run", undisturbed[2])


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, undisturbed: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is done in one pass; the undisturbed run restores dropped elements instead."""
    run_dir = tmp_path / "run"
    start_and_signal(run_dir, 1, 10, signal.SIGKILL)
    newest = store.checkpoint_path(run_dir, max(store.list_steps(run_dir)))
    flip_a_bit(newest / "model.safetensors")

    monkeypatch.setenv("LRD_FUSED", "1")
    done = launch(train_command(1, run_dir, *STEPS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "damaged: model.safetensors: sha256" in done.stdout
    assert "masked in one pass" in done.stdout
    assert_same_end(run_dir, undisturbed[1])


@pytest.mark.parametrize("ranks", [(2, 1), pytest.param((3, 2, 4, 1), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """Masks and samples are the same.

    With BatchNorm's statistics taken over all ranks the losses are the same but for rounding.
    """
    num_steps = 14  # one epoch
    overrides = [
        *STEPS,
        "trainer.epochs=1",
        "data.batch_size=96",
        "model.sync_batchnorm=true",
    ]
    assert launch(train_command(1, tmp_path / "whole", *overrides)).returncode == 0

    last_steps = [num_steps * (part + 1) // len(ranks) for part in range(len(ranks))]
    for num_ranks, last_step in zip(ranks, last_steps, strict=True):
        limit = f"trainer.max_steps={last_step}"
        done = launch(train_command(num_ranks, tmp_path / "parts", *overrides, limit))
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {last_steps[-2]}" in done.stdout

    records = read_scalars(tmp_path / "parts")
    expected_records = read_scalars(tmp_path / "whole")
    for tag in expected_records:
        if tag.startswith(("lr", "probes")):
            assert records[tag] == expected_records[tag], tag

    assert [step for step, _ in records["train/loss"]] == list(range(1, num_steps + 1))
    losses = [loss for _, loss in records["train/loss"]]
    expected_losses = [loss for _, loss in expected_records["train/loss"]]
    assert losses[:6] == pytest.approx(expected_losses[:6], rel=1e-5)
    # Rounding may put an activation on the other side of ReLU's zero.
    assert losses == pytest.approx(expected_losses, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_three_and_four_ranks_resume_exactly_too(tmp_path: Path, ranks: int) -> None:
    overrides = ["trainer.epochs=1", "data.batch_size=96"]
    whole = train_command(ranks, tmp_path / "whole", *overrides)
    first_part = train_command(ranks, tmp_path / "parts", *overrides, "trainer.max_steps=6")
    second_part = train_command(ranks, tmp_path / "parts", *overrides)
    for arguments in (whole, first_part, second_part):
        done = launch(arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    assert_same_final_state(tmp_path / "parts", tmp_path / "whole")
