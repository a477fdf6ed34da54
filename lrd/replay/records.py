"""The scalars of a run, compared with those of a replay or of another run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrd.tracking.event_file import read_scalars

_EVALUATIONS = ("test/", "validation/")  # how the tags of evaluations begin

Records = Mapping[int, Mapping[str, float]]  # step -> tag -> value, a float32

# How the tags of times begin, which differ from run to run.
_TIMES = ("train/images_per_second", "ranks/")


@dataclass(frozen=True)
class RecordDifference:
    """The first record that differs.

    Attributes:
        step: the step.
        tag: the tag of the first one.
        values: both; None where there is no record.
        tags: of all records of the step that differ.
    """

    step: int
    tag: str
    values: tuple[float | None, float | None]
    tags: tuple[str, ...]

    def describe(self) -> str:
        """In one line."""
        shown = ["missing" if value is None else f"{value:.9g}" for value in self.values]
        text = f"step {self.step}: {self.tag} is {shown[0]} and {shown[1]}"
        return f"{text} ({len(self.tags)} records differ)" if len(self.tags) > 1 else text

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tag": self.tag,
            "values": list(self.values),
            "tags": list(self.tags),
        }


def read_records(run_dir: Path) -> dict[int, dict[str, float]]:
    """The scalars of a run by step and tag, without those that are times."""
    records: dict[int, dict[str, float]] = {}
    for tag, points in read_scalars(run_dir).items():
        if tag.startswith(_TIMES):
            continue
        for step, value in points:
            records.setdefault(step, {})[tag] = value
    return records


def has_evaluation(records: Records, step: int) -> bool:
    """Whether there is a record of an evaluation after a step."""
    return any(tag.startswith(_EVALUATIONS) for tag in records.get(step, {}))


def find_difference(
    first: Records,
    second: Records,
    steps: range,
    tolerance: float = 0.0,
    only_common: bool = False,
) -> RecordDifference | None:
    """The first step, in a range, whose records differ.

    Args:
        first, second: the records.
        steps: the steps to compare.
        tolerance: relative difference that does not count; 0: all bits count.
        only_common: whether a record that only one of them has is no difference.
    """
    for step in sorted(step for step in {*first, *second} if step in steps):
        values = first.get(step, {})
        others = second.get(step, {})
        tags = sorted(tag for tag in {*values, *others} if not tag.startswith(_TIMES))
        if only_common:
            tags = [tag for tag in tags if tag in values and tag in others]

        differing = [
            tag for tag in tags if not _is_same(values.get(tag), others.get(tag), tolerance)
        ]
        if differing:
            tag = differing[0]
            pair = (values.get(tag), others.get(tag))
            return RecordDifference(step, tag, pair, tuple(differing))
    return None


def _is_same(first: float | None, second: float | None, tolerance: float) -> bool:
    if first is None or second is None:
        return first is second
    if math.isnan(first) or math.isnan(second):
        return math.isnan(first) and math.isnan(second)
    return first == second or abs(first - second) <= tolerance * max(abs(first), abs(second))
