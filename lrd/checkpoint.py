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

from lrd.errors import UserError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_FILES = ("model.safetensors", "optimizer.pt", "trainer.json")


@dataclass(frozen=True)
class State:
    """All that a resume needs.

    Attributes:
        model: state_dict of the unwrapped network, on the CPU.
        optimizer: {"optimizer": state_dict, "schedule": state_dict}.
        trainer: JSON values: `step`, `epoch`, `samples`, `best` ({"step", "accuracy", "loss"} or None), `recipe`.
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
    return sorted(int(match[1]) for entry in folder(run_dir).iterdir() if (match := _NAME.fullmatch(entry.name)))


def save(run_dir: Path, state: State) -> Path:
    """Write and publish one checkpoint. For one rank only.

    Raises:
        UserError: it could not be written; what was there before is untouched.
    """
    target = folder(run_dir) / name(state.step)
    beside = folder(run_dir) / f".{target.name}.{os.getpid()}.tmp"
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
            _move_aside(target)
        beside.rename(target)
        _flush(target.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"{target}: the checkpoint could not be written: {_reason(error)}") from error
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
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"manifest.json: layout version {manifest['format']}, this lrd reads {FORMAT}"
        if set(files) != set(_FILES):
            return "manifest.json: does not list the files of a checkpoint"
        for file in _FILES:
            measured = _measure(path / file)
            for key in ("bytes", "sha256"):
                if measured[key] != files[file][key]:
                    return f"{file}: {key} is {measured[key]}, the manifest says {files[file][key]}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name}: missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json: cannot be read: {_reason(error)}"
    return None


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that was passed over.

    Those are moved aside to `*.damaged`; remains of interrupted writes are removed.
    """
    passed_over: list[str] = []
    for left in folder(run_dir).glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for step in reversed(steps(run_dir)):
        path = folder(run_dir) / name(step)
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
    except Exception as error:  # torch.load raises whatever the pickle machinery does
        raise UserError(f"{path}: cannot be read: {_reason(error)}") from None


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


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__
