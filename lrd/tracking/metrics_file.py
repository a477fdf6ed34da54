"""`metrics.csv`: the scalars of TensorBoard as a table, exact over crashes and resumes."""

from __future__ import annotations

import csv
import io
import re
import time
from pathlib import Path

import numpy as np

from lrd import console, files
from lrd.tracking.event_file import read_scalars

FILE_NAME = "metrics.csv"

_FIRST_COLUMNS = ["step", "epoch"]
_ORDER_OF_KINDS = ["train", "test", "validation", "lr", "lr_effective", "lr_dropout", "probes"]
_SECONDS_BETWEEN_FLUSHES = 5.0


class MetricsFile:
    """A table with one row per recorded step and one column per tag.

    The first columns are `step` and `epoch`, both from 1. A cell is empty where a tag has no
    record. A value is the shortest decimal number that reads back to the same float32, which is
    what TensorBoard's records contain.

    Rows wait in memory until they are flushed. What a full disk refuses stays in memory and is
    written as soon as there is room. Nothing but appending is done in place, so a kill leaves at
    most an incomplete last row, and that row is of a later step than the newest checkpoint.

    A file of an earlier start is continued: rows of later steps than `step` are cut off. If the
    file is missing, damaged or too short, it is written again from the event files.

    Args:
        run_dir: the run directory.
        step: steps done so far. The file starts empty if there are none.
        steps_per_epoch: from which the epoch of a step follows.

    Attributes:
        path: the file.

    Raises:
        OSError: the file could not be read or written; the error names it.
    """

    def __init__(self, run_dir: Path, step: int, steps_per_epoch: int) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE_NAME
        self.steps_per_epoch = steps_per_epoch

        self._tags: list[str] = []  # the columns of the file, without the first two
        self._size = 0  # bytes of the file that are complete rows
        self._last_step = 0  # of the last row in the file; 0: there is none
        self._rows: dict[int, dict[str, float]] = {}  # by step; not in the file yet
        self._last_flush = time.monotonic()  # seconds

        if step == 0:
            self._size = files.replace(self.path, _format_header([]))
        else:
            self._continue(step)

    def add(self, tag: str, value: float, step: int) -> None:
        """Put a value into the row of a step.

        If this begins a new row, and if the last flush was more than five seconds ago, the rows
        before it are flushed.

        Args:
            tag: the column, which is added to the file if it has none of this name.
            value: as TensorBoard's record has it, float32.
            step: of the last row or of a later one.
        """
        row = self._rows.get(step)
        if row is None:
            if time.monotonic() - self._last_flush > _SECONDS_BETWEEN_FLUSHES:
                try:
                    self.flush()
                except OSError:
                    # The rows are kept. A caller who needs them on disk calls `flush` itself.
                    self._last_flush = time.monotonic()
            row = self._rows[step] = {}
        row[tag] = value

    def flush(self) -> None:
        """Hand all rows to the file system.

        Raises:
            OSError: they could not be written; the error names the file. The rows are kept, and
                the next flush tries again.
        """
        self._last_flush = time.monotonic()
        if not self._rows:
            return

        # A new tag changes every row, and a value for the last row in the file changes that one.
        has_new_tag = any(not row.keys() <= set(self._tags) for row in self._rows.values())
        if has_new_tag or next(iter(self._rows)) <= self._last_step:
            self._rewrite()
        else:
            content = b"".join(self._format_row(step, row) for step, row in self._rows.items())
            self._size = files.append(self.path, content, self._size)

        self._last_step = max(self._rows)
        self._rows.clear()

    def sync(self) -> None:
        """Wait until all flushed rows are on the disk."""
        files.sync(self.path)

    def _continue(self, step: int) -> None:
        """Go on with the file of an earlier start, of which only rows up to `step` count."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            self._rebuild(step)
            console.info(f"{self.path}: is missing; written again from TensorBoard's records")
            return

        tags = _parse_header(content)
        if tags is None:
            self._rebuild(step)
            console.info(f"{self.path}: is damaged; written again from TensorBoard's records")
            return

        end, last_step = _find_end(content, step, num_cells=len(_FIRST_COLUMNS) + len(tags))
        if last_step != step:
            # This step need not have a record. But an older version of lrd, which had no such file,
            # may have done the steps between.
            self._rebuild(step)
            return

        self._tags = tags
        self._last_step = last_step
        self._size = end
        if end < len(content):
            files.replace(self.path, content[:end])

    def _rebuild(self, step: int) -> None:
        """Write the file again from the event files, up to `step`."""
        self._tags = []
        self._last_step = 0
        self._rows = {}
        self._size = 0

        records = []
        for tag, points in read_scalars(self.path.parent).items():
            records += [(point_step, tag, value) for point_step, value in points]
        for point_step, tag, value in sorted(records):
            if 0 < point_step <= step:
                self._rows.setdefault(point_step, {})[tag] = value

        files.replace(self.path, _format_header([]))
        self._rewrite()
        self._last_step = max(self._rows, default=0)
        self._rows.clear()

    def _rewrite(self) -> None:
        """Write the whole file with all rows that wait, some of which may have new columns."""
        old_content = self.path.read_bytes()[: self._size].decode()
        lines = old_content.splitlines()[1:]

        old_tags = self._tags
        new_tags = {tag for row in self._rows.values() for tag in row}
        self._tags = sorted(new_tags.union(old_tags), key=_column_order)

        # The last row in the file may get more values.
        last_cells: list[str] = []
        if lines and self._last_step in self._rows:
            last_cells = lines.pop().split(",")[len(_FIRST_COLUMNS) :]
        last_values = dict(zip(old_tags, last_cells, strict=False))

        content = [_format_header(self._tags)]
        places = [old_tags.index(tag) if tag in old_tags else None for tag in self._tags]
        for line in lines:
            step, epoch, *cells = line.split(",")
            cells = ["" if place is None else cells[place] for place in places]
            content.append((",".join([step, epoch, *cells]) + "\n").encode())

        for row_step, row in self._rows.items():
            earlier = last_values if row_step == self._last_step else {}
            content.append(self._format_row(row_step, row, earlier))

        try:
            self._size = files.replace(self.path, b"".join(content))
        except OSError:
            self._tags = old_tags  # the file still has these columns
            raise

    def _format_row(
        self, step: int, row: dict[str, float], earlier: dict[str, str] | None = None
    ) -> bytes:
        """One line of the file.

        Args:
            row: the values by their tags.
            earlier: cells by their tags, for tags that are not in `row`.
        """
        epoch = 1 + (step - 1) // self.steps_per_epoch
        cells = [str(step), str(epoch)]
        for tag in self._tags:
            if tag in row:
                cells.append(str(np.float32(row[tag])))
            else:
                cells.append(earlier.get(tag, "") if earlier else "")
        return (",".join(cells) + "\n").encode()


def copy_rows(source: Path, target: Path, last: int) -> None:
    """Copy the table of a run up to a step into another run directory.

    Without a readable table nothing is copied: the run's next start writes it again from the event
    files.
    """
    try:
        content = (source / FILE_NAME).read_bytes()
    except OSError:
        return

    tags = _parse_header(content)
    if tags is not None:
        end, _ = _find_end(content, last, num_cells=len(_FIRST_COLUMNS) + len(tags))
        files.replace(target / FILE_NAME, content[:end])


def read_rows(path: Path, first_step: int) -> list[dict[str, float]]:
    """Read the last rows of a `metrics.csv`.

    Args:
        first_step: the rows of this and later steps are read.

    Returns:
        For each step the values by their tags, and `step` and `epoch`. Empty if there is no
        readable file.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return []

    tags = _parse_header(content)
    if tags is None:
        return []

    columns = [*_FIRST_COLUMNS, *tags]
    end, _ = _find_end(content, first_step - 1, num_cells=len(columns))
    rows = []
    for line in content[end:].decode().splitlines():
        pairs = zip(columns, line.split(","), strict=False)
        rows.append({column: float(cell) for column, cell in pairs if cell})
    return rows


