"""Copy checkpoints from a mirror. Nothing is published, or given out, before it was verified."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lrd import console
from lrd.checkpoint import manifest, store, transfer
from lrd.checkpoint.mirror.layout import (
    DAMAGED_FILE,
    RECORDS_FILE,
    folder_name,
    sort_by_step,
    whole_steps,
)
from lrd.checkpoint.mirror.remote import KEY, Remote, RemoteError
from lrd.errors import UserError, describe_os_error

_STAGING_NAME = ".mirror-download"  # in the run directory; the run's lock keeps other runs out


def fetch_newest(remote: Remote, run_dir: Path) -> None:
    """Copy the newest valid checkpoint of a mirror into `run_dir`, if it is later than all there.

    Rank 0 calls this, when it has the run directory and the mirror to itself; the other ranks must
    not. The best checkpoint and the records are copied too. A checkpoint that turns out to be
    damaged is passed over with a line, and does not count in the mirror any more.

    Raises:
        UserError: the mirror cannot be read, or a file cannot be written. What was in `run_dir` is
            then untouched.
    """
    newest, _ = store.find_newest_valid(run_dir)
    local_step = -1 if newest is None else int(store.read_trainer(newest)["step"])
    staging = run_dir / _STAGING_NAME

    try:
        by_step = sort_by_step(remote.list_objects())
        later_steps = [step for step in whole_steps(by_step) if step > local_step]
        if not later_steps:
            return

        has = "none" if local_step < 0 else f"none after step {local_step}"
        console.info(
            f"{remote.url}: has a checkpoint of step {later_steps[-1]}, {run_dir} has {has}"
        )
        shutil.rmtree(staging, ignore_errors=True)  # of a start that was killed
        for step, damage in _download_newest_first(remote, later_steps, by_step, staging):
            if damage is not None:
                _withdraw(remote, step)
                continue

            damaged_step = _download_best(remote, step, by_step, staging)
            if damaged_step is not None:
                _withdraw(remote, damaged_step)
            _download_records(remote, step, staging)
            transfer.publish(staging, run_dir)
            return
    except RemoteError as error:
        raise UserError(f"{KEY}: {remote.url}: {error}") from None
    except OSError as error:
        raise UserError(
            f"run_dir: the checkpoint in {remote.url} could not be copied to {run_dir}: "
            f"{describe_os_error(error)}"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def list_checkpoints(remote: Remote) -> dict[int, dict[str, int]]:
    """The files of each checkpoint in a mirror, also of those that are not whole.

    Returns:
        step -> file -> size in bytes, the oldest step first.

    Raises:
        UserError: the mirror cannot be read.
    """
    try:
        return sort_by_step(remote.list_objects())
    except RemoteError as error:
        raise UserError(f"{remote.url}: {error}") from None


@contextmanager
def downloaded(remote: Remote, step: int, sizes: dict[str, int]) -> Iterator[Path]:
    """A checkpoint of a mirror in a temporary folder; it need not be valid.

    Args:
        sizes: file -> size in bytes, of the files to copy.

    Raises:
        UserError: the mirror cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="lrd-mirror-") as name:
        try:
            _copy_files(remote, step, sizes, Path(name))
        except RemoteError as error:
            raise UserError(f"{remote.url}: {error}") from None
        yield store.checkpoint_path(Path(name), step)


@contextmanager
def downloaded_run(remote: Remote, best: bool, step: int | None) -> Iterator[Path]:
    """A temporary run directory with what `export.find_checkpoint` looks for in a mirror.

    Args:
        best: copy the checkpoint of the best evaluation too.
        step: copy the checkpoint of this step; default: the newest valid one.

    Raises:
        UserError: it is not there, or the mirror cannot be read.
    """
    by_step = list_checkpoints(remote)
    steps = whole_steps(by_step)
    if step is not None and step not in steps:
        has = ", ".join(map(str, steps)) or "no step"
        raise UserError(f"{remote.url}: the checkpoint of step {step} is not there; has {has}")

    with tempfile.TemporaryDirectory(prefix="lrd-mirror-") as name:
        folder = Path(name)
        try:
            wanted_steps = steps if step is None else [step]
            walk = _download_newest_first(remote, wanted_steps, by_step, folder)
            for found_step, damage in walk:
                if damage is None:
                    if best:
                        _download_best(remote, found_step, by_step, folder)
                    break
                if step is not None:
                    raise UserError(f"{remote.url}/{folder_name(step)}: {damage}")
            else:
                raise UserError(f"{remote.url}: there is no valid checkpoint in it")
        except RemoteError as error:
            raise UserError(f"{remote.url}: {error}") from None
        yield folder


