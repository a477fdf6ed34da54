"""The event file: read in the right order, no record lost on a full disk, none written twice."""

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
from launching import scalars
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from test_checkpoint_crash import in_child
from torch.utils.tensorboard.summary import scalar

from lrd.events import EventFile

DAY = 86_400


def add(events: EventFile, *steps: int, value: float = 0.0) -> None:
    for step in steps:
        events.add(scalar("loss", value), step)


def losses(folder: Path) -> list[tuple[int, float]]:
    return scalars(folder).get("loss", [])


def records(path: Path) -> list[int]:
    """The steps of a file's records as they stand in it, without the two that every file begins with."""
    version, start, *rest = EventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    assert start.HasField("session_log")
    return [event.step for event in rest]


def files(folder: Path) -> list[Path]:
    """In the order in which TensorBoard reads them."""
    return sorted(folder.glob("events.out.tfevents.*"))


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """What the module takes for the time: `time.now` and `time.running`, for a test to set."""
    clock = SimpleNamespace(now=time.time(), running=100.0)
    clock.time, clock.monotonic = lambda: clock.now, lambda: clock.running
    monkeypatch.setattr("lrd.events.time", clock)
    return clock


def test_what_is_flushed_can_be_read_back(tmp_path):
    events = EventFile(tmp_path / "run", 0)
    add(events, 1, 2, value=0.5)
    assert not events.path.exists() or events.path.stat().st_size == 0
    events.flush()
    events.sync()
    assert losses(tmp_path / "run") == [(1, 0.5), (2, 0.5)]
    add(events, 3, value=0.25)
    assert losses(tmp_path / "run") == [(1, 0.5), (2, 0.5)]
    events.flush()
    events.flush()
    assert losses(tmp_path / "run") == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert records(events.path) == [1, 2, 3]


@pytest.mark.parametrize("change", [0, -DAY, DAY, 0.4])
def test_a_new_file_is_read_after_all_that_are_there(tmp_path, clock, change):
    opened = []
    for _ in range(4):
        opened.append(EventFile(tmp_path, 0))
        opened[-1].flush()
        clock.now += change
    assert len(set(opened)) == 4
    assert files(tmp_path) == [events.path for events in opened]


def test_files_of_others_do_not_hinder(tmp_path, clock):
    names = ("events.out.tfevents.x.host", "events.out.tfevents.", f"events.out.tfevents.{int(clock.now) + 7}.host.1.0")
    for name in names:
        (tmp_path / name).touch()
    events = EventFile(tmp_path, 0)
    events.flush()
    assert max(path.name for path in files(tmp_path) if path.name != names[0]) == events.path.name


@pytest.mark.parametrize("change", [0, -DAY, DAY])
def test_each_step_is_shown_once_after_many_starts(tmp_path, clock, change):
    shown: dict[int, float] = {}
    for number, start in enumerate((0, 3, 3, 1, 4, 2)):
        events = EventFile(tmp_path, start + 1 if start else 0)
        steps = range(start + 1, start + 5)
        add(events, *steps, value=number)
        events.flush()
        shown = {step: value for step, value in shown.items() if step <= start} | dict.fromkeys(steps, float(number))
        clock.now += change
        assert losses(tmp_path) == sorted(shown.items())


def test_a_start_from_the_beginning_voids_all(tmp_path, clock):
    first = EventFile(tmp_path, 0)
    add(first, 0, 1, 2, value=1.0)
    first.flush()
    clock.now -= DAY
    second = EventFile(tmp_path, 0)
    add(second, 0, value=2.0)
    second.flush()
    assert losses(tmp_path) == [(0, 2.0)]


@pytest.mark.parametrize("room", [0, 1, 40, 200])
def test_what_a_full_disk_refuses_is_written_once_there_is_room(tmp_path, room):
    def write() -> None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        events = EventFile(tmp_path, 0)
        add(events, 1, 2)
        events.flush()
        whole = events.path.read_bytes()
        add(events, 3, 4, 5, 6, 7, 8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, most))
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                events.flush()
            assert events.path.read_bytes()[: len(whole)] == whole
            assert events.path.stat().st_size <= len(whole) + room
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        add(events, 9)
        events.flush()
        add(events, 10)
        events.flush()

    assert in_child(write) == 0
    (path,) = files(tmp_path)
    assert records(path) == list(range(1, 11))
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 11))


class Stream:
    """An open file but for its `write`."""

    def __init__(self, stream: IO[bytes], write: Callable[[IO[bytes], bytes], int]) -> None:
        self.stream, self.write = stream, functools.partial(write, stream)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@pytest.fixture
def write_by(monkeypatch) -> Callable[..., AbstractContextManager[None]]:
    """Has all files written by a function of the open file and the bytes."""
    opened = Path.open

    @contextmanager
    def patched(write: Callable[[IO[bytes], bytes], int]) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, *how, **more: Stream(opened(path, *how, **more), write))
            yield

    return patched


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99, 1])
def test_a_write_that_fails_midway_writes_no_record_twice(tmp_path, write_by, part):
    events = EventFile(tmp_path, 0)
    add(events, 1)
    events.flush()
    add(events, 2, 3)

    def write(stream: IO[bytes], content: bytes) -> int:
        stream.write(content[: int(len(content) * part)])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for _ in range(3):
        with write_by(write), pytest.raises(OSError, match=os.strerror(errno.EIO)):
            events.flush()
    events.flush()
    assert records(events.path) == [1, 2, 3]


def test_a_write_in_many_parts_is_whole(tmp_path, write_by):
    events = EventFile(tmp_path, 0)
    add(events, *range(1, 30))
    with write_by(lambda stream, content: stream.write(content[:7])):
        events.flush()
    assert records(events.path) == list(range(1, 30))


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_record_that_a_killed_writer_left_in_part_hides_nothing_else(tmp_path, clock, lost):
    killed = EventFile(tmp_path, 0)
    add(killed, 1, 2, 3)
    killed.flush()
    os.truncate(killed.path, killed.path.stat().st_size - lost)
    after = EventFile(tmp_path, 3)
    add(after, 3, 4, 5, value=1.0)
    after.flush()
    assert losses(tmp_path) == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 1.0)]


@pytest.mark.parametrize("size", [0, 3, 12])
def test_a_file_that_a_killed_writer_hardly_began_hides_nothing(tmp_path, clock, size):
    first = EventFile(tmp_path, 0)
    add(first, 1, 2)
    first.flush()
    killed = EventFile(tmp_path, 2)
    killed.flush()
    os.truncate(killed.path, size)
    after = EventFile(tmp_path, 2)
    add(after, 2, 3, value=1.0)
    after.flush()
    assert losses(tmp_path) == [(1, 0.0), (2, 1.0), (3, 1.0)]


def test_records_are_handed_over_every_five_seconds(tmp_path, clock):
    events = EventFile(tmp_path, 0)
    add(events, 1)
    clock.running += 4.9
    add(events, 2)
    assert losses(tmp_path) == []
    clock.running += 0.2
    add(events, 3)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]
    clock.running += 4.9
    add(events, 4)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]


def test_a_full_disk_does_not_stop_those_who_add(tmp_path, clock, monkeypatch):
    events = EventFile(tmp_path, 0)
    tried = []

    def full(path, *_, **__):
        tried.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        for step, later in enumerate((6, 1, 1, 6), 1):
            clock.running += later
            add(events, step)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            events.flush()
    assert len(tried) == 3
    clock.running += 6
    add(events, 5)
    assert records(events.path) == [1, 2, 3, 4, 5]
