"""`metrics.csv` has TensorBoard's values, each step once, whatever interrupts its writing."""

from __future__ import annotations

import errno
import math
import os
import resource
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from lrd import files
from lrd.tracking import metrics_file
from lrd.tracking.metrics_file import MetricsFile, read_rows
from tests.helpers.metrics_csv import read_metrics, read_records_by_step
from tests.helpers.processes import in_child
from tests.helpers.tracked_run import TrackedRun

PROBE = "probes/layer.weight[3,2,1,1]"  # its commas need quotes


def write_steps(metrics: MetricsFile, *steps: int, value: float = 0.5) -> None:
    for step in steps:
        metrics.add("train/loss", value, step)
        metrics.add(PROBE, step / 4, step)


def make_file(run_dir: Path, *steps: int, value: float = 0.5) -> MetricsFile:
    """A file of a run with three steps an epoch."""
    metrics = MetricsFile(run_dir, step=0, steps_per_epoch=3)
    write_steps(metrics, *steps, value=value)
    metrics.flush()
    return metrics


def test_the_file_is_a_table_of_steps_and_tags(tmp_path):
    metrics = make_file(tmp_path, 1, 2, 3, 4)
    metrics.add("test/loss", 1.5, 4)
    metrics.flush()
    assert metrics.path.read_text().splitlines() == [
        f'step,epoch,train/loss,test/loss,"{PROBE}"',
        "1,1,0.5,,0.25",
        "2,1,0.5,,0.5",
        "3,1,0.5,,0.75",
        "4,2,0.5,1.5,1.0",
    ]


def test_the_columns_do_not_depend_on_which_tag_came_first(tmp_path):
    tags = ["lr/group10", "lr/group2", "validation/loss", "test/loss", "train/loss", "own/x"]
    expected = ["train/loss", "test/loss", "validation/loss", "lr/group2", "lr/group10", "own/x"]
    for order in (tags, tags[::-1]):
        metrics = MetricsFile(tmp_path, step=0, steps_per_epoch=3)
        for step, tag in enumerate(order, 1):
            metrics.add(tag, 0.0, step)
            metrics.flush()
        header = metrics.path.read_text().partition("\n")[0]
        assert header.split(",") == ["step", "epoch", *expected]


@pytest.mark.parametrize(
    "bits", [0x3DCCCCCD, 0x00000001, 0x7F7FFFFF, 0x80000000, 0x3F800001, 0x7F800000, 0x4B7FFFFF]
)
def test_a_value_reads_back_to_the_same_bits(tmp_path, bits):
    (value,) = struct.unpack("f", struct.pack("I", bits))
    metrics = MetricsFile(tmp_path, step=0, steps_per_epoch=3)
    metrics.add("train/loss", value, 1)
    metrics.flush()

    cell = metrics.path.read_text().splitlines()[1].split(",")[2]
    assert struct.unpack("I", struct.pack("f", float(cell))) == (bits,)


def test_a_value_that_is_no_number_is_written(tmp_path):
    make_file(tmp_path, 1, value=math.nan)
    assert math.isnan(read_metrics(tmp_path)[1]["train/loss"])


def test_the_file_equals_what_tensorboard_shows(tmp_path):
    run = TrackedRun(tmp_path)
    for step in range(1, 8):
        run.update(step, loss=1 / step)
    run.tracker.record_evaluation(7, {"loss": 1 / 3, "accuracy": 2 / 3})
    run.tracker.flush()
    assert read_metrics(tmp_path) == read_records_by_step(tmp_path)
    assert len(read_metrics(tmp_path)) == 7


@pytest.mark.parametrize("resumed_at", [0, 1, 4, 6])
@pytest.mark.parametrize("num_lost_bytes", [0, 1, 7])
def test_a_resume_cuts_off_the_rows_that_are_done_again(tmp_path, resumed_at, num_lost_bytes):
    killed = make_file(tmp_path, *range(1, 8))
    os.truncate(killed.path, killed.path.stat().st_size - num_lost_bytes)

    resumed = MetricsFile(tmp_path, resumed_at, steps_per_epoch=3)
    assert len(read_metrics(tmp_path)) == resumed_at
    write_steps(resumed, *range(resumed_at + 1, 10))
    resumed.flush()

    make_file(tmp_path / "whole", *range(1, 10))
    assert resumed.path.read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_the_row_of_the_resumed_step_can_get_its_evaluation(tmp_path):
    make_file(tmp_path, 1, 2, 3)
    for _ in range(2):  # the first start is killed before its checkpoint
        resumed = MetricsFile(tmp_path, step=2, steps_per_epoch=3)
        resumed.add("test/loss", 1.5, 2)
        write_steps(resumed, 3)
        resumed.flush()
        assert read_metrics(tmp_path) == {
            1: {"train/loss": 0.5, PROBE: 0.25},
            2: {"train/loss": 0.5, PROBE: 0.5, "test/loss": 1.5},
            3: {"train/loss": 0.5, PROBE: 0.75},
        }


