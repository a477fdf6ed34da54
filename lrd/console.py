"""What a person sees in the terminal: rich progress and tables, on the main process only; plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 10.0
stdout = Console()
stderr = Console(stderr=True)


def is_main_process() -> bool:
    """Before there is a process group: what the launcher's environment says."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One line on standard output, from the main process."""
    if is_main_process():
        stdout.print(Text(message), soft_wrap=True)


def complain(message: str) -> None:
    """One line on standard error, from whatever process."""
    stderr.print(Text(message, style="red"), soft_wrap=True)


def table(title: str, columns: list[str], rows: Iterable[Iterable[object]]) -> None:
    """A table on standard output, from the main process."""
    if not is_main_process():
        return
    grid = Table(title=title or None, title_justify="left", show_header=any(columns))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    stdout.print(grid)


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Pass items on while showing how many went by."""
    with Meter(what, total) as meter:
        for done, item in enumerate(items, 1):
            yield item
            meter.update(done)


class Meter:
    """A progress bar with a few live figures; a plain line every ten seconds where the output is no terminal."""

    def __init__(self, what: str, total: int, start: int = 0) -> None:
        self.what, self.total = what, total
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._said = self._began = time.monotonic()
        self._start = start
        if is_main_process() and stdout.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=stdout,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=total, completed=start, figures="")

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, figures: str = "", what: str | None = None) -> None:
        """Show that `done` of the total are done; `figures` stands beside the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures, description=what or self.what)
            return
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES or done == self.total:
            self._said = now
            left = (now - self._began) / max(1, done - self._start) * (self.total - done)
            say(f"{what or self.what} {done}/{self.total} {figures} {left:.0f} s left".replace("  ", " "))
