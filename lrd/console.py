"""What a user sees in the terminal, and its copy in a log.

The main process prints messages, tables and progress bars. Other processes print errors only.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

T = TypeVar("T")
_SECONDS_BEFORE_FIRST_LINE = 10.0  # of a progress meter without a terminal
_MOST_SECONDS_BETWEEN_LINES = 60.0
_LOG_TABLE_WIDTH = 120  # columns
_MAX_ERROR_LENGTH = 1000  # characters of a line
_LEAST_WRAPPED_WIDTH = 12  # of the column of a listing that may take several lines


class _Stream:
    """`sys.stdout` or `sys.stderr`, whatever they are when something is written.

    A reader that is gone (`lrd runs | head -1`, a terminal that was closed) does not end the
    program: what is written after that is lost. Characters that the stream's encoding lacks are
    written as escapes.

    Args:
        name: `stdout` or `stderr`.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _target(self) -> Any:
        """The stream; None if it was closed before the program began."""
        stream = getattr(sys, self._name)
        # While a progress bar is shown, rich puts a stream of its own in place of sys.stdout.
        return getattr(stream, "rich_proxied_file", stream)

    def write(self, text: str) -> int:
        stream = self._target()
        if stream is None:
            return len(text)

        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._drop_output(stream)
        return len(text)

    def flush(self) -> None:
        stream = self._target()
        if stream is None:
            return
        try:
            stream.flush()
        except OSError:
            self._drop_output(stream)

    def isatty(self) -> bool:
        stream = self._target()
        return stream is not None and stream.isatty()

    def fileno(self) -> int:
        number: int = self._target().fileno()
        return number

    @property
    def encoding(self) -> str:
        return getattr(self._target(), "encoding", None) or "utf-8"

    @staticmethod
    def _drop_output(stream: Any) -> None:
        """Send a stream to /dev/null: Python flushes it once more when it exits."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except (OSError, ValueError):  # a stream without a file
            pass


stdout = Console(file=cast(IO[str], _Stream("stdout")))
stderr = Console(file=cast(IO[str], _Stream("stderr")))


class _Log:
    """Lines with date and time, appended to a file.

    Lines wait in memory until the file is known, and while it cannot be written: a full disk is no
    reason to end a run.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._pending: list[str] = []
        self._lock = threading.Lock()  # checkpoints are written, and reported, by another thread

    def write(self, text: str) -> None:
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            self._pending += [f"{date} {line}\n" for line in text.splitlines()]
            self._flush()

    def open(self, path: Path) -> None:
        with self._lock:
            self.path = path
            self._flush()

    def _flush(self) -> None:
        if self.path is None:
            return
        try:
            # Opened for each write: it holds no file while it waits, and the lines are few.
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write("".join(self._pending))
        except OSError:
            return
        self._pending.clear()


_log: _Log | None = None


@contextmanager
def keep_log() -> Iterator[None]:
    """Collect what the main process prints, until `open_log` names the file for it.

    An exception that leaves this context is written to the log with its traceback.
    """
    global _log
    _log = _Log() if is_main_process() else None
    try:
        yield
    except BaseException:
        log(traceback.format_exc())
        raise
    finally:
        _log = None


def open_log(path: Path) -> None:
    """Append what was printed since `keep_log`, and all that will be, to a file."""
    if _log is not None:
        _log.open(path)


def log(message: str) -> None:
    """Write to the log alone. Without a log this does nothing."""
    if _log is not None:
        _log.write(message)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Print on standard error what would go to standard output, which is for JSON then.

    That holds for what the user's own network and data print, too.
    """
    global stdout
    kept = stdout
    stdout = stderr
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        stdout = kept


def is_main_process() -> bool:
    """Whether this is the main process, by the launcher's environment.

    It can be asked before there is a process group.
    """
    return os.environ.get("RANK", "0") == "0"


def info(message: str) -> None:
    """Print a message on standard output, from the main process only."""
    if is_main_process():
        _print(message)
        log(message)


def info_that_fits(messages: Sequence[str]) -> None:
    """Print the first of several forms of a message that a terminal has room for in one line.

    Without a terminal, and in the log, it is the first form.

    Args:
        messages: the forms, from the longest to the shortest. If none fits, it is the last one.
    """
    if not is_main_process():
        return

    shown = messages[0]
    if stdout.is_terminal:
        fitting = [message for message in messages if cell_len(message) <= stdout.width]
        shown = fitting[0] if fitting else messages[-1]
    _print(shown)
    log(messages[0])


def _print(message: str) -> None:
    stdout.print(Text(message), soft_wrap=True)


def error(message: str) -> None:
    """Print what went wrong on standard error, from any process.

    Args:
        message: one line or several; each gets the prefix `lrd: `, by which it is found among the
            lines of a launcher.
    """
    for line in message.splitlines():
        stderr.print(Text(f"lrd: {_shorten(line)}", style="red"), soft_wrap=True)
    log("\n".join(f"error: {line}" for line in message.splitlines()))


def _shorten(line: str) -> str:
    """Leave out the middle of a very long line: a path or a key may have any length."""
    if len(line) <= _MAX_ERROR_LENGTH:
        return line
    half = _MAX_ERROR_LENGTH // 2
    return f"{line[:half]} ... {line[-half:]}"


def table(title: str, columns: list[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table on standard output, from the main process only.

    Args:
        title: the line above the table; empty: none.
        columns: the headings; the table has no heading row if all of them are empty.
        rows: the cells of each row; None is an empty cell.
    """
    if not is_main_process():
        return

    heading = Text(title) if title else None
    grid = Table(title=heading, title_justify="left", show_header=any(columns))
    for column in columns:
        grid.add_column(Text(column), overflow="fold")
    for row in rows:
        cells = [Text("" if cell is None else str(cell)) for cell in row]
        grid.add_row(*cells)
    stdout.print(grid)

    plain = io.StringIO()
    Console(file=plain, width=_LOG_TABLE_WIDTH).print(grid)
    log("\n".join(line.rstrip() for line in plain.getvalue().splitlines()))


