"""Event files: read in the right order, no record lost on a full disk, none written twice."""

from __future__ import annotations

import errno
import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard.summary import scalar

from lrd.tracking.event_file import EventFile
from tests.helpers.processes import in_child
from tests.helpers.tensorboard_events import read_scalars

DAY = 86_400  # seconds


def add(events: EventFile, *steps: int, value: float = 0.0) -> None:
    for step in steps:
        events.add(scalar("loss", value), step)


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """The (step, value) pairs that TensorBoard shows."""
    return read_scalars(folder).get("loss", [])


def steps_in_file(path: Path) -> list[int]:
    """The steps of a file's records in their order, without the two records at its beginning."""
    version, start, *rest = EventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    assert start.HasField("session_log")
    return [event.step for event in rest]


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder in the order in which TensorBoard reads them."""
    return sorted(folder.glob("events.out.tfevents.*"))


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock in place of the `time` module, whose `now` and `running` a test can set."""
    clock = SimpleNamespace(now=time.time(), running=100.0)
    clock.time = lambda: clock.now
    clock.monotonic = lambda: clock.running
    monkeypatch.setattr("lrd.tracking.event_file.time", clock)
    return clock


def test_records_can_be_read_after_a_flush(tmp_path):
    events = EventFile(tmp_path / "run", purge_step=0)
    add(events, 1, 2, value=0.5)
    assert not events.path.exists() or events.path.stat().st_size == 0

    events.flush()
    events.sync()
    assert read_losses(tmp_path / "run") == [(1, 0.5), (2, 0.5)]

    add(events, 3, value=0.25)
    assert read_losses(tmp_path / "run") == [(1, 0.5), (2, 0.5)]

    events.flush()
    events.flush()
    assert read_losses(tmp_path / "run") == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert steps_in_file(events.path) == [1, 2, 3]


@pytest.mark.parametrize("change", [0, -DAY, DAY, 0.4])
def test_a_new_file_is_read_after_all_earlier_files(tmp_path, clock, change):
    paths = []
    for _ in range(4):
        events = EventFile(tmp_path, purge_step=0)
        events.flush()
        paths.append(events.path)
        clock.now += change

    assert len(set(paths)) == 4
    assert event_files(tmp_path) == paths


def test_event_files_of_other_programs_are_no_obstacle(tmp_path, clock):
    without_time = "events.out.tfevents.x.host"
    later = f"events.out.tfevents.{int(clock.now) + 7}.host.1.0"
    for name in (without_time, "events.out.tfevents.", later):
        (tmp_path / name).touch()

    events = EventFile(tmp_path, purge_step=0)
    events.flush()
    names = [path.name for path in event_files(tmp_path) if path.name != without_time]
    assert names[-1] == events.path.name


@pytest.mark.parametrize("change", [0, -DAY, DAY])
def test_each_step_is_shown_once_after_many_starts(tmp_path, clock, change):
    expected: dict[int, float] = {}
    for number, start in enumerate((0, 3, 3, 1, 4, 2)):
        steps = range(start + 1, start + 5)
        events = EventFile(tmp_path, purge_step=start + 1 if start else 0)
        add(events, *steps, value=number)
        events.flush()
        clock.now += change

        expected = {step: value for step, value in expected.items() if step <= start}
        expected.update(dict.fromkeys(steps, float(number)))
        assert read_losses(tmp_path) == sorted(expected.items())


def test_a_start_from_the_beginning_drops_all_earlier_records(tmp_path, clock):
    first = EventFile(tmp_path, purge_step=0)
    add(first, 0, 1, 2, value=1.0)
    first.flush()

    clock.now -= DAY
    second = EventFile(tmp_path, purge_step=0)
    add(second, 0, value=2.0)
    second.flush()
    assert read_losses(tmp_path) == [(0, 2.0)]


@pytest.mark.parametrize("room", [0, 1, 40, 200])
def test_what_a_full_disk_refuses_is_written_once_there_is_room(tmp_path, room):
    """A limit on the size of files stands for a disk with `room` bytes left."""

    def write() -> None:
        events = EventFile(tmp_path, purge_step=0)
        add(events, 1, 2)
        events.flush()
        flushed = events.path.read_bytes()
        add(events, 3, 4, 5, 6, 7, 8)

        _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(flushed) + room, hard_limit))
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                events.flush()
            assert events.path.read_bytes()[: len(flushed)] == flushed
            assert events.path.stat().st_size <= len(flushed) + room

        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
        add(events, 9)
        events.flush()
        add(events, 10)
        events.flush()

    assert in_child(write) == 0
    (path,) = event_files(tmp_path)
    assert steps_in_file(path) == list(range(1, 11))
    assert [step for step, _ in read_losses(tmp_path)] == list(range(1, 11))


