"""Whether two runs ended the same, bit for bit."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.launching import final_state
from tests.helpers.metrics_csv import read_metrics, read_records_by_step
from tests.helpers.tensorboard_events import read_scalars

SPEED_TAG = "train/images_per_second"
TIMES = (SPEED_TAG, "ranks/")  # how the tags of times begin, which differ from run to run
NUM_STEPS = 44  # of a run with launching.STEPS


def assert_nested_equal(actual: object, expected: object) -> None:
    """Nested state_dicts, tensors bit for bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_nested_equal(actual[key], expected[key])
    elif isinstance(actual, list):
        assert len(actual) == len(expected)
        for actual_item, expected_item in zip(actual, expected, strict=True):
            assert_nested_equal(actual_item, expected_item)
    elif isinstance(actual, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


def assert_same_final_state(run_dir: Path, expected_run_dir: Path) -> None:
    """Weights, their averages, optimizer and schedule in the newest checkpoints."""
    weights, optimizer, newest = final_state(run_dir)
    expected_weights, expected_optimizer, expected_newest = final_state(expected_run_dir)
    assert newest.name == expected_newest.name
    assert_nested_equal(weights, expected_weights)
    assert_nested_equal(optimizer, expected_optimizer)

    average = newest / "ema.safetensors"
    expected_average = expected_newest / "ema.safetensors"
    assert average.exists() == expected_average.exists()
    if average.exists():
        assert_nested_equal(load_file(average), load_file(expected_average))


def assert_same_end(run_dir: Path, undisturbed: Path) -> None:
    """Final state and records of a run with launching.STEPS; all but its speed."""
    assert_same_final_state(run_dir, undisturbed)
    assert final_state(run_dir)[2].name == f"step-{NUM_STEPS:08d}"

    records = read_scalars(run_dir)
    expected = read_scalars(undisturbed)
    assert records.keys() == expected.keys()
    for tag in records:
        if not tag.startswith(TIMES):
            assert records[tag] == expected[tag], tag

    assert read_metrics(run_dir) == read_records_by_step(run_dir)
    assert metrics_without_speed(run_dir) == metrics_without_speed(undisturbed)

    all_steps = list(range(1, NUM_STEPS + 1))
    assert [step for step, _ in records[SPEED_TAG]] == all_steps
    assert [step for step, _ in expected[SPEED_TAG]] == all_steps


def metrics_without_speed(run_dir: Path) -> list[list[str]]:
    """The cells of `metrics.csv` as they are written, without the columns of times."""
    with (run_dir / "metrics.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    columns = [number for number, tag in enumerate(rows[0]) if not tag.startswith(TIMES)]
    return [[row[number] for number in columns] for row in rows]
