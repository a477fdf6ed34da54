"""Copies the records of a run up to a step, for a run that is forked from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from lrd.tracking import metrics_file
from lrd.tracking.event_file import EventFile, parse_record, record_offsets

# How the tags of what a run says of itself begin: the fork says it of itself.
_OF_THE_RUN = ("recipe/", "_hparams_/")


def copy_records(parent: Path, run_dir: Path, last: int, texts: Sequence[Summary]) -> None:
    """Begin the records of a fork with those of its parent.

    Args:
        parent: the run directory of the parent.
        run_dir: that of the fork.
        last: the last step whose records are copied.
        texts: what is recorded of the fork itself.

    Raises:
        OSError: a file cannot be read or written.
    """
    events = EventFile(run_dir, purge_step=0)
    for text in texts:
        events.add(text, step=0)
    for event in _valid_events(parent, last):
        events.add_event(event)
    events.flush()
    metrics_file.copy_rows(parent, run_dir, last)


def _valid_events(run_dir: Path, last: int) -> list[Event]:
    """The summaries up to a step that no later start of the run has made void."""
    events: list[Event] = []
    for path in sorted(run_dir.glob("events.out.tfevents.*.*")):
        content = path.read_bytes() if path.is_file() else b""
        for offset in record_offsets(content):
            event = parse_record(content, offset)
            if event is None:  # TensorBoard reads no further either
                break
            if event.HasField("session_log"):
                events = [earlier for earlier in events if earlier.step < event.step]
            if event.HasField("summary") and event.step <= last and not _is_of_the_run(event):
                events.append(event)
    return events


def _is_of_the_run(event: Event) -> bool:
    return any(value.tag.startswith(_OF_THE_RUN) for value in event.summary.value)
