"""The lr of any element at any step equals what the run itself recorded of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrd.errors import UserError
from lrd.optim import mask
from lrd.replay.coverage import measure_coverage
from lrd.replay.probe import ProbeResult, probe, write_probes
from tests.helpers.replaying import train, train_on_one_thread
from tests.helpers.tensorboard_events import read_scalars

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = "optimizer.groups=[{{name: head, match: fc.*, lr: 0.1, keep_prob: {keep_prob}}}]"


def assert_equals_records(run_dir: Path, num_probes: int) -> ProbeResult:
    """Compare all recorded probes with what is found without them."""
    recorded = {
        tag.removeprefix("probes/"): points
        for tag, points in read_scalars(run_dir).items()
        if tag.startswith("probes/")
    }
    assert len(recorded) == num_probes
    result = probe(run_dir, list(recorded))
    for probed in result.probed:
        points = recorded[probed.label]
        assert [step for step, _ in points] == list(range(1, len(probed.lrs) + 1))
        assert [np.float32(lr) for _, lr in points] == probed.lrs.tolist()
    return result


def test_groups_warm_up_an_interruption_and_a_changed_keep_prob(tmp_path):
    run_dir = tmp_path / "run"
    settings = [
        "tracking.probes=8",
        "tracking.every_steps=4",
        "schedule.name=StepLR",
        "schedule.step_size=1",
        "schedule.warmup_steps=7",
    ]
    train(run_dir, *settings, GROUPS.format(keep_prob=0.8), "trainer.max_steps=7")
    train(run_dir, *settings, GROUPS.format(keep_prob=0.8), "trainer.max_steps=11")
    allowed = "checkpoint.allow_changed=true"
    train(run_dir, *settings, GROUPS.format(keep_prob=0.3), allowed)

    result = assert_equals_records(run_dir, num_probes=8)
    assert result.trajectories.notes == []
    assert [segment.first for segment in result.trajectories.segments] == [0, 11]
    assert result.trajectories.segments[0].parameters["fc.weight"].keep_prob == 0.8
    assert result.trajectories.segments[1].parameters["fc.weight"].keep_prob == 0.3


def test_skipped_steps(tmp_path, monkeypatch):
    from lrd.job.state import Job

    load = Job.load_micro_batch

    def load_or_spoil(job, step, micro_step):
        inputs, labels = load(job, step, micro_step)
        return (inputs * float("inf") if step in (3, 6, 7) else inputs), labels

    monkeypatch.setattr(Job, "load_micro_batch", load_or_spoil)
    run_dir = tmp_path / "run"
    train(run_dir, "trainer.on_nonfinite=skip", "tracking.every_steps=5", "tracking.probes=6")
    result = assert_equals_records(run_dir, num_probes=6)
    assert np.flatnonzero(result.trajectories.is_skipped).tolist() == [3, 6, 7]
    assert result.trajectories.notes == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["lr_dropout.granularity=row"],
        ["lr_dropout=null"],
        ["optimizer={name: AdamW, lr: 0.001, decay_norms_and_biases: false}"],
        ["schedule.name=ReduceLROnPlateau", "schedule.patience=0", "schedule.threshold=1.0"],
        ["lr_dropout.kind=magma"],
    ],
)
def test_other_masks_optimizers_and_schedules(tmp_path, overrides):
    run_dir = tmp_path / "run"
    train(run_dir, *overrides, "trainer.epochs=2")
    assert_equals_records(run_dir, num_probes=4)


def test_what_follows_from_results_is_said_not_to_be_known(tmp_path):
    run_dir = tmp_path / "run"
    overrides = ["schedule.patience=0", "schedule.threshold=1.0", "tracking.every_steps=4"]
    train(run_dir, "schedule.name=ReduceLROnPlateau", *overrides)
    result = probe(run_dir, ["fc.bias[0]"])
    assert any("lr is not known" in note for note in result.trajectories.notes)
    (probed,) = result.probed
    assert np.isnan(probed.lrs).any()
    dropped = probed.lrs[~np.isnan(probed.lrs)] == 0
    assert dropped.any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_on_one_thread(tmp_path_factory.mktemp("probed") / "run")


def test_patterns_name_elements(trained):
    result = probe(trained, ["layer[12].0.bn1.bias[1]", "fc.weight"])
    labels = [probed.label for probed in result.probed]
    assert labels == ["layer1.0.bn1.bias[1]", "layer2.0.bn1.bias[1]", "fc.weight[5,0]"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer9.*", "matches no parameter"),
        ("fc.weight[10,0]", r"has shape \[10, 16\]"),
        ("fc.weight[0]", r"has shape \[10, 16\]"),
    ],
)
def test_elements_that_do_not_exist_are_refused(trained, pattern, message):
    with pytest.raises(UserError, match=message):
        probe(trained, [pattern])


def test_tensorboard_gets_the_same_records(trained, tmp_path):
    result = assert_equals_records(trained, num_probes=4)
    write_probes(result, tmp_path / "probes")
    records = read_scalars(tmp_path / "probes")
    expected = read_scalars(trained)
    assert len(records) == 4
    for tag in records:
        assert records[tag] == expected[tag]


def test_coverage_counts_moves_and_waits(trained):
    (coverage,) = measure_coverage(trained, ["conv1.weight"])
    masks = np.stack(
        [mask.draw(54, seed=0, step=step, index=0, keep_prob=0.5).numpy() for step in range(15)]
    )  # bool (steps, elements)
    assert coverage.num_steps == 15
    assert coverage.moves.tolist() == masks.sum(0).tolist()

    waits = np.zeros(16, int)
    longest = []
    for element in masks.T:
        places = [-1, *np.flatnonzero(element), 15]
        gaps = np.diff(places) - 1
        waits += np.bincount(gaps[:-1], minlength=16)
        longest.append(gaps.max())
    assert coverage.waits.tolist() == waits[: len(coverage.waits)].tolist()
    assert waits[len(coverage.waits) :].sum() == 0
    assert coverage.longest.tolist() == longest
    assert coverage.rows.shape == (54, 15)


def test_the_expected_waits_are_those_of_many_elements(trained):
    (coverage,) = measure_coverage(trained, ["layer4.1.conv2.weight"], until=12)
    expected = coverage.expected_waits()
    assert coverage.numel == len(coverage.moves) == 2304
    # Five standard deviations of a count.
    assert (np.abs(coverage.waits - expected) <= 5 * np.sqrt(expected) + 5).all()


def test_waits_are_not_expected_where_keep_prob_changed(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, "trainer.epochs=1")
    train(run_dir, "trainer.epochs=2", "lr_dropout.keep_prob=0.8", "checkpoint.allow_changed=true")
    (coverage,) = measure_coverage(run_dir, ["conv1.weight"])
    assert coverage.keep_prob is None
    assert coverage.expected_waits() is None
    assert coverage.num_steps == 10
