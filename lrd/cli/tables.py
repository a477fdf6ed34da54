"""Tables of runs, of a run's checkpoints, and of a pack of images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lrd import console
from lrd.checkpoint import manifest, store
from lrd.checkpoint.export import export_weights
from lrd.checkpoint.mirror import fetching
from lrd.checkpoint.mirror.remote import Remote
from lrd.checkpoint.network_config import read_config
from lrd.checkpoint.run_records import RunSummary, describe_seconds, find_runs
from lrd.data.streaming.packed import describe_bytes, verify_pack
from lrd.errors import UserError

# How `lrd runs --sort` orders: best, newest or longest first; what is not known comes last.
SORT_KEYS: dict[str, Callable[[RunSummary], Any]] = {
    "run": lambda run: str(run.path),
    "steps": lambda run: _last_if_none(run.step, descending=True),
    "loss": lambda run: _last_if_none(run.test_loss),
    "accuracy": lambda run: _last_if_none(run.best_accuracy, descending=True),
    "duration": lambda run: _last_if_none(run.seconds, descending=True),
    "date": lambda run: _last_if_none(run.updated, descending=True),
    "state": lambda run: run.state,
}
_SECONDS_BETWEEN_LOOKS = 2  # of `lrd runs --watch`
_CHECKPOINT_COLUMNS = ["checkpoint", "size", "epoch", "best accuracy", "verified"]


def runs_table(root: Path, sort: str = "run", as_json: bool = False) -> None:
    """Print a row for each run directory at or below `root`.

    Args:
        root: the folder.
        sort: a key of SORT_KEYS.
        as_json: print a list of JSON objects with all values in place of the table.

    Raises:
        UserError: the folder is missing, there is no run in it, or the key is unknown.
    """
    if sort not in SORT_KEYS:
        raise UserError(f"runs: --sort: is {sort!r}, may be {', '.join(SORT_KEYS)}")
    runs = sorted(find_runs(root), key=SORT_KEYS[sort])

    if as_json:
        console.info(json.dumps([run.as_json() for run in runs], indent=1))
        return

    columns = ["run", "recipe", "steps", "loss", "best acc", "duration", "date", "state"]
    rows = [_describe_run(run) for run in runs]
    console.listing(
        columns, rows, leave_out=["recipe", "date", "duration", "loss", "steps"], wrap="state"
    )


def watch_runs(root: Path, sort: str) -> None:
    """Show `runs_table` anew every few seconds, until Ctrl-C.

    Raises:
        UserError: see `runs_table`; or the output is no terminal.
    """
    if not console.stdout.is_terminal:
        raise UserError("runs: --watch needs a terminal; --json prints once what there is")

    with console.stdout.screen(), suppress(KeyboardInterrupt):
        while True:
            console.stdout.clear()
            runs_table(root, sort)
            now = time.strftime("%H:%M:%S")
            console.info(f"{now}, every {_SECONDS_BETWEEN_LOOKS} s; Ctrl-C ends")
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _describe_run(run: RunSummary) -> list[str]:
    step = "?" if run.step is None else run.step
    total_steps = "?" if run.total_steps is None else run.total_steps
    date = ""
    if run.updated is not None:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.updated))
    return [
        str(run.path),
        run.recipe,
        f"{step}/{total_steps}",
        "" if run.test_loss is None else f"{run.test_loss:.4f}",
        "" if run.best_accuracy is None else f"{run.best_accuracy:.4f}",
        describe_seconds(run.seconds),
        date,
        f"{run.state}: {run.message}" if run.message else run.state,
    ]


def _last_if_none(value: float | None, descending: bool = False) -> tuple[bool, float]:
    """A key for `sorted`."""
    if value is None:
        return True, 0.0
    return False, -value if descending else value


def checkpoints_table(place: str, verify: bool) -> bool:
    """Print a row for each checkpoint of a run, also for those that were moved aside as damaged.

    Args:
        place: the run directory, or the address of a mirror.
        verify: hash all files and add a column with the result.

    Returns:
        False if `verify` found a damaged checkpoint.

    Raises:
        UserError: the run directory is missing or has no checkpoint, or the mirror cannot be read.
    """
    if is_mirror(place):
        return _mirror_table(Remote(place), verify)

    run_dir = Path(place)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")

    folder = store.checkpoints_dir(run_dir)
    paths = sorted(path for path in folder.glob("step-*") if path.is_dir())
    if not paths:
        raise UserError(f"{run_dir}: no checkpoint in it")

    all_valid = True
    rows = []
    for path in paths:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())  # bytes
        epoch, best = _describe_position(path)
        row = [path.name, f"{size / 1e6:.1f} MB", epoch, best]
        if verify:
            damage = store.find_damage(path)
            row.append("valid" if damage is None else f"damaged: {damage}")
            all_valid = all_valid and damage is None
        rows.append(row)

    console.table(str(run_dir), _CHECKPOINT_COLUMNS if verify else _CHECKPOINT_COLUMNS[:-1], rows)
    return all_valid


def is_mirror(place: str) -> bool:
    """Whether a place is the address of a mirror, and no folder."""
    return "://" in place


def _mirror_table(remote: Remote, verify: bool) -> bool:
    """Print a row for each checkpoint of a mirror. To verify one, it is copied here for a while."""
    by_step = fetching.list_checkpoints(remote)
    if not by_step:
        raise UserError(f"{remote.url}: no checkpoint in it")

    all_valid = True
    rows = []
    for step, sizes in by_step.items():
        needed = sizes if verify else {store.TRAINER_FILE: sizes.get(store.TRAINER_FILE, 0)}
        with fetching.downloaded(remote, step, needed) as path:
            epoch, best = _describe_position(path)
            damage = store.find_damage(path) if verify else None
        row = [path.name, f"{sum(sizes.values()) / 1e6:.1f} MB", epoch, best]

        is_whole = manifest.NAME in sizes
        if not is_whole:
            row[0] += " (not whole)"
        if verify:
            row.append("valid" if damage is None else f"damaged: {damage}")
            all_valid = all_valid and (damage is None or not is_whole)
        rows.append(row)

    console.table(remote.url, _CHECKPOINT_COLUMNS if verify else _CHECKPOINT_COLUMNS[:-1], rows)
    return all_valid


def export_weights_and_report(
    place: str, out: Path, best: bool = False, ema: bool = False, step: int | None = None
) -> None:
    """Write the weights of a checkpoint to a file or folder and print how to use them.

    Args:
        place: the run directory, or the address of a mirror.

    Raises:
        UserError: there is no such checkpoint, or `out` cannot be written.
    """
    if not is_mirror(place):
        _export(Path(place), str(Path(place)), out, best, ema, step)
        return

    if best and step is not None:
        raise UserError("best and step: give only one of them")
    with fetching.downloaded_run(Remote(place), best, step) as run_dir:
        try:
            _export(run_dir, place, out, best, ema, step)
        except UserError as error:
            # It names the temporary copy, of which the user knows nothing.
            raise UserError(str(error).replace(str(run_dir), place)) from None


def _export(run_dir: Path, place: str, out: Path, best: bool, ema: bool, step: int | None) -> None:
    path = export_weights(run_dir, out, best, ema, step)
    place = f"{place}/{path.relative_to(run_dir)}"
    kind = "averaged weights" if ema else "weights"
    file = out / store.MODEL_FILE if out.is_dir() else out
    if read_config(file):
        advice = f"use them with lrd eval, lrd predict or lrd.load_model({str(out)!r})"
    else:
        advice = (
            "an older lrd wrote them without a description of the network, so only "
            "safetensors.torch.load_file can load them"
        )
    console.info(f"{out}: the {kind} of {place}; {advice}")


def _describe_position(path: Path) -> tuple[str, str]:
    """The epoch of a checkpoint and the best result so far; `?` if they cannot be read."""
    try:
        trainer = store.read_trainer(path)
        epoch = str(trainer["epoch"])
        best = trainer["best"]
        if best is None:
            return epoch, ""
        # Checkpoints of earlier versions do not name it: it was the accuracy on the test images.
        accuracy = best[best.get("metric", "accuracy")]
        return epoch, f"{accuracy:.4f} at step {best['step']}"
    except (
        OSError,
        ArithmeticError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ):
        return "?", "?"


def pack_table(root: Path) -> bool:
    """Compare a pack with its hashes, and print a row for each part.

    Args:
        root: the folder that contains the pack.

    Returns:
        Whether all of it is there and whole.

    Raises:
        UserError: there is no pack.
    """
    checks = verify_pack(root)
    rows = []
    for check in checks:
        bytes_per_image = check.num_bytes / check.num_images if check.num_images else 0.0
        rows.append(
            [
                check.part,
                f"{check.num_images:,}",
                describe_bytes(check.num_bytes),
                f"{bytes_per_image:,.0f}",
                "no" if check.faults else "yes",
            ]
        )
    console.table(str(root), ["part", "images", "size", "bytes per image", "ok"], rows)

    for check in checks:
        for fault in check.faults:
            console.error(fault)
    return not any(check.faults for check in checks)
