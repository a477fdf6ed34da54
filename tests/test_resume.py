"""A run that is killed and started again equals the run that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
import torch
from launching import STEPS, final_state, launch, scalars, signal_all, start, train_command, wait_for

from lrd import checkpoint
from lrd.errors import EXIT_STOPPED

SPEED = "train/images_per_second"


def assert_same_end(run_dir: Path, undisturbed: Path) -> None:
    weights, optimizer, newest = final_state(run_dir)
    expected_weights, expected_optimizer, expected_newest = final_state(undisturbed)
    assert newest.name == expected_newest.name == "step-00000044"
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    assert_equal(optimizer, expected_optimizer)
    records, expected = scalars(run_dir), scalars(undisturbed)
    assert records.keys() == expected.keys()
    for tag in records.keys() - {SPEED}:
        assert records[tag] == expected[tag], tag
    assert [step for step, _ in records[SPEED]] == [step for step, _ in expected[SPEED]] == list(range(1, 45))


def assert_equal(left: object, right: object) -> None:
    """Nested state_dicts, tensors bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def kill_after(run_dir: Path, ranks: int, step: int, number: int, *overrides: str) -> tuple[int, str]:
    """Start, and send a signal to the launcher and its ranks once the checkpoint of `step` is there."""
    process = start(train_command(ranks, run_dir, *STEPS, *overrides))
    wait_for(lambda: step in checkpoint.steps(run_dir), process)
    signal_all(process, number)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


ONE_AND_TWO = [pytest.param(1, marks=pytest.mark.slow), 2]  # test_faults and test_cli have one rank


@pytest.mark.slow  # test_faults, test_peers and test_hosts have it on one rank, two ranks and two hosts
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_in_the_middle_of_an_epoch_and_started_again(
    tmp_path: Path, undisturbed: dict[int, Path], ranks: int
) -> None:
    kill_after(tmp_path / "run", ranks, 10, signal.SIGKILL)
    kept = max(checkpoint.steps(tmp_path / "run"))
    assert 10 <= kept < 44
    done = launch(train_command(ranks, tmp_path / "run", *STEPS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {kept}" in done.stdout
    assert_same_end(tmp_path / "run", undisturbed[ranks])


@pytest.mark.parametrize("ranks", ONE_AND_TWO)
def test_sigterm_saves_at_the_next_step_and_leaves_with_its_status(
    tmp_path: Path, undisturbed: dict[int, Path], ranks: int
) -> None:
    status, output = kill_after(tmp_path / "run", ranks, 5, signal.SIGTERM)
    if ranks == 1:
        assert status == EXIT_STOPPED, output
    assert "forcefully exiting" not in output  # what the launcher says where a rank does not leave by itself
    stopped = max(checkpoint.steps(tmp_path / "run"))
    assert f"stopped by signal 15 after step {stopped}, saved" in output
    assert launch(train_command(ranks, tmp_path / "run", *STEPS)).returncode == 0
    assert_same_end(tmp_path / "run", undisturbed[ranks])


def test_ranks_whose_launcher_is_killed_save_and_leave(tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    process = start(train_command(2, tmp_path / "run", *STEPS))
    wait_for(lambda: 5 in checkpoint.steps(tmp_path / "run"), process)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, orphans = psutil.wait_procs(ranks, timeout=30)
    assert orphans == []
    assert max(checkpoint.steps(tmp_path / "run")) < 44
    assert launch(train_command(2, tmp_path / "run", *STEPS)).returncode == 0
    assert_same_end(tmp_path / "run", undisturbed[2])


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, undisturbed: dict[int, Path], monkeypatch) -> None:
    """And it goes on in one pass, which ends with the very bits of a run whose dropped elements were put back."""
    kill_after(tmp_path / "run", 1, 10, signal.SIGKILL)
    newest = max(checkpoint.steps(tmp_path / "run"))
    weights = checkpoint.folder(tmp_path / "run") / checkpoint.name(newest) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    monkeypatch.setenv("LRD_FUSED", "1")
    done = launch(train_command(1, tmp_path / "run", *STEPS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "damaged: model.safetensors: sha256" in done.stdout
    assert "masked in one pass" in done.stdout
    assert_same_end(tmp_path / "run", undisturbed[1])


@pytest.mark.parametrize("ranks", [(2, 1), pytest.param((3, 2, 4, 1), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """Masks and samples are the same; with BatchNorm's statistics over all ranks the losses are, but for rounding."""
    overrides = [*STEPS, "trainer.epochs=1", "data.batch_size=96", "model.sync_batchnorm=true"]  # 14 steps
    assert launch(train_command(1, tmp_path / "whole", *overrides)).returncode == 0
    ends = [14 * (i + 1) // len(ranks) for i in range(len(ranks))]
    for number, end in zip(ranks, ends, strict=True):
        done = launch(train_command(number, tmp_path / "parts", *overrides, f"trainer.max_steps={end}"))
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {ends[-2]}" in done.stdout
    records, expected = scalars(tmp_path / "parts"), scalars(tmp_path / "whole")
    for tag in expected:
        if tag.startswith(("lr", "probes")):
            assert records[tag] == expected[tag], tag
    losses, expected_losses = ([loss for _, loss in of["train/loss"]] for of in (records, expected))
    assert [step for step, _ in records["train/loss"]] == list(range(1, 15))
    assert losses[:6] == pytest.approx(expected_losses[:6], rel=1e-5)
    assert losses == pytest.approx(expected_losses, rel=2e-3)  # rounding may put an activation on ReLU's other side


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_than_two_resume_exactly_too(tmp_path: Path, ranks: int) -> None:
    overrides = ["trainer.epochs=1", "data.batch_size=96"]
    assert launch(train_command(ranks, tmp_path / "whole", *overrides)).returncode == 0
    assert launch(train_command(ranks, tmp_path / "parts", *overrides, "trainer.max_steps=6")).returncode == 0
    assert launch(train_command(ranks, tmp_path / "parts", *overrides)).returncode == 0
    weights, optimizer, _ = final_state(tmp_path / "parts")
    expected_weights, expected_optimizer, _ = final_state(tmp_path / "whole")
    assert_equal(weights, expected_weights)
    assert_equal(optimizer, expected_optimizer)