class FaultyStream:
    """An open file with another `write`."""

    def __init__(self, stream: IO[bytes], write: Callable[[IO[bytes], bytes], int]) -> None:
        self.stream = stream
        self.write = functools.partial(write, stream)

    def __enter__(self) -> FaultyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@pytest.fixture
def replace_write(monkeypatch) -> Callable[..., AbstractContextManager[None]]:
    """A context in which all files are written by a function of the open file and the bytes."""
    real_open = Path.open

    @contextmanager
    def replace(write: Callable[[IO[bytes], bytes], int]) -> Iterator[None]:
        def open_faulty(path: Path, *arguments: Any, **options: Any) -> FaultyStream:
            return FaultyStream(real_open(path, *arguments, **options), write)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_faulty)
            yield

    return replace


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.99, 1])
def test_a_write_that_fails_midway_writes_no_record_twice(tmp_path, replace_write, fraction):
    events = EventFile(tmp_path, purge_step=0)
    add(events, 1)
    events.flush()
    add(events, 2, 3)

    def write_and_fail(stream: IO[bytes], content: bytes) -> int:
        stream.write(content[: int(len(content) * fraction)])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for _ in range(3):
        with replace_write(write_and_fail), pytest.raises(OSError, match=os.strerror(errno.EIO)):
            events.flush()

    events.flush()
    assert steps_in_file(events.path) == [1, 2, 3]


def test_a_write_in_many_parts_loses_nothing(tmp_path, replace_write):
    events = EventFile(tmp_path, purge_step=0)
    add(events, *range(1, 30))

    with replace_write(lambda stream, content: stream.write(content[:7])):
        events.flush()
    assert steps_in_file(events.path) == list(range(1, 30))


@pytest.mark.parametrize("num_lost_bytes", [1, 5, 30])
def test_an_incomplete_record_of_a_killed_process_hides_no_other(tmp_path, clock, num_lost_bytes):
    killed = EventFile(tmp_path, purge_step=0)
    add(killed, 1, 2, 3)
    killed.flush()
    os.truncate(killed.path, killed.path.stat().st_size - num_lost_bytes)

    resumed = EventFile(tmp_path, purge_step=3)
    add(resumed, 3, 4, 5, value=1.0)
    resumed.flush()
    assert read_losses(tmp_path) == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 1.0)]


@pytest.mark.parametrize("size", [0, 3, 12])
def test_an_incomplete_beginning_of_a_file_hides_no_record(tmp_path, clock, size):
    first = EventFile(tmp_path, purge_step=0)
    add(first, 1, 2)
    first.flush()

    killed = EventFile(tmp_path, purge_step=2)
    killed.flush()
    os.truncate(killed.path, size)

    resumed = EventFile(tmp_path, purge_step=2)
    add(resumed, 2, 3, value=1.0)
    resumed.flush()
    assert read_losses(tmp_path) == [(1, 0.0), (2, 1.0), (3, 1.0)]


def test_records_are_flushed_every_five_seconds(tmp_path, clock):
    events = EventFile(tmp_path, purge_step=0)
    add(events, 1)
    clock.running += 4.9
    add(events, 2)
    assert read_losses(tmp_path) == []

    clock.running += 0.2
    add(events, 3)
    assert [step for step, _ in read_losses(tmp_path)] == [1, 2, 3]

    clock.running += 4.9
    add(events, 4)
    assert [step for step, _ in read_losses(tmp_path)] == [1, 2, 3]


def test_add_does_not_fail_on_a_full_disk(tmp_path, clock, monkeypatch):
    events = EventFile(tmp_path, purge_step=0)
    attempts = []

    def refuse(path, *_, **__):
        attempts.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        for step, seconds in enumerate((6, 1, 1, 6), 1):
            clock.running += seconds
            add(events, step)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            events.flush()
    assert len(attempts) == 3  # two of `add`, one of `flush`

    clock.running += 6
    add(events, 5)
    assert steps_in_file(events.path) == [1, 2, 3, 4, 5]