def test_columns_of_a_changed_recipe_are_added(tmp_path):
    make_file(tmp_path, 1, 2)
    resumed = MetricsFile(tmp_path, step=2, steps_per_epoch=3)
    resumed.add("train/accuracy", 0.75, 3)
    resumed.flush()
    assert read_metrics(tmp_path) == {
        1: {"train/loss": 0.5, PROBE: 0.25},
        2: {"train/loss": 0.5, PROBE: 0.5},
        3: {"train/accuracy": 0.75},
    }


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"\xff\xfe\n1\n"), "is damaged"),
        (lambda path: path.write_text(path.read_text().replace("5,1", "5,1,1")), ""),
        (lambda path: path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n"), ""),
    ],
    ids=["missing", "no table", "a row with a cell too many", "rows missing at the end"],
)
def test_a_file_that_cannot_be_continued_is_written_from_the_event_files(
    tmp_path, capsys, damage, line
):
    first = TrackedRun(tmp_path)
    for step in range(1, 8):
        first.update(step, loss=step)
    first.tracker.record_evaluation(5, {"loss": 0.5})
    first.tracker.flush()
    damage(tmp_path / "metrics.csv")
    capsys.readouterr()

    second = TrackedRun(tmp_path, step=5)
    output = capsys.readouterr().out
    assert line in output
    assert output.count("\n") == bool(line)
    assert list(read_metrics(tmp_path)) == [1, 2, 3, 4, 5]

    second.update(6)
    second.tracker.flush()
    assert read_metrics(tmp_path) == read_records_by_step(tmp_path)


@pytest.mark.parametrize("room", [0, 1, 10, 100])
@pytest.mark.parametrize("tag", ["train/loss", "test/loss"])
def test_what_a_full_disk_refuses_is_written_once_there_is_room(tmp_path, room, tag):
    """A limit on the size of files stands for a disk. A new tag makes the file be written anew."""

    def write() -> None:
        metrics = make_file(tmp_path, 1, 2)
        flushed = metrics.path.read_bytes()
        for step in range(3, 30):
            metrics.add(tag, 0.25, step)

        _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(flushed) + room, hard_limit))
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                metrics.flush()
            assert metrics.path.read_bytes()[: len(flushed)] == flushed

        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
        metrics.add(tag, 0.25, 30)
        metrics.flush()

    assert in_child(write) == 0
    rows = read_metrics(tmp_path)
    assert list(rows) == list(range(1, 31))
    assert rows[2] == {"train/loss": 0.5, PROBE: 0.5}
    assert all(rows[step] == {tag: 0.25} for step in range(3, 31))


def test_rows_are_flushed_every_five_seconds_when_they_are_complete(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(metrics_file, "time", clock)

    metrics = MetricsFile(tmp_path, step=0, steps_per_epoch=3)
    write_steps(metrics, 1)
    clock.now += 4.9
    write_steps(metrics, 2)
    assert read_metrics(tmp_path) == {}
    clock.now += 0.2
    write_steps(metrics, 3)
    assert list(read_metrics(tmp_path)) == [1, 2]


def test_add_does_not_fail_on_a_full_disk(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(metrics_file, "time", clock)
    metrics = make_file(tmp_path, 1)

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "append", refuse)
        for step in range(2, 6):
            clock.now += 6
            write_steps(metrics, step)
    metrics.flush()
    assert list(read_metrics(tmp_path)) == [1, 2, 3, 4, 5]


def test_a_part_of_the_file_can_be_read(tmp_path):
    metrics = make_file(tmp_path, 1, 2, 3, 4)
    assert [row["step"] for row in read_rows(metrics.path, first_step=3)] == [3, 4]
    assert read_rows(metrics.path, first_step=4) == [
        {"step": 4, "epoch": 2, "train/loss": 0.5, PROBE: 1.0}
    ]
    assert read_rows(metrics.path, first_step=5) == []
    assert read_rows(tmp_path / "no file", first_step=1) == []
