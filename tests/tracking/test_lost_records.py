"""Records that TensorBoard cannot read any more are reported when a run is resumed."""

import os
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard.summary import scalar

from lrd.tracking.event_file import EventFile, read_scalars
from lrd.tracking.lost_records import describe_lost_records


def write_start(run_dir: Path, first: int, last: int) -> Path:
    """The event file of a start that went on from `first - 1` steps and did those up to `last`."""
    events = EventFile(run_dir, purge_step=first if first > 1 else 0)
    for step in range(first, last + 1):
        events.add(scalar("train/loss", 1.0 / step), step)
    events.flush()
    return events.path


def readable_steps(run_dir: Path) -> set[int]:
    """The steps that TensorBoard's own reader finds."""
    return {step for step, _ in read_scalars(run_dir).get("train/loss", [])}


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


@pytest.mark.parametrize("step", [0, 20, 30])
def test_nothing_is_reported_of_complete_files(tmp_path, step):
    if step:
        write_start(tmp_path, 1, 20)
    if step > 20:
        write_start(tmp_path, 21, 30)
    assert describe_lost_records(tmp_path, step, every_steps=1) == []


def test_nothing_is_reported_of_a_start_that_was_killed_after_its_checkpoint(tmp_path):
    killed = write_start(tmp_path, 1, 25)
    with killed.open("ab") as stream:
        stream.write(b"\x30\0\0\0\0\0\0\0abc")
    assert describe_lost_records(tmp_path, 20, every_steps=1) == []

    write_start(tmp_path, 21, 30)
    assert describe_lost_records(tmp_path, 30, every_steps=1) == []


def test_steps_without_a_record_are_no_loss_if_not_all_are_recorded(tmp_path):
    events = EventFile(tmp_path, purge_step=0)
    for step in (10, 20):
        events.add(scalar("train/loss", 1.0), step)
    events.flush()
    assert describe_lost_records(tmp_path, 25, every_steps=10) == []
    assert len(describe_lost_records(tmp_path, 40, every_steps=10)) == 1


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.99])
def test_what_tensorboard_cannot_read_of_a_truncated_file_is_named(tmp_path, share):
    first = write_start(tmp_path, 1, 20)
    write_start(tmp_path, 21, 30)
    cut(first, share)

    lost = sorted(set(range(1, 31)) - readable_steps(tmp_path))
    (line,) = describe_lost_records(tmp_path, 30, every_steps=1)

    steps = f"step {lost[0]}" if len(lost) == 1 else f"steps {lost[0]} to {lost[-1]}"
    assert line.startswith(str(tmp_path))
    assert f"records of {steps} are missing or damaged" in line


def test_garbage_in_the_middle_hides_the_rest_of_its_file(tmp_path):
    path = write_start(tmp_path, 1, 20)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :][:200] = b""
    path.write_bytes(content[: len(content) // 2] + 200 * b"\xff" + content[len(content) // 2 :])

    last = max(readable_steps(tmp_path))
    (line,) = describe_lost_records(tmp_path, 20, every_steps=1)
    assert line == f"{path}: TensorBoard's records of steps {last + 1} to 20 are missing or damaged"


def test_files_that_were_deleted_are_missed(tmp_path):
    first = write_start(tmp_path, 1, 20)
    second = write_start(tmp_path, 21, 30)
    first.unlink()
    (line,) = describe_lost_records(tmp_path, 30, every_steps=1)
    assert "records of steps 1 to 20 are" in line

    second.unlink()
    (line,) = describe_lost_records(tmp_path, 30, every_steps=1)
    assert line == (
        f"{tmp_path}: there is no event file: "
        "TensorBoard's records of steps 1 to 30 are missing or damaged"
    )


def test_what_is_no_file_is_named_and_not_opened(tmp_path):
    write_start(tmp_path, 1, 20)
    fifo = tmp_path / "events.out.tfevents.0000000001.host.1.0"
    os.mkfifo(fifo)
    assert describe_lost_records(tmp_path, 20, every_steps=1) == [
        f"{fifo}: is not a file, and not read"
    ]


def test_a_long_file_is_read_in_a_moment(tmp_path):
    write_start(tmp_path, 1, 20_000)
    began = time.monotonic()
    assert describe_lost_records(tmp_path, 20_000, every_steps=1) == []
    assert time.monotonic() - began < 2.0
