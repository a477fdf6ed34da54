"""Copy the newest checkpoint to rank 0 from the host that has it.

Only rank 0 writes checkpoints, and the hosts need not share a file system. So if another host
becomes the main one, what the run wrote before is on a different host than rank 0. With a shared
file system all ranks find the same checkpoints, and nothing is copied.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from lrd import console
from lrd.checkpoint import store
from lrd.distributed.communication import (
    all_gather_values,
    broadcast_bytes,
    broadcast_value,
    describe_rank,
    process_index,
    run_on_all_ranks,
    run_on_main_process,
)
from lrd.errors import RunError, UserError, describe_os_error

_NO_CHECKPOINT = -1  # in place of a step
_CHUNK_BYTES = 1 << 24  # what each rank holds in memory of a file while it is broadcast
# What a name from elsewhere may be; no part of it begins with a dot.
_CHECKPOINT_FILE_NAME = re.compile(r"checkpoints/step-[0-9]{8,20}/\w[\w.-]{0,199}")
_RECORD_NAME = re.compile(r"events\.out\.tfevents\.[\w.-]{1,220}|metrics\.csv")
_MAX_NAME_SHOWN = 100

_STAGING_NAME = ".transfer"  # in rank 0's run directory; the run's lock keeps other runs out


def fetch_newest(run_dir: Path) -> None:
    """Copy the newest valid checkpoint of all ranks into rank 0's `run_dir`.

    All ranks must call it. The best checkpoint, the event files and `metrics.csv` are copied too.
    If no rank has a later valid checkpoint than rank 0, nothing is copied. A damaged checkpoint of
    rank 0 that a valid one replaces is moved aside to `*.damaged`.

    Args:
        run_dir: the run directory on this rank's host; its path may differ between hosts.

    Raises:
        UserError: a file could not be read there or not be written here; what rank 0 had before is
            then untouched. Or a newer checkpoint has another layout version.
        RunError: the other rank offers files that no run writes.
    """
    local_step = run_on_all_ranks(lambda: max(store.list_steps(run_dir), default=_NO_CHECKPOINT))
    other_steps = all_gather_values(local_step)[1:]
    if max(other_steps, default=_NO_CHECKPOINT) == _NO_CHECKPOINT:
        return

    # Rank 0's newest checkpoint may be damaged while another host has a valid one of that step, so
    # what rank 0 lists is not enough to know.
    main_step = run_on_main_process(lambda: _newest_valid_step(run_dir))

    # Verifying reads whole files, so only ranks that may have a later checkpoint do it.
    def find_offer() -> int:
        may_be_later = process_index() != 0 and local_step > main_step
        return _newest_valid_step(run_dir) if may_be_later else _NO_CHECKPOINT

    offered_step = run_on_all_ranks(find_offer)
    offers: list[Any] = all_gather_values([offered_step, describe_rank()])
    step, source_name = max(offers, key=lambda offer: offer[0])
    if step <= main_step:
        return

    source = offers.index([step, source_name])
    is_source = process_index() == source
    local_files = run_on_all_ranks(lambda: _list_files(run_dir, step) if is_source else {})
    files = broadcast_value(local_files, source)
    _require_names_of_a_run(files, source_name)

    megabytes = sum(files.values()) / 1e6
    main_has = "none" if main_step == _NO_CHECKPOINT else f"none after step {main_step}"
    console.info(
        f"{run_dir}: {source_name} has a checkpoint of step {step}, rank 0 has {main_has}: "
        f"copying {megabytes:.1f} MB to rank 0"
    )

    # A rank 0 that was killed in the middle of a copy has left its files.
    staging = run_dir / _STAGING_NAME
    run_on_main_process(lambda: _remove_folder(staging))

    # An error is collected and not raised: the other ranks go on with the broadcasts all the same.
    errors = []
    for name, size in files.items():
        error = _copy_file(run_dir / name, staging / name, size, source)
        if error is not None:
            errors.append(error)

    run_on_main_process(lambda: _publish_copied(staging, run_dir, errors))


def _newest_valid_step(run_dir: Path) -> int:
    """Return the step of the newest valid checkpoint, or _NO_CHECKPOINT."""
    path, _ = store.find_newest_valid(run_dir)
    return _NO_CHECKPOINT if path is None else int(store.read_trainer(path)["step"])


def _list_files(run_dir: Path, step: int) -> dict[str, int]:
    """List what is copied with a step's checkpoint.

    Returns:
        The path of each file, relative to the run directory -> its size in bytes. What else lies in
        a checkpoint's folder is left out.
    """
    newest_path = store.checkpoint_path(run_dir, step)
    folders = [newest_path]

    trainer = store.read_trainer(newest_path)
    best = trainer["best"]
    if best is not None and best["step"] != step:
        best_path = store.checkpoint_path(run_dir, best["step"])
        if best_path.is_dir() and store.find_damage(best_path) is None:
            folders.append(best_path)

    # The records too, or the run's curves would begin at this step on rank 0's host. If a survivor
    # saved this, the records are on the host that was rank 0's then; here are older ones at most.
    paths = [] if "rescued" in trainer else record_files(run_dir)
    for folder in folders:
        paths += folder.iterdir()
    sizes = {str(path.relative_to(run_dir)): path.stat().st_size for path in sorted(paths)}
    return {name: size for name, size in sizes.items() if _is_name_of_a_run(name)}


def is_record_name(name: str) -> bool:
    """Whether a name from elsewhere is one of an event file or `metrics.csv`, and nothing else."""
    return _RECORD_NAME.fullmatch(name) is not None


def _is_name_of_a_run(name: str) -> bool:
    return is_record_name(name) or _CHECKPOINT_FILE_NAME.fullmatch(name) is not None


def _require_names_of_a_run(files: dict[str, int], source_name: str) -> None:
    """Refuse names that would be written outside of a run directory, or where no run writes.

    Args:
        files: what another rank offers: the path of each file -> its size.
        source_name: that rank and its host.

    Raises:
        RunError: names the first such file.
    """
    for name, size in files.items():
        if not _is_name_of_a_run(name) or type(size) is not int or size < 0:
            shown = ascii(name)[:_MAX_NAME_SHOWN]
            raise RunError(
                f"{source_name} offers a file {shown} of {size} bytes, which is none that a run "
                "writes; nothing was copied"
            )


def record_files(folder: Path) -> list[Path]:
    """The event files and `metrics.csv` of a run directory."""
    return [path for path in folder.glob("*") if is_record_name(path.name)]


def _copy_file(source_path: Path, target_path: Path, size: int, source: int) -> str | None:
    """Copy one file from the source rank to rank 0. All ranks must call it.

    Args:
        source_path: the file on the source rank.
        target_path: the new file on rank 0.
        size: number of bytes to copy; a file without a byte is created too.
        source: the rank that has the file.

    Returns:
        A line if the file could not be read or not be written. Only rank 0 sees both errors.
    """
    error_line = None
    for start in range(0, max(1, size), _CHUNK_BYTES):
        chunk = b""
        read_error = None
        if process_index() == source:
            try:
                chunk = _read_chunk(source_path, start, min(_CHUNK_BYTES, size - start))
            except OSError as error:
                read_error = describe_os_error(error)

        read_error = broadcast_value(read_error, source)
        chunk = broadcast_bytes(chunk, source)
        error_line = error_line or read_error
        if process_index() == 0 and error_line is None:
            try:
                _write_chunk(target_path, chunk, is_first=start == 0)
            except OSError as error:
                error_line = describe_os_error(error)

    return error_line


def _read_chunk(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(size)


def _remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, if it exists."""
    if path.exists():
        shutil.rmtree(path)