def _download_newest_first(
    remote: Remote, steps: list[int], by_step: dict[int, dict[str, int]], run_dir: Path
) -> Iterator[tuple[int, str | None]]:
    """Copy checkpoints to their places in a run directory, as long as the caller asks for more.

    Args:
        steps: of the checkpoints, the oldest first.
        by_step: step -> file -> size in bytes, as the mirror lists them.
        run_dir: a folder that no run uses.

    Yields:
        The step, and one line that says what is wrong with the copy; None if it is valid. A damaged
        one is removed, with a line, when the caller goes on.

    Raises:
        RemoteError: the mirror cannot be read.
        OSError: a file cannot be written.
        UserError: one has another layout version. That is not damage, so an older checkpoint must
            not silently take its place.
    """
    for step in reversed(steps):
        size = sum(by_step[step].values())  # bytes
        console.info(f"{remote.url}/{folder_name(step)}: copying {size / 1e6:.1f} MB")
        path = _copy_files(remote, step, by_step[step], run_dir)

        damage = store.find_damage(path)
        if damage is not None and store.has_other_layout(path):
            raise UserError(f"{remote.url}/{folder_name(step)}: {damage}")
        yield step, damage
        if damage is not None:
            _pass_over(remote, path, step, damage)


def _pass_over(remote: Remote, path: Path, step: int, damage: str) -> None:
    """Say why a checkpoint is not used, and remove its copy."""
    console.info(f"{remote.url}/{folder_name(step)}: passed over: {damage}")
    shutil.rmtree(path)


def _copy_files(remote: Remote, step: int, sizes: dict[str, int], run_dir: Path) -> Path:
    """Copy the files of a checkpoint to its place in a run directory. Returns its folder there.

    Raises:
        RemoteError: the mirror cannot be read.
        OSError: a file cannot be written.
    """
    target = store.checkpoint_path(run_dir, step)
    target.mkdir(parents=True, exist_ok=True)
    for file in (manifest.NAME, *sorted(store.FILES & sizes.keys())):
        if file in sizes:
            remote.download(f"{folder_name(step)}/{file}", target / file, sizes[file])
    return target


def _download_best(
    remote: Remote, step: int, by_step: dict[int, dict[str, int]], staging: Path
) -> int | None:
    """Copy the best checkpoint too, if the mirror has it and it is valid.

    A run goes on without it, so another layout version is no error here.

    Returns:
        Its step if it is damaged.
    """
    best = store.read_trainer(store.checkpoint_path(staging, step))["best"]
    best_step = None if best is None else best["step"]
    if best_step is None or best_step == step or best_step not in whole_steps(by_step):
        return None

    path = _copy_files(remote, best_step, by_step[best_step], staging)
    damage = store.find_damage(path)
    if damage is None:
        return None
    is_damaged = not store.has_other_layout(path)
    _pass_over(remote, path, best_step, damage)
    return int(best_step) if is_damaged else None


def _download_records(remote: Remote, step: int, staging: Path) -> None:
    """Copy the records as they were when a checkpoint was written. Damaged ones are left out."""
    name_of_list = f"{folder_name(step)}/{RECORDS_FILE}"
    content = remote.read(name_of_list)
    try:
        if content is None:
            raise ValueError("is missing")
        expected = manifest.parse_files(content)  # they are listed as a checkpoint's files are
    except ValueError as error:
        console.info(f"{remote.url}/{name_of_list}: {error}; no records copied")
        return

    available = remote.list_objects()
    for name, entry in expected.items():
        # A name that comes from the mirror must not lead out of the folder.
        if not transfer.is_record_name(name):
            continue
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if not isinstance(size, int) or available.get(name, -1) < size:
            problem = "missing" if name not in available else "too short"
        else:
            remote.download(name, staging / name, size)
            problem = "" if manifest.measure(staging / name) == entry else "damaged"
        if problem:
            console.info(f"{remote.url}/{name}: {problem}; not copied")
            (staging / name).unlink(missing_ok=True)


def _withdraw(remote: Remote, step: int) -> None:
    """Let a damaged checkpoint not count any more. Its files stay, as those of a local one do."""
    with suppress(RemoteError):
        remote.rename(f"{folder_name(step)}/{manifest.NAME}", f"{folder_name(step)}/{DAMAGED_FILE}")
