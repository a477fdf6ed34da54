"""The training state on disk: write, verify, find the newest good one, retain.

    <run_dir>/checkpoints/step-00001234/
        model.safetensors   the weights and buffers, loadable by anyone
        optimizer.pt        state_dicts of optimizer and schedule; loads with weights_only=True
        trainer.json        position, best result, what was being computed, versions
        manifest.json       size and SHA-256 of each file; written last

A checkpoint is written beside, flushed to disk and published by one rename: what a reader can see is complete.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import platform
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import safetensors.torch
import torch
from torch import Tensor

from lrd import manifest
from lrd.errors import UserError, first_line

LEAST_KEPT = 2  # that verify: one may be lost to the disk
_NAME = re.compile(r"step-(\d{8,})")
_FILES = ("model.safetensors", "optimizer.pt", "trainer.json")


@dataclass(frozen=True)
class State:
    """All that a resume needs.

    Attributes:
        model: state_dict of the unwrapped network; on the CPU where it is saved or was read.
        optimizer: {"optimizer": state_dict, "schedule": state_dict}.
        trainer: JSON values: `step`, `epoch`, `samples`, `skipped` steps, `evaluated` (the step of the latest
            evaluation), `best` ({"step", "accuracy", "loss"} or None), `latest`, `identity` (what decides about the
            numbers), `world_size`.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.trainer["step"])

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return _nbytes([self.model, self.optimizer])


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(_nbytes(item) for item in value)


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def name(step: int) -> str:
    return f"step-{step:08d}"


def path_of(run_dir: Path, step: int) -> Path:
    return folder(run_dir) / name(step)


def steps(run_dir: Path) -> list[int]:
    """The steps that have a published checkpoint, whole or not, oldest first."""
    if not folder(run_dir).is_dir():
        return []
    found = ((entry.name, _NAME.fullmatch(entry.name)) for entry in folder(run_dir).iterdir() if entry.is_dir())
    return sorted(int(match[1]) for own, match in found if match and own == name(int(match[1])))