def _format_header(tags: list[str]) -> bytes:
    # A probe's tag contains commas, which need quotes.
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([*_FIRST_COLUMNS, *tags])
    return line.getvalue().encode()


def _parse_header(content: bytes) -> list[str] | None:
    """The tags in the first line, or None if that is no header of this file."""
    line, newline, _ = content.partition(b"\n")
    try:
        columns = next(csv.reader([line.decode()]), [])
    except (UnicodeDecodeError, csv.Error):
        return None
    if not newline or columns[:2] != _FIRST_COLUMNS:
        return None
    return columns[2:]


def _find_end(content: bytes, step: int, num_cells: int) -> tuple[int, int]:
    """Find where the rows up to a step end, from the end of the file.

    Returns:
        The number of bytes up to there, and the step of the last of these rows: 0 if there is no
        such row or if it is damaged.
    """
    end = content.rfind(b"\n") + 1  # what follows is an incomplete row
    header_end = content.find(b"\n") + 1

    while end > header_end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        cells = content[start : end - 1].split(b",")
        if len(cells) != num_cells or not cells[0].isdigit():
            return end, 0

        row_step = int(cells[0])
        if row_step <= step:
            return end, row_step
        end = start
    return end, 0


def _column_order(tag: str) -> tuple[int, list[tuple[int, str]]]:
    """Sorts tags by their kind, then by name; group10 comes after group2."""
    kind = tag.partition("/")[0]
    is_known = kind in _ORDER_OF_KINDS
    place = _ORDER_OF_KINDS.index(kind) if is_known else len(_ORDER_OF_KINDS)

    words = re.split(r"(\d+)", tag)
    return place, [(int(word), "") if word.isdecimal() else (0, word) for word in words]