def listing(
    columns: list[str],
    rows: list[list[str]],
    leave_out: list[str],
    wrap: str,
) -> None:
    """Print a table that fits the terminal, from the main process only.

    Nothing is cut: on a narrow terminal columns are left out, and a line below names them. If the
    output is not a terminal, each row is one line, as wide as it needs to be.

    Args:
        columns: the headings.
        rows: the cells of each row.
        leave_out: headings of columns that may be left out, the first one first.
        wrap: heading of the column that may take several lines.
    """
    if not is_main_process():
        return

    widths = {}
    for i, column in enumerate(columns):
        widths[column] = max(cell_len(text) for text in [column, *(row[i] for row in rows)])

    if not stdout.is_terminal:
        for row in [columns, *rows]:
            cells = [set_cell_size(text, widths[columns[i]]) for i, text in enumerate(row)]
            info("  ".join(cells).rstrip())
        return

    shown = list(columns)
    left_out: list[str] = []
    least = widths | {wrap: min(widths[wrap], _LEAST_WRAPPED_WIDTH)}
    for column in leave_out:
        if sum(least[name] + 2 for name in shown) - 2 <= stdout.width:
            break
        shown.remove(column)
        left_out.append(column)

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in shown:
        grid.add_column(Text(column), no_wrap=column != wrap, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(row[columns.index(column)]) for column in shown))
    stdout.print(grid)
    if left_out:
        info(f"(this terminal is too narrow for: {', '.join(reversed(left_out))})")


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


class _FiguresColumn(ProgressColumn):
    """The figures beside a progress bar, cut at the right where there is no room for them."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


def _progress_columns(width: int) -> list[ProgressColumn]:
    """The parts of a progress line; a narrow terminal has room for a short bar, or for none.

    Args:
        width: of the terminal, in columns.
    """
    # rich narrows columns that may wrap, so the counter may not.
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _FiguresColumn(table_column=Column(no_wrap=False)),
    ]
    if width >= 80:
        columns.append(TimeRemainingColumn(table_column=Column(no_wrap=True)))
    if width >= 100:
        bar_width = 40 if width >= 140 else 12
        columns.insert(1, BarColumn(bar_width, table_column=Column(no_wrap=True)))
    return columns


class ProgressMeter:
    """A progress bar with a few figures beside it.

    If the output is not a terminal, it prints a plain line instead: after ten seconds, then more
    and more rarely, at last once a minute.

    Args:
        description: what is being done.
        total: how much there is to do.
        start: how much was done before this process started.
        has_last_line: whether the plain lines have a last one when all is done.
    """

    def __init__(
        self, description: str, total: int, start: int = 0, has_last_line: bool = True
    ) -> None:
        self.description = description
        self.total = total
        self.has_last_line = has_last_line
        self._start = start
        self._start_time = time.monotonic()  # seconds
        self._last_line_time = self._start_time  # seconds
        self._seconds_to_next_line = _SECONDS_BEFORE_FIRST_LINE

        self._bar: Progress | None = None
        self._task = TaskID(0)
        if is_main_process() and stdout.is_terminal:
            self._bar = Progress(*_progress_columns(stdout.width), console=stdout)
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
        if not is_main_process():
            return

        now = time.monotonic()
        is_due = now - self._last_line_time >= self._seconds_to_next_line
        if is_due or (self.has_last_line and done == self.total):
            self._last_line_time = now
            self._seconds_to_next_line = min(
                2 * self._seconds_to_next_line, _MOST_SECONDS_BETWEEN_LINES
            )
            seconds_per_item = (now - self._start_time) / max(1, done - self._start)
            left = seconds_per_item * (self.total - done)  # seconds
            line = f"{description} {done}/{self.total} {figures} {left:.0f} s left"
            _print(line.replace("  ", " "))
