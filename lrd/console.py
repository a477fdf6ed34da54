"""What a user sees in the terminal.

The main process prints messages, tables and progress bars. Other processes print errors only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 10.0
stdout = Console()
stderr = Console(stderr=True)


def is_main_process() -> bool:
    """Whether this is the main process, by the launcher's environment.

    It can be asked before there is a process group.
    """
    return os.environ.get("RANK", "0") == "0"


def info(message: str) -> None:
    """Print a message on standard output, from the main process only."""
    if is_main_process():
        stdout.print(Text(message), soft_wrap=True)


def error(message: str) -> None:
    """Print what went wrong on standard error, from any process.

    Args:
        message: one line or several; each gets the prefix `lrd: `, by which it is found among the
            lines of a launcher.
    """
    for line in message.splitlines():
        stderr.print(Text(f"lrd: {line}", style="red"), soft_wrap=True)


def table(title: str, columns: list[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table on standard output, from the main process only.

    Args:
        title: the line above the table; empty: none.
        columns: the headings; the table has no heading row if all of them are empty.
        rows: the cells of each row; None is an empty cell.
    """
    if not is_main_process():
        return

    grid = Table(title=title or None, title_justify="left", show_header=any(columns))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        cells = [Text("" if cell is None else str(cell)) for cell in row]
        grid.add_row(*cells)
    stdout.print(grid)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield items and show the progress.

    Args:
        items: what to yield.
        description: what is being done.
        total: the number of items.
    """
    with ProgressMeter(description, total) as meter:
        for done, item in enumerate(items, 1):
            yield item
            meter.update(done)


class ProgressMeter:
    """A progress bar with a few figures beside it.

    If the output is not a terminal, it prints a plain line every ten seconds instead.

    Args:
        description: what is being done.
        total: how much there is to do.
        start: how much was done before this process started.
    """

    def __init__(self, description: str, total: int, start: int = 0) -> None:
        self.description = description
        self.total = total
        self._start = start
        self._start_time = time.monotonic()  # seconds
        self._last_line_time = self._start_time  # seconds

        self._bar: Progress | None = None
        self._task = TaskID(0)
        if is_main_process() and stdout.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=stdout,
            )
            self._task = self._bar.add_task(description, total=total, completed=start, figures="")

    def __enter__(self) -> ProgressMeter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, figures: str = "", description: str | None = None) -> None:
        """Show how much is done.

        Args:
            done: how much of the total is done.
            figures: text beside the bar.
            description: what is being done, if that has changed.
        """
        description = description or self.description
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures, description=description)
            return

        now = time.monotonic()
        is_due = now - self._last_line_time >= _SECONDS_BETWEEN_LINES
        if is_due or done == self.total:
            self._last_line_time = now
            seconds_per_item = (now - self._start_time) / max(1, done - self._start)
            left = seconds_per_item * (self.total - done)  # seconds
            line = f"{description} {done}/{self.total} {figures} {left:.0f} s left"
            info(line.replace("  ", " "))
