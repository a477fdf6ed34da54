"""The newest checkpoint, brought to rank 0 from the host that has it.

Rank 0 alone writes, and no file system need be shared; so where another host becomes the main one, what the run wrote
lies elsewhere. With a shared file system all ranks find the same, and nothing travels.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lrd import checkpoint, console
from lrd.distributed import describe_rank, from_main, from_rank, gather, on_main, process_index, together
from lrd.errors import UserError, describe

_CHUNK = 1 << 24  # bytes; what each rank holds of a file while it passes by


def bring_newest(run_dir: Path) -> None:
    """Have the newest whole checkpoint of all ranks in rank 0's `run_dir`, with the best one and the event files.

    Args:
        run_dir: this rank's own; the hosts' may differ.

    Raises:
        UserError: it could not be read there or not be written here; what was here is then as it was.
    """
    latest = max(checkpoint.steps(run_dir), default=-1)
    here = from_main(latest)
    if max(gather(latest)) <= here:
        return
    offer = together(lambda: _newest_whole(run_dir) if latest > here else -1)
    offers = gather((offer, describe_rank()))
    step, who = max(offers, key=lambda each: each[0])
    if step <= here:
        return
    source = offers.index((step, who))
    files = from_rank(source, _files(run_dir, step) if process_index() == source else [])
    total, lacking = sum(size for _, size in files) / 1e6, f"none after step {here}" if here >= 0 else "none"
    console.say(f"{run_dir}: {who} has a checkpoint of step {step}, rank 0 has {lacking}: {total:.1f} MB come here")
    staging = run_dir / f".handover.{os.getpid()}.tmp"
    faults = [_copy(run_dir / name, staging / name, size, source) for name, size in files]
    on_main(lambda: _publish(staging, run_dir, [fault for fault in faults if fault]))


def _newest_whole(run_dir: Path) -> int:
    path, _ = checkpoint.survey(run_dir)
    return -1 if path is None else int(checkpoint.read_trainer(path)["step"])


def _files(run_dir: Path, step: int) -> list[tuple[str, int]]:
    """What goes along with a checkpoint: each file's path below the run directory, and its size."""
    best = (checkpoint.read_trainer(checkpoint.path_of(run_dir, step))["best"] or {}).get("step", step)
    newest, best_one = checkpoint.path_of(run_dir, step), checkpoint.path_of(run_dir, best)
    is_another = best != step and best_one.is_dir() and checkpoint.damage(best_one) is None
    whole = [newest, best_one] if is_another else [newest]
    paths = [*run_dir.glob("events.out.tfevents.*"), *(file for folder in whole for file in folder.iterdir())]
    return [(str(path.relative_to(run_dir)), path.stat().st_size) for path in sorted(paths)]


def _copy(there: Path, here: Path, size: int, source: int) -> str:
    """A file of the source rank's to rank 0. All ranks take part. Returns what went wrong on this one."""
    fault = ""
    for start in range(0, max(1, size), _CHUNK):
        chunk: bytes | OSError = b""
        if process_index() == source:
            chunk = _read(there, start, min(_CHUNK, size - start))
        chunk = from_rank(source, chunk)
        try:
            if isinstance(chunk, OSError):
                raise chunk
            if process_index() == 0 and not fault:
                _append(here, chunk)
        except OSError as error:
            fault = describe(error)
    return fault


def _read(path: Path, start: int, size: int) -> bytes | OSError:
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(size)
    except OSError as error:
        return error


def _append(path: Path, chunk: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def _publish(staging: Path, run_dir: Path, faults: list[str]) -> None:
    """Event files first: they may hold more than a checkpoint knows of, and not less. Folders appear whole."""
    try:
        if faults:
            raise UserError(f"run_dir: the checkpoint of another host could not be brought to {run_dir}: {faults[0]}")
        for events in staging.glob("events.out.tfevents.*"):
            events.replace(run_dir / events.name)
        checkpoint.folder(run_dir).mkdir(exist_ok=True)
        for folder in sorted(checkpoint.folder(staging).iterdir()):
            if not (checkpoint.folder(run_dir) / folder.name).exists():
                folder.rename(checkpoint.folder(run_dir) / folder.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
