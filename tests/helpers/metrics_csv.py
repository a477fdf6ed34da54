"""Reads a run's `metrics.csv` by the standard library alone."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tests.helpers.tensorboard_events import read_scalars

Rows = dict[int, dict[str, float]]  # step -> tag -> value


def read_metrics(run_dir: Path) -> Rows:
    """Read the table; an empty cell is no value. Each value is rounded to float32."""
    rows: Rows = {}
    with (run_dir / "metrics.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            step = int(row.pop("step"))
            assert step not in rows, f"step {step} has two rows"
            assert int(row.pop("epoch")) >= 1
            rows[step] = {tag: float(np.float32(cell)) for tag, cell in row.items() if cell}
    return rows


def read_records_by_step(run_dir: Path) -> Rows:
    """What TensorBoard shows, in the same form."""
    rows: Rows = {}
    for tag, points in read_scalars(run_dir).items():
        for step, value in points:
            rows.setdefault(step, {})[tag] = value
    return dict(sorted(rows.items()))
