"""Finds the steps of which TensorBoard's event files have lost the records.

TensorBoard reads a file up to the first damaged record and says nothing about the rest. A start
that was killed may leave a part of a record at the end of its file. That is no loss: the next start
goes on from the newest checkpoint, and all records up to it were written before.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event

from lrd.tracking.event_file import parse_record, record_offsets

_MAX_RECORDS_TRIED = 16  # from the end of a damaged file


@dataclass(frozen=True)
class _Span:
    """The steps of one event file.

    Attributes:
        first: the first step of the start that wrote it; None if this cannot be read.
        last: the last step with a record; 0: there is none.
    """

    first: int | None
    last: int


def describe_lost_records(run_dir: Path, step: int, every_steps: int) -> list[str]:
    """A line for each gap in the records of a run.

    Args:
        run_dir: the run directory.
        step: steps done so far; the records of later ones do not count.
        every_steps: the steps between two records.
    """
    paths = sorted(run_dir.glob("events.out.tfevents.*.*"))
    lines = [f"{path}: is not a file, and not read" for path in paths if not path.is_file()]
    paths = [path for path in paths if path.is_file()]
    spans = [_read_span(path) for path in paths]

    recorded = 0  # up to this step there are records, or their loss was reported
    for i, span in enumerate(spans):
        start = recorded + 1 if span.first is None else span.first
        if start - recorded > every_steps:
            lines.append(f"{run_dir}: {_describe_gap(recorded + 1, start - 1)}")
            recorded = start - 1

        later_starts = [later.first for later in spans[i + 1 :] if later.first is not None]
        end = min([step, *(first - 1 for first in later_starts)])
        recorded = max(recorded, min(span.last, end))
        if end - recorded >= every_steps:
            lines.append(f"{paths[i]}: {_describe_gap(recorded + 1, end)}")
            recorded = end

    if not spans and step > 0:
        lines.append(f"{run_dir}: there is no event file: {_describe_gap(1, step)}")
    return lines


def _describe_gap(first: int, last: int) -> str:
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"TensorBoard's records of {steps} are missing or damaged"


def _read_span(path: Path) -> _Span:
    """Read the second and the last good record of an event file.

    The records between are only counted: to compute their checksums would take minutes for a long
    run. So a flipped bit in the middle of a file is not noticed.
    """
    content = path.read_bytes()
    start_event: Event | None = None
    latest: deque[int] = deque(maxlen=_MAX_RECORDS_TRIED)  # offsets of complete records
    for number, offset in enumerate(record_offsets(content)):
        if number == 1:
            start_event = parse_record(content, offset)
        latest.append(offset)

    # The second record says from which step on those of earlier files are void.
    if start_event is None:
        return _Span(None, 0)
    for offset in reversed(latest):
        event = parse_record(content, offset)
        if event is not None:
            is_start = event == start_event
            return _Span(max(1, start_event.step), 0 if is_start else event.step)
    return _Span(max(1, start_event.step), 0)
