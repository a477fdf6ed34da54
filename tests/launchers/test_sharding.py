"""`trainer.sharding: full` trains like DDP, whose ranks have copies, and resumes exactly.

All ranks of one launch run all jobs one after the other, see run_sharded.py.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrd
from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.parts.models import build_model
from tests.faults.kills import kill_at_random
from tests.faults.lab import Lab, Trial
from tests.helpers.equality import assert_same_final_state
from tests.helpers.launching import RECIPE, ROOT, command, final_state, launch, train_command
from tests.helpers.run_sharded import AT, FEW, MORE, NUM_STEPS, SHARDS
from tests.helpers.tensorboard_events import read_scalars

RUN_SHARDED = str(ROOT / "tests" / "helpers" / "run_sharded.py")

# With a width of 6, two, three and four ranks have shards of different sizes; the layer of ten
# outputs is uneven on three and on four.
OVERRIDES = [
    "model.arch=resnet18",
    "model.width=6",
    "data.batch_size=48",
    "trainer.fingerprint_every=1",
]


@pytest.fixture(
    scope="module",
    params=[
        (2, "few"),
        pytest.param((2, "all"), marks=pytest.mark.slow),
        pytest.param((3, "all"), marks=pytest.mark.slow),
        pytest.param((4, "all"), marks=pytest.mark.slow),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def out_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where so many ranks have run all jobs."""
    folder = tmp_path_factory.mktemp("sharding")
    num_ranks, which = request.param
    done = launch(command(num_ranks, [RUN_SHARDED, which, str(folder), RECIPE, *OVERRIDES]))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(out_dir: Path) -> list[dict[str, Any]]:
    """For each rank, what it saw of each start of a job."""
    files = sorted(out_dir.glob("rank*.json"))
    return [json.loads(file.read_text()) for file in files]


def weights_after(run_dir: Path, step: int) -> dict[str, Tensor]:
    return store.read(store.checkpoint_path(run_dir, step)).model


def test_shards_train_like_copies_up_to_the_rounding_of_the_gradients(
    out_dir: Path, ranks: list[dict[str, Any]]
) -> None:
    """All files of the last checkpoints have the same layout, and nearly the same numbers."""
    names = [name for name in FEW | MORE if f"{name}, shards" in ranks[0]]
    assert len(names) >= len(FEW)
    for name in names:
        assert_shards_equal_copies(out_dir, ranks, name)


def assert_shards_equal_copies(out_dir: Path, ranks: list[dict[str, Any]], name: str) -> None:
    weights, optimizer, newest = final_state(out_dir / f"{name}, shards")
    expected_weights, expected_optimizer, expected_newest = final_state(out_dir / f"{name}, copies")
    assert newest.name == expected_newest.name == store.checkpoint_name(NUM_STEPS)
    assert_nearly_equal(weights, expected_weights)
    assert_nearly_equal(optimizer, expected_optimizer)

    records = read_scalars(out_dir / f"{name}, shards")
    expected_records = read_scalars(out_dir / f"{name}, copies")
    expected_records = {
        tag: points for tag, points in expected_records.items() if not tag.startswith("ranks/")
    }
    assert records.keys() == expected_records.keys()
    for tag, points in expected_records.items():
        if tag.startswith(("lr", "probes")):
            assert records[tag] == points, tag
        elif tag != "train/images_per_second":
            assert dict(records[tag]) == pytest.approx(dict(points), rel=1e-3), tag

    # Rank 0 has no image in the last batch of the evaluation.
    for facts in ranks:
        metrics = facts[f"{name}, shards"]["metrics"]
        assert metrics == ranks[0][f"{name}, shards"]["metrics"]
        assert metrics == pytest.approx(facts[f"{name}, copies"]["metrics"], rel=1e-3, abs=0.02)


