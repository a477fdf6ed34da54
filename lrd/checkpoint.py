"""The training state on disk: write, verify, find the newest good one, retain.

    <run_dir>/checkpoints/step-00001234/
        model.safetensors   the weights and buffers, loadable by anyone
        optimizer.pt        state_dicts of optimizer and schedule; loads with weights_only=True
        trainer.json        position, best result, what was being computed, versions
        manifest.json       size and SHA-256 of each file; written last

A checkpoint is written beside, flushed to disk and published by one rename: what a reader can see is complete. A
flipped bit passes torch.load and safetensors without a word, so nothing is loaded whose hashes do not hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import safetensors.torch
import torch
from torch import Tensor

from lrd.errors import UserError, first_line

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_FILES = ("model.safetensors", "optimizer.pt", "trainer.json")


@dataclass(frozen=True)
class State:
    """All that a resume needs.

    Attributes:
        model: state_dict of the unwrapped network, on the CPU.
        optimizer: {"optimizer": state_dict, "schedule": state_dict}.
        trainer: JSON values: `step`, `epoch`, `samples`, `best` ({"step", "accuracy", "loss"} or None), `latest`,
            `identity` (what decides about the numbers), `world_size`.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.trainer["step"])


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def name(step: int) -> str:
    return f"step-{step:08d}"


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
    target = folder(run_dir) / name(state.step)
    beside = folder(run_dir) / f".{target.name}.{os.getpid()}.tmp"
    replaced = beside.with_name(f"{beside.stem}.old.tmp")
    try:
        beside.mkdir(parents=True)
        weights = {key: value.contiguous() for key, value in state.model.items()}
        # save_file would make a file that its owner alone can read
        (beside / _FILES[0]).write_bytes(safetensors.torch.save(weights))
        torch.save(state.optimizer, beside / _FILES[1])
        trainer = {"format": FORMAT, **state.trainer, "versions": versions()}
        (beside / _FILES[2]).write_text(json.dumps(trainer, indent=1), encoding="utf-8")
        manifest = {"format": FORMAT, "files": {file: _measure(beside / file) for file in _FILES}}
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in (*_FILES, "manifest.json"):
            _flush(beside / file)
        _flush(beside)
        if target.exists():
            target.rename(replaced)
        beside.rename(target)
        _flush(target.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        if replaced.exists():
            replaced.rename(target)
        raise UserError(f"{target}: the checkpoint could not be written: {first_line(error)}") from error
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def retain(run_dir: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one."""
    present = steps(run_dir)
    for step in present[:-keep_last]:
        if step != best_step:
            gone = folder(run_dir) / f".{name(step)}.{os.getpid()}.tmp"  # out of every reader's sight in one rename
            (folder(run_dir) / name(step)).rename(gone)
            shutil.rmtree(gone)


def damage(path: Path) -> str | None:
    """Why a checkpoint is not whole, naming the file; None where size and hash of each file hold."""
    if not (path / "manifest.json").is_file():
        return "manifest.json: missing"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        layout, files = manifest["format"], {file: dict(manifest["files"][file]) for file in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json: cannot be read: {first_line(error)}"
    if layout != FORMAT:
        return f"manifest.json: layout version {layout!r}, this lrd reads {FORMAT}"
    if set(files) != set(_FILES):
        return "manifest.json: does not list the files of a checkpoint"
    for file in _FILES:
        try:
            measured = _measure(path / file)
        except FileNotFoundError:
            return f"{file}: missing"
        except OSError as error:
            return f"{file}: cannot be read: {first_line(error)}"
        for key, value in measured.items():
            if value != files[file].get(key):
                return f"{file}: {key} is {value}, the manifest says {files[file].get(key)}"
    return None


def layout_version(path: Path) -> int | None:
    """The layout version a checkpoint says it has; None where it says none."""
    try:
        version = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that was passed over.

    Those are moved aside to `*.damaged`; remains of interrupted writes are removed.

    Raises:
        UserError: a checkpoint has another layout version: that is not damage, and not to be guessed at.
    """
    passed_over: list[str] = []
    for left in folder(run_dir).glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for step in reversed(steps(run_dir)):
        path = folder(run_dir) / name(step)
        version = layout_version(path)
        if version not in (None, FORMAT):
            raise UserError(f"{path}: has layout version {version}, this lrd reads {FORMAT}")
        why = damage(path)
        if why is None:
            return path, passed_over
        passed_over.append(f"{path}: damaged: {why}; moved aside to {_move_aside(path).name}")
    return None, passed_over


def read(path: Path) -> State:
    """Read a checkpoint that verified. No code from the file is run.

    Raises:
        UserError: it cannot be read all the same.
    """
    try:
        return State(
            safetensors.torch.load_file(path / _FILES[0]),
            torch.load(path / _FILES[1], map_location="cpu", weights_only=True),
            read_trainer(path),
        )
    except pickle.UnpicklingError:
        raise UserError(f"{path}: optimizer.pt holds more than tensors and plain values; it was not loaded") from None
    except Exception as error:  # torch.load raises whatever the pickle machinery does
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None


def read_trainer(path: Path) -> dict[str, Any]:
    """A checkpoint's `trainer.json`."""
    values: dict[str, Any] = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    return values


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__}


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(aside)
