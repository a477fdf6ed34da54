"""`accelerate launch` on CPU ranks: replicas stay equal, and the check of that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.launching import RECIPE, ROOT, SMALL, command, launch, train_command
from tests.helpers.tensorboard_events import read_scalars

RUN_AND_RECORD = str(ROOT / "tests" / "helpers" / "run_and_record.py")


def run_two_ranks(
    tmp_path: Path, mask_seed_of_rank_1: str, *overrides: str
) -> list[dict[str, object]]:
    """Train on two ranks. Returns what each rank saw, see run_and_record.py."""
    recipe = [RECIPE, f"run_dir={tmp_path / 'run'}", *SMALL, *overrides]
    done = launch(command(2, [RUN_AND_RECORD, str(tmp_path), mask_seed_of_rank_1, *recipe]))
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_see_different_samples_and_end_with_equal_weights(tmp_path: Path) -> None:
    rank_0, rank_1 = run_two_ranks(
        tmp_path, "same", "trainer.max_steps=20", "trainer.accumulation_steps=2"
    )
    assert rank_0["step"] == rank_1["step"] == 20
    assert rank_0["weights"] == rank_1["weights"]
    assert rank_0["latest"] == rank_1["latest"]
    assert len(rank_0["seen"]) == len(rank_1["seen"]) == 20 * 64 // 2
    assert not set(rank_0["seen"]) & set(rank_1["seen"])


@pytest.mark.slow
def test_another_mask_seed_on_one_rank_makes_the_replicas_drift_apart(tmp_path: Path) -> None:
    rank_0, rank_1 = run_two_ranks(
        tmp_path, "1", "trainer.max_steps=3", "trainer.fingerprint_every=0"
    )
    assert rank_0["message"] == rank_1["message"] == ""
    assert rank_0["weights"] != rank_1["weights"]


# Slow, because test_nonfinite has a flipped bit, and test_sharding another seed on one rank.
@pytest.mark.slow
def test_replicas_that_differ_stop_the_run_with_rank_and_setting_named(tmp_path: Path) -> None:
    for facts in run_two_ranks(tmp_path, "1", "trainer.max_steps=3"):
        assert facts["step"] == 1
        assert facts["message"].startswith(
            "step 1: the replicas differ, first in mask_seed of group 0: rank 0 on "
        )
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a CUDA device")


# Slow, because tests/cli/test_launch.py has a typo under the launcher, and tests/cli the rest.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "config", "override", "line"),
    [
        (
            2,
            "cpu.yaml",
            "data.batch_size=63",
            "data.batch_size: is 63, which cannot be split evenly over "
            "2 rank(s) x 1 accumulation step(s)",
        ),
        (
            2,
            "cpu.yaml",
            "optimizer.betas=[0.9, 0.99]",
            "optimizer.betas: SGD has no such argument",
        ),
        pytest.param(
            1,
            "gpu.yaml",
            "seed=1",
            "accelerate launch asks for GPUs, as it does where neither a launch file",
            marks=needs_no_cuda,
        ),
    ],
)
def test_a_user_error_is_one_line_under_the_launcher(
    tmp_path: Path, ranks: int, config: str, override: str, line: str
) -> None:
    done = launch(train_command(ranks, tmp_path / "run", override, config=config))
    output = done.stdout + done.stderr
    assert output.count(f"lrd: {line}") == 1
    assert "lrd/train.py" not in output
    assert not (tmp_path / "run").exists()

    # The launcher's own exit status is 1; it reports that of the rank.
    assert done.returncode != 0
    assert "exitcode  : 2" in output or "exit status 2" in output


@pytest.mark.slow
def test_one_process_under_the_launcher(tmp_path: Path) -> None:
    done = launch(train_command(1, tmp_path / "run", "trainer.max_steps=3", config="cpu-1.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 on cpu" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_compressed_to_bf16_are_as_exact_as_bf16_and_replicas_stay_equal(
    tmp_path: Path, ranks: int
) -> None:
    """The first loss is equal, the later ones differ by what bfloat16 rounds off."""
    losses = {}
    for compression in ("none", "bf16"):
        run_dir = tmp_path / compression
        overrides = [
            "trainer.max_steps=6",
            "data.batch_size=96",
            f"trainer.gradient_compression={compression}",
        ]
        done = launch(train_command(ranks, run_dir, *overrides))
        assert done.returncode == 0, done.stdout + done.stderr
        losses[compression] = [value for _, value in read_scalars(run_dir)["train/loss"]]

    assert losses["none"][0] == losses["bf16"][0]
    assert losses["none"][1:] != losses["bf16"][1:]
    assert losses["none"] == pytest.approx(losses["bf16"], rel=2e-2)