def assert_nearly_equal(actual: object, expected: object) -> None:
    """Nested state_dicts: tensors but for rounding, with the same memory layout; all else equal."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_nearly_equal(actual[key], expected[key])
    elif isinstance(actual, list):
        assert len(actual) == len(expected)
        for actual_item, expected_item in zip(actual, expected, strict=True):
            assert_nearly_equal(actual_item, expected_item)
    elif isinstance(actual, Tensor):
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        assert actual == expected


@pytest.mark.parametrize("kind", ["copies", "shards"])
def test_the_elements_that_move_are_those_of_the_masks(out_dir: Path, kind: str) -> None:
    """The reference draws each mask of a whole parameter, as one process would."""
    section = recipes.load(RECIPE, OVERRIDES).model
    names = [name for name, _ in build_model(section, 10, 0).named_parameters()]

    before = weights_after(out_dir / f"plain, {kind}", 1)
    for step in range(2, NUM_STEPS + 1):
        after = weights_after(out_dir / f"plain, {kind}", step)
        for index, name in enumerate(names):
            keep = lrd.mask.draw(
                after[name].numel(), seed=0, step=step - 1, index=index, keep_prob=0.5
            ).view(after[name].shape)
            moved = before[name] != after[name]
            assert not (moved & ~keep).any(), (name, step)
            # A kept element whose gradient is zero may stay.
            assert moved.sum() >= 0.9 * keep.sum(), (name, step)
        before = after


def test_all_ranks_begin_each_step_with_the_same_buffers(ranks: list[dict[str, Any]]) -> None:
    """BatchNorm's running statistics are rank 0's, as under DDP."""
    sums = ranks[0]["plain, shards"]["buffer sums"]
    assert len(set(sums)) == NUM_STEPS
    for facts in ranks:
        assert facts["plain, shards"]["buffer sums"] == sums
        # With three ranks and more DDP makes two passes before the first step.
        copies_sums = facts["plain, copies"]["buffer sums"]
        assert copies_sums == pytest.approx(sums, rel=1e-4)


def test_each_rank_holds_its_part_of_parameters_and_state(ranks: list[dict[str, Any]]) -> None:
    held = [facts["groups, shards"]["bytes"] for facts in ranks]
    whole = ranks[0]["groups, copies"]["bytes"]
    num_counters = 62  # of Adam, which each rank has: float32
    assert sum(held) == whole + (len(ranks) - 1) * num_counters * 4
    assert max(held) < 1.25 * whole / len(ranks)


def test_a_run_in_two_starts_equals_the_run_in_one(out_dir: Path) -> None:
    assert_same_final_state(out_dir / "two starts", out_dir / "groups, shards")


def test_a_run_changes_between_copies_and_shards(out_dir: Path) -> None:
    records = read_scalars(out_dir / "changing")
    expected_records = read_scalars(out_dir / "sync_batchnorm, copies")
    for tag in expected_records:
        if tag.startswith(("lr", "probes")):
            assert records[tag] == expected_records[tag], tag
    losses = dict(records["train/loss"])
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    assert losses == pytest.approx(dict(expected_records["train/loss"]), rel=1e-4)

    weights, optimizer, _ = final_state(out_dir / "changing")
    expected_weights, expected_optimizer, _ = final_state(out_dir / "sync_batchnorm, copies")
    assert_nearly_equal(weights, expected_weights)
    assert_nearly_equal(optimizer, expected_optimizer)


def test_a_gradient_that_is_not_finite_stops_the_run_and_its_rank_is_named(
    ranks: list[dict[str, Any]],
) -> None:
    last = len(ranks) - 1
    (message,) = {facts["nan gradient"]["message"] for facts in ranks}
    assert message.startswith(f"step {AT}: the gradient's norm is not finite (nan), ")
    assert f"rank {last} on " in message
    assert "first in the gradient of conv1.weight" in message
    assert "rank 0 on " not in message
    assert {facts["nan gradient"]["step"] for facts in ranks} == {AT - 1}


def test_a_step_is_skipped_on_all_ranks_together(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert facts["nan loss, skipped"]["message"] == ""
        assert facts["nan loss, skipped"]["step"] == NUM_STEPS
        assert facts["nan loss, skipped"]["skipped"] == 1


def test_settings_that_differ_stop_the_run(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        message = facts["other mask seed"]["message"]
        assert message.startswith("step 1: the replicas differ, first in mask_seed of group 0: ")


def test_an_optimizer_that_cannot_work_on_shards_is_refused_in_one_line(
    ranks: list[dict[str, Any]],
) -> None:
    for facts in ranks:
        (line,) = facts["Rprop"]["message"].splitlines()
        assert line.startswith("trainer.sharding: full does not work with Rprop as it is set here")


@pytest.mark.slow
def test_a_run_goes_on_with_copies_or_shards_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Masks and samples are the same, and with synchronized BatchNorm the losses are close."""
    overrides = [*OVERRIDES, "model.sync_batchnorm=true"]
    limits = [
        (2, ["trainer.max_steps=3"]),
        (3, ["trainer.max_steps=6", SHARDS]),
        (4, ["trainer.max_steps=9", SHARDS]),
        (1, ["trainer.max_steps=12", SHARDS]),
    ]
    whole = train_command(1, tmp_path / "whole", *overrides, "trainer.max_steps=12")
    assert launch(whole).returncode == 0
    for num_ranks, limit in limits:
        done = launch(train_command(num_ranks, tmp_path / "parts", *overrides, *limit))
        assert done.returncode == 0, done.stdout + done.stderr

    records = read_scalars(tmp_path / "parts")
    expected_records = read_scalars(tmp_path / "whole")
    for tag in expected_records:
        if tag.startswith(("lr", "probes")):
            assert records[tag] == expected_records[tag], tag
    losses = dict(records["train/loss"])
    assert losses == pytest.approx(dict(expected_records["train/loss"]), rel=2e-3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_of_two_ranks_with_shards_leave_no_trace(tmp_path: Path) -> None:
    """SIGKILL at random moments: each run ends with the bits of one that was not disturbed."""
    lab = Lab(tmp_path)
    trials = [
        Trial(victim, partial(kill_at_random, lab, 2, victim, 5, 0, overrides=(SHARDS,)))
        for victim in ("rank 0", "rank 1", "launcher", "all")
    ]
    outcomes = [outcome for _, outcome in lab.run(trials, num_parallel=1)]

    assert [outcome.problem for outcome in outcomes if outcome.problem] == []
    assert sum(outcome.times for outcome in outcomes) == 20
    assert all(outcome.state_equal and outcome.records_equal for outcome in outcomes)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a busy machine compiles for minutes
def test_a_compiled_network_can_be_sharded(tmp_path: Path) -> None:
    """The width is 8, because torch 2.13 has a fault at 4, see tests/job/test_train.py."""
    overrides = [*OVERRIDES, "model.width=8", "trainer.max_steps=2", "trainer.compile=true"]
    for name, sharding in [("copies", "none"), ("shards", "full")]:
        arguments = [*overrides, f"trainer.sharding={sharding}"]
        done = launch(train_command(2, tmp_path / name, *arguments), timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "recompile_limit" not in done.stderr  # else blocks run as they are

    assert_nearly_equal(final_state(tmp_path / "shards")[0], final_state(tmp_path / "copies")[0])
