"""What the files of a run directory say about the run, read without training anything."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.run_dir import read_status
from lrd.errors import UserError

_MAX_NUMBER = 1e11  # that a run writes: steps, or seconds since 1970
_EVENT_FILES = "events.out.tfevents.*"  # then the seconds at which the start began


@dataclass
class RunSummary:
    """One run in a few values; None where a file does not say.

    Attributes:
        path: the run directory.
        recipe: the recipe in a few words; `?` if it cannot be read.
        step, total_steps: optimizer steps done, and those of the whole run.
        test_loss, test_accuracy: of the latest evaluation in the newest checkpoint.
        best_accuracy: the best accuracy so far, on the test images or those held out.
        seconds: how long all starts of the run took together.
        updated: when the run last wrote its status, in seconds since 1970.
        state: `running`, `finished`, `stopped`, `failed` or `interrupted`.
        message: why it failed, in one line; empty if it did not.
        ranks: of the latest start.
    """

    path: Path
    recipe: str
    step: int | None
    total_steps: int | None
    test_loss: float | None
    test_accuracy: float | None
    best_accuracy: float | None
    seconds: float | None
    updated: float | None
    state: str
    message: str
    ranks: int | None

    def as_json(self) -> dict[str, Any]:
        """The values for `lrd runs --json`, the date in ISO 8601."""
        date = None
        if self.updated is not None:
            date = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.updated))
        return {**asdict(self), "path": str(self.path), "updated": date}


def find_runs(root: Path) -> list[RunSummary]:
    """The runs at and below a folder, sorted by path.

    Raises:
        UserError: the folder is missing, or there is no run in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")

    run_dirs = [path.parent for path in sorted(root.rglob("status.json"))]
    summaries = [read_summary(run_dir) for run_dir in run_dirs]
    found = [summary for summary in summaries if summary is not None]
    if not found:
        raise UserError(f"{root}: no run in it; a run leaves a status.json in its run_dir")
    return found


def read_summary(run_dir: Path) -> RunSummary | None:
    """Read a run directory. Returns None if its status.json is another program's."""
    status = read_status(run_dir)
    if status is None:
        return None

    metrics = _read_latest_metrics(run_dir)
    message = str(status.get("message", "")).splitlines()
    return RunSummary(
        path=run_dir,
        recipe=describe_recipe(read_recipe(run_dir)),
        step=_read_number(status, "step", int),
        total_steps=_read_number(status, "total_steps", int),
        test_loss=_read_number(metrics, "loss", float),
        test_accuracy=_read_number(metrics, "accuracy", float),
        best_accuracy=_read_number(status, "best_accuracy", float),
        seconds=_measure_seconds(run_dir, status),
        updated=_read_number(status, "updated", float),
        state=str(status["state"]),
        message=message[0] if message else "",
        ranks=_read_number(status, "ranks", int),
    )


def read_recipe(run_dir: Path) -> recipes.Recipe | None:
    """The recipe that a run was started with last; None if it cannot be read."""
    try:
        text = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        return recipes.parse(values, str(run_dir)) if isinstance(values, dict) else None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, UserError):
        return None


def describe_recipe(recipe: recipes.Recipe | None) -> str:
    """A recipe in a few words; `?` if there is none."""
    if recipe is None:
        return "?"

    words = (
        f"{recipe.data.dataset} {recipe.model.arch}, "
        f"{recipe.optimizer.name} lr {recipe.optimizer.lr:g}"
    )
    if recipe.lr_dropout is not None:
        words += f", keep_prob {recipe.lr_dropout.keep_prob:g}"
    return words


def describe_seconds(seconds: float | None) -> str:
    """A duration as `41 s`, `12:05` (minutes and seconds) or `3:12:05`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _read_latest_metrics(run_dir: Path) -> dict[str, Any]:
    """The latest evaluation in the newest checkpoint; empty if there is none."""
    steps = store.list_steps(run_dir)
    if not steps:
        return {}
    try:
        latest = store.read_trainer(store.checkpoint_path(run_dir, steps[-1]))["latest"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return latest if isinstance(latest, dict) else {}


def _read_number(values: dict[str, Any], key: str, kind: type[Any]) -> Any:
    value = values.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return kind(value) if abs(value) < _MAX_NUMBER else None


def _measure_seconds(run_dir: Path, status: dict[str, Any]) -> float | None:
    """How long all starts of a run took together.

    Each start writes an event file, whose name contains when it began; it was changed last when
    the start ended, however it ended.
    """
    starts = []
    for path in run_dir.glob(_EVENT_FILES):
        try:
            starts.append((float(path.name.split(".")[3]), path.stat().st_mtime))
        except (OSError, ValueError, IndexError):  # another program's file
            continue

    started = _read_number(status, "started", float)
    updated = _read_number(status, "updated", float)
    if not starts:
        return None if started is None or updated is None else max(0.0, updated - started)

    starts.sort()
    seconds = 0.0
    for i, (began, ended) in enumerate(starts):
        # A file that was copied from another host carries the time of the copy.
        next_began = starts[i + 1][0] if i + 1 < len(starts) else (updated or ended)
        seconds += max(0.0, min(ended, max(next_began, began)) - began)
    return seconds