def save(run_dir: Path, state: State) -> Path:
    """Write and publish one checkpoint. For one rank only.

    Raises:
        UserError: it could not be written; what was there before is untouched.
    """
    target = path_of(run_dir, state.step)
    beside = folder(run_dir) / f".{target.name}.{os.getpid()}.tmp"
    replaced = beside.with_name(f"{beside.stem}.old.tmp")
    try:
        beside.mkdir(parents=True)
        _refuse_a_full_disk(beside, state.nbytes)
        weights = {key: value.contiguous() for key, value in state.model.items()}
        safetensors.torch.save_file(weights, beside / _FILES[0])
        with (beside / _FILES[1]).open("wb") as stream:  # by its own name torch would not say what the system said
            torch.save(state.optimizer, stream)
        trainer = {**state.trainer, "versions": versions()}
        (beside / _FILES[2]).write_text(json.dumps(trainer, indent=1), encoding="utf-8")
        (beside / _FILES[0]).chmod((beside / _FILES[2]).stat().st_mode)  # safetensors' file is its owner's alone
        manifest.write(beside, state.step, _FILES)
        for file in (*_FILES, manifest.NAME):
            _flush(beside / file)
        _flush(beside)
        if target.exists():
            target.rename(replaced)
        beside.rename(target)
        _flush(target.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise UserError(f"{target}: the checkpoint could not be written: {first_line(cause)}") from error
    finally:
        for left in (beside, replaced):
            shutil.rmtree(left, ignore_errors=True)
    return target


def _refuse_a_full_disk(where: Path, nbytes: int) -> None:
    free = shutil.disk_usage(where).free
    if free < nbytes:
        raise OSError(None, f"it needs {nbytes / 1e6:.1f} MB, free are {free / 1e6:.1f} MB")


def retain(run_dir: Path, keep_last: int, best_step: int | None) -> list[str]:
    """Delete older checkpoints, once the newest verified: all but `keep_last`, the best, and two that verify.

    Returns:
        A line for each of the newest that did not verify and was moved aside. Nothing is deleted until there are two
        that do.
    """
    present, faults, whole = steps(run_dir), [], 0
    for kept, step in enumerate(reversed(present)):
        if kept >= keep_last and whole >= LEAST_KEPT:
            if step != best_step:
                _delete(path_of(run_dir, step))
        elif whole < LEAST_KEPT and len(present) > keep_last:
            path = path_of(run_dir, step)
            why = damage(path)
            whole += why is None
            if why is not None and not _is_foreign(path):
                faults.append(f"{path}: damaged: {why}; moved aside to {_move_aside(path).name}")
    return faults


def _is_foreign(path: Path) -> bool:
    """Whether a checkpoint is of a layout that this lrd does not know; that is no damage."""
    return manifest.layout_version(path) not in (None, *manifest.READABLE)


def _delete(path: Path) -> None:
    gone = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # out of every reader's sight in one rename
    path.rename(gone)
    shutil.rmtree(gone)


def damage(path: Path) -> str | None:
    """Why a checkpoint is not whole, naming the file; None where size and hash of each file hold."""
    match = _NAME.match(path.name)
    return manifest.damage(path, int(match[1]) if match else -1, _FILES)


def survey(run_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and each newer one with what is wrong with it. Touches nothing.

    Raises:
        UserError: a checkpoint has another layout version: that is not damage, and not to be guessed at.
    """
    passed_over: list[tuple[Path, str]] = []
    for step in reversed(steps(run_dir)):
        path = path_of(run_dir, step)
        why = damage(path)
        if why is None:
            return path, passed_over
        if _is_foreign(path):
            raise UserError(f"{path}: {why}")
        passed_over.append((path, why))
    return None, passed_over


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """`survey` for a run that takes the directory over: damaged checkpoints are moved aside to `*.damaged`, never
    deleted; remains of interrupted writes are removed. A line says which and why.
    """
    for replaced in folder(run_dir).glob(".step-*.old.tmp"):  # killed between the two renames of a second save
        target = folder(run_dir) / replaced.name.split(".")[1]
        if not target.exists():
            replaced.rename(target)
    for left in folder(run_dir).glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    path, passed_over = survey(run_dir)
    lines = [f"{bad}: damaged: {why}; moved aside to {_move_aside(bad).name}" for bad, why in passed_over]
    return path, lines


def read(path: Path) -> State:
    """Read a checkpoint that verified. No code from the file is run.

    Raises:
        UserError: it cannot be read all the same.
    """
    return parse(path, content(path))


def content(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint. Ranks pass them on as they are: to pickle a state's tensors takes far longer.

    Raises:
        UserError: one cannot be read.
    """
    try:
        return {file: (path / file).read_bytes() for file in _FILES}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None


def parse(path: Path, files: dict[str, bytes]) -> State:
    """The state in a checkpoint's files. No code from them is run.

    Raises:
        UserError: there is none; the line names `path`.
    """
    weights, optimizer, trainer = (files[file] for file in _FILES)
    try:
        return State(
            safetensors.torch.load(weights),
            torch.load(io.BytesIO(optimizer), map_location="cpu", weights_only=True),
            _trainer(trainer),
        )
    except pickle.UnpicklingError:
        raise UserError(f"{path}: optimizer.pt holds more than tensors and plain values; it was not loaded") from None
    except Exception as error:  # torch.load raises whatever the pickle machinery does
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None


def read_trainer(path: Path) -> dict[str, Any]:
    """A checkpoint's `trainer.json`."""
    return _trainer((path / _FILES[2]).read_bytes())


def _trainer(raw: bytes) -> dict[str, Any]:
    """Layout 1 skipped no step and evaluated before it saved."""
    values: dict[str, Any] = json.loads(raw)
    return {"skipped": 0, "evaluated": values["step"], **values}


def export(run_dir: Path, out: Path) -> Path:
    """Write the weights of the newest whole checkpoint to one safetensors file. Returns the checkpoint.

    Names and shapes are those of torchvision's ResNets, but for the stem's 3 x 3 convolution.

    Raises:
        UserError: there is no whole checkpoint, or `out` cannot be written; it is then as it was.
    """
    path, _ = survey(run_dir)
    if path is None:
        raise UserError(f"{run_dir}: no whole checkpoint in it")
    beside = out.parent / f".lrd-export.{os.getpid()}.tmp"
    try:
        shutil.copyfile(path / _FILES[0], beside)
        _flush(beside)
        beside.replace(out)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise UserError(f"{out}: cannot be written: {first_line(error)}") from None
    return path


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__}


def _flush(path: Path) -> None:
    """To the disk, and out of the cache: what verifies afterwards was read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise") and not path.is_dir():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _move_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(aside)
