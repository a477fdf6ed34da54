"""One event file of TensorBoard that loses no record: what a full disk refuses is written when there is room again."""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from lrd.errors import first_line

_SECONDS_BETWEEN_FLUSHES = 5.0


class EventFile:
    """Appends records to a new event file in `folder`. Records wait in memory until `flush`.

    TensorBoard reads a folder's event files in the order of their names, and these begin with a time. A start on a
    host whose clock is behind, or two starts within a second, would be read in the wrong order; so the new file's
    time is later than that of any that is there.

    Args:
        folder: the run directory.
        purge_step: records of this and later steps in earlier files are void.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = (path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*.*"))
        began = max([int(time.time()), *(int(number) + 1 for number in earlier if number.isdecimal())])
        self.path = folder / f"events.out.tfevents.{began:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._pending = io.BytesIO()
        self._records = RecordWriter(self._pending)
        self._whole = 0  # bytes of the file that are whole records
        self._flushed = time.monotonic()
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, step: int) -> None:
        """Add a record; now and then hand all to the file system, for those who look on."""
        self._append(Event(step=step, summary=summary))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            try:
                self.flush()
            except OSError:
                self._flushed = time.monotonic()  # kept; who must know asks by `flush`

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand all records to the file system.

        Raises:
            OSError: they could not be written, names the file; they are kept for the next time.
        """
        try:
            self._write()
        except OSError as error:
            raise OSError(error.errno, first_line(error), str(self.path)) from error
        self._flushed = time.monotonic()

    def _write(self) -> None:
        with self.path.open("ab", buffering=0) as stream:
            if stream.tell() > self._whole:
                stream.truncate(self._whole)  # a write that failed left part of a record
            content = self._pending.getvalue()
            written = 0
            while written < len(content):
                written += stream.write(content[written:])
        self._whole += len(content)
        self._pending.seek(0)
        self._pending.truncate()

    def sync(self) -> None:
        """Have what was flushed on the disk."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