def _write_chunk(path: Path, chunk: bytes, is_first: bool) -> None:
    """Write the first bytes of a file or append to it, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb" if is_first else "ab") as stream:
        stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def _publish_copied(staging: Path, run_dir: Path, errors: list[str]) -> None:
    """Publish what was copied, on rank 0.

    Raises:
        UserError: a file could not be copied.
    """
    if errors:
        _remove_folder(staging)
        raise UserError(
            f"run_dir: the checkpoint of another host could not be copied to {run_dir}: {errors[0]}"
        )
    publish(staging, run_dir)


def publish(staging: Path, run_dir: Path) -> None:
    """Move the files of a staged run directory to their places in the run directory.

    Rank 0 calls this; the other ranks must not. A damaged checkpoint in the run directory that a
    staged one replaces is moved aside to `*.damaged`.

    Args:
        staging: a folder in `run_dir` with valid checkpoints and records; it is removed.
        run_dir: the run directory.
    """
    try:
        # Records first: they may contain later steps than a checkpoint, but not fewer.
        for record_file in record_files(staging):
            record_file.replace(run_dir / record_file.name)

        # Each folder appears complete, by one rename.
        target_dir = store.checkpoints_dir(run_dir)
        target_dir.mkdir(exist_ok=True)
        for folder in sorted(store.checkpoints_dir(staging).iterdir()):
            target = target_dir / folder.name
            if target.exists():
                damage = store.find_damage(target)
                if damage is None or store.has_other_layout(target):
                    continue
                console.info(store.move_aside(target, damage))
            folder.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
