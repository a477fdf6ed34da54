"""What is shown while a study runs."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from lrd import console
from lrd.checkpoint.run_records import describe_seconds
from lrd.study.grid import GridRun, RunState
from lrd.tracking.metrics_file import FILE_NAME

_SECONDS_BETWEEN_READS = 1.0
_SECONDS_BEFORE_FIRST_LINE = 10.0  # without a terminal
_MOST_SECONDS_BETWEEN_LINES = 60.0
_TAIL_BYTES = 1 << 16  # of a run's metrics that are read


@dataclass
class Position:
    """How far a run is.

    Attributes:
        step: the last step that is recorded.
        epoch: its epoch, from 1.
        accuracy: the test accuracy of the last evaluation that was seen.
    """

    step: int = 0
    epoch: int = 0
    accuracy: float | None = None


class GridProgress:
    """Shows which run of how many runs, how far it is, and the time left for all of them.

    In a terminal there is a line for each run that is running. Otherwise a plain line is printed:
    after ten seconds, then more and more rarely, at last once a minute.

    Args:
        runs: all runs that are to be done here.
        states: what has been done of them; whoever runs them brings it up to date.
    """

    def __init__(self, runs: list[GridRun], states: dict[GridRun, RunState]) -> None:
        self._runs = runs
        self._states = states
        self._began = time.monotonic()
        self._last_read = self._began
        self._last_line = self._began
        self._seconds_to_next_line = _SECONDS_BEFORE_FIRST_LINE

        # Steps of earlier starts say nothing about the speed of this one.
        self._positions: dict[GridRun, Position] = {}
        self._steps_before = sum(self._count_steps(run) for run in runs)

        self._bars: Progress | None = None
        self._whole = TaskID(0)
        self._tasks: dict[GridRun, TaskID] = {}
        if console.stdout.is_terminal:
            columns = [
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[figures]}", markup=False),
            ]
            if console.stdout.width >= 80:
                columns.insert(1, BarColumn(12))  # type: ignore[arg-type]
            self._bars = Progress(*columns, console=console.stdout)
            self._whole = self._bars.add_task("", total=self._total_steps(), figures="")

    def __enter__(self) -> GridProgress:
        if self._bars is not None:
            self._bars.start()
            self._show([])
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, running: list[GridRun]) -> None:
        """Look how far the runs are, at most once a second, and show it.

        Args:
            running: the runs that are running.
        """
        now = time.monotonic()
        if now - self._last_read < _SECONDS_BETWEEN_READS:
            return
        self._last_read = now

        for run in running:
            position = read_position(run.run_dir)
            if position.accuracy is None and run in self._positions:
                position.accuracy = self._positions[run].accuracy
            self._positions[run] = position
        self._show(running)

    def _show(self, running: list[GridRun]) -> None:
        num_done = sum(self._states[run].is_done for run in self._runs)
        description = f"{num_done} of {len(self._runs)} runs done"
        left = self._describe_time_left()

        if self._bars is None:
            self._print_lines(running, f"{description}{', ' if left else ''}{left}")
            return

        steps = sum(self._count_steps(run) for run in self._runs)
        self._bars.update(self._whole, completed=steps, description=description, figures=left)
        for run in [run for run in self._tasks if run not in running]:
            self._bars.remove_task(self._tasks.pop(run))
        for run in running:
            if run not in self._tasks:
                self._tasks[run] = self._bars.add_task("", total=run.total_steps, figures="")
            position = self._positions.get(run, Position())
            self._bars.update(
                self._tasks[run],
                completed=position.step,
                description=f"  {run.name}",
                figures=self._describe_position(run),
            )

    def _print_lines(self, running: list[GridRun], summary: str) -> None:
        now = time.monotonic()
        if now - self._last_line < self._seconds_to_next_line:
            return
        self._last_line = now
        self._seconds_to_next_line = min(
            2 * self._seconds_to_next_line, _MOST_SECONDS_BETWEEN_LINES
        )

        for run in running:
            number = 1 + self._runs.index(run)
            where = self._describe_position(run)
            console.info(f"run {number} of {len(self._runs)}: {run.name}: {where}; {summary}")

    def _describe_position(self, run: GridRun) -> str:
        position = self._positions.get(run, Position())
        if not position.step:
            return "starting"
        text = f"epoch {position.epoch}/{run.recipe.trainer.epochs}"
        return text if position.accuracy is None else f"{text} test acc {position.accuracy:.4f}"

    def _describe_time_left(self) -> str:
        """The time that is left at the speed of this start so far; empty if that is unknown."""
        done = sum(self._count_steps(run) for run in self._runs)
        steps_here = done - self._steps_before
        if steps_here <= 0:
            return ""
        seconds = (time.monotonic() - self._began) / steps_here * (self._total_steps() - done)
        return f"{describe_seconds(seconds)} left"

    def _total_steps(self) -> int:
        return sum(run.total_steps for run in self._runs)

    def _count_steps(self, run: GridRun) -> int:
        """Steps that need not be done any more."""
        state = self._states[run]
        if state.is_done:
            return run.total_steps
        return max(state.step, self._positions.get(run, Position()).step)


def read_position(run_dir: Path) -> Position:
    """How far a run is, by the last rows of its metrics; it may be writing them meanwhile."""
    try:
        with (run_dir / FILE_NAME).open("rb") as file:
            header = file.readline().decode(errors="replace")
            start = file.tell()
            end = file.seek(0, 2)
            file.seek(max(start, end - _TAIL_BYTES))
            is_cut = file.tell() > start
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return Position()

    # The last line is incomplete, and so is the first one of a part of the file.
    lines = lines[1:-1] if is_cut else lines[:-1]
    columns = next(csv.reader([header]), [])
    position = Position()
    for line in lines:
        row = dict(zip(columns, line.split(","), strict=False))
        try:
            position.step = int(row["step"])
            position.epoch = int(row["epoch"])
            if row.get("test/accuracy"):
                position.accuracy = float(row["test/accuracy"])
        except (KeyError, ValueError):
            continue
    return position
