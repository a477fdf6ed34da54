"""TensorBoard event files: a writer that loses no record when the disk is full, and a reader."""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from lrd import files

_SECONDS_BETWEEN_FLUSHES = 5.0

# A record is its length (uint64), the length's checksum, the content, and the content's checksum.
_HEADER_BYTES = 12
_FOOTER_BYTES = 4


class EventFile:
    """Appends records to a new event file.

    Records wait in memory until they are flushed. What a full disk refuses stays in memory and is
    written as soon as there is room.

    TensorBoard reads the event files of a folder in the order of their names, which begin with a
    time. If a run is started again on a host whose clock is behind, or twice within a second, this
    order would be wrong. The time in the new file's name is therefore later than that of every
    file in the folder.

    Args:
        folder: the run directory.
        purge_step: TensorBoard drops records of this and later steps that earlier files contain.

    Attributes:
        path: the event file.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{_next_file_time(folder):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.path = folder / f"events.out.tfevents.{name}"

        self._pending = io.BytesIO()  # records that are not in the file yet
        self._record_writer = RecordWriter(self._pending)
        self._valid_size = 0  # bytes of the file that are complete records
        self._last_flush = time.monotonic()  # seconds

        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, step: int) -> None:
        """Add a record, and flush if the last flush was more than five seconds ago."""
        self._append(Event(step=step, summary=summary))

        if time.monotonic() - self._last_flush > _SECONDS_BETWEEN_FLUSHES:
            try:
                self.flush()
            except OSError:
                # The records are kept. A caller who needs them on disk calls `flush` itself.
                self._last_flush = time.monotonic()

    def add_event(self, event: Event) -> None:
        """Add a record of another file as it is."""
        self._record_writer.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand all records to the file system.

        Raises:
            OSError: they could not be written; the error names the file. The records are kept, and
                the next flush tries again.
        """
        self._valid_size = files.append(self.path, self._pending.getvalue(), self._valid_size)
        self._pending.seek(0)
        self._pending.truncate()
        self._last_flush = time.monotonic()

    def sync(self) -> None:
        """Wait until all flushed records are on the disk."""
        files.sync(self.path)

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        self._record_writer.write(event.SerializeToString())


def _next_file_time(folder: Path) -> int:
    """The present time in seconds, or one second later than the latest event file in the folder."""
    file_time = int(time.time())
    for path in folder.glob("events.out.tfevents.*.*"):
        number = path.name.split(".")[3]
        if number.isdecimal():
            file_time = max(file_time, int(number) + 1)
    return file_time


def read_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Read all scalars of a run as TensorBoard does.

    This reads all event files of the run, which takes a while for a long run.

    Returns:
        The (step, value) pairs of each tag.
    """
    # Imported here, because its import takes a while and training rarely needs it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def read_scalars_since(run_dir: Path, first_step: int) -> dict[int, dict[str, float]]:
    """Read the last scalars of a run.

    Only the records of these steps are parsed, so this takes far less time than `read_scalars`.

    Args:
        run_dir: the run directory.
        first_step: the scalars of this and later steps are read.

    Returns:
        step -> tag -> value, which is a float32. What a later start made void is left out.
    """
    scalars: dict[int, dict[str, float]] = {}
    void_from: int | None = None  # the first step that a later start has made void
    for path in sorted(run_dir.glob("events.out.tfevents.*.*"), reverse=True):
        content = path.read_bytes() if path.is_file() else b""
        start = void_from
        for offset in reversed(list(record_offsets(content))):
            event = parse_record(content, offset)
            if event is None:
                continue
            if event.HasField("session_log"):
                start = event.step if start is None else min(start, event.step)
            if not event.HasField("summary"):
                continue
            if 0 < event.step < first_step:
                return scalars

            is_void = void_from is not None and event.step >= void_from
            for value in [] if is_void or event.step == 0 else event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(event.step, {}).setdefault(value.tag, value.simple_value)
        void_from = start
    return scalars


def record_offsets(content: bytes) -> Iterator[int]:
    """Where in an event file each complete record begins. What is in them is not looked at."""
    position = 0
    while position + _HEADER_BYTES + _FOOTER_BYTES <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        following = position + _HEADER_BYTES + length + _FOOTER_BYTES
        if following > len(content):
            return
        yield position
        position = following


def parse_record(content: bytes, offset: int) -> Event | None:
    """The event in a record of an event file; None if the record is damaged."""
    (length,) = struct.unpack_from("<Q", content, offset)
    start = offset + _HEADER_BYTES
    raw = content[start : start + length]
    (checksum,) = struct.unpack_from("<I", content, start + length)
    if masked_crc32c(raw) != checksum:
        return None

    event = Event()
    event.ParseFromString(raw)
    return event
