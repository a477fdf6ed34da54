"""Checkpoints on disk: write, verify, find the newest valid one, delete old ones.

    <run_dir>/checkpoints/step-00001234/
        model.safetensors   weights and buffers, loadable by anyone
        ema.safetensors     their moving averages, if the recipe asks for them
        config.json         what inference needs: network, classes, image size, mean, recipe, ...
        optimizer.pt        state_dicts of optimizer and schedule; loads with weights_only=True
        trainer.json        position, best result, the settings that affect the results, versions
        manifest.json       size and SHA-256 of each file; written last

What is in `config.json` is also in the metadata of the two files of weights, so each of these can
be used alone.

A checkpoint is written into a hidden folder beside its final place, flushed to disk, and published
by one rename. So every checkpoint that a reader can see is complete.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import pickle
import platform
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lrd.checkpoint import manifest, network_config
from lrd.errors import UserError, first_line
from lrd.files import sync

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
TRAINER_FILE = "trainer.json"
CONFIG_FILE = "config.json"
EMA_FILE = "ema.safetensors"

# Layout version -> what a checkpoint of that version must have.
_REQUIRED_FILES = {
    2: {MODEL_FILE, OPTIMIZER_FILE, TRAINER_FILE},
    3: {MODEL_FILE, OPTIMIZER_FILE, TRAINER_FILE, CONFIG_FILE},
}
_OPTIONAL_FILES = {EMA_FILE}
FILES = {*_REQUIRED_FILES[3], *_OPTIONAL_FILES}  # all that may be beside the manifest

# What `trainer.json` must have, so that a run can go on from it.
_TRAINER_TYPES: dict[str, Any] = {
    "step": int,
    "skipped": int,
    "evaluated": int,
    "best": dict | None,
}
_MAX_STEP = 1 << 53  # a float64 counts up to it

# This many valid checkpoints are kept whatever the recipe says: the disk may damage one later.
MIN_VALID = 2
_NAME_PATTERN = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to resume.

    Attributes:
        model: state_dict of the unwrapped model; on the CPU when it is saved or was read.
        optimizer: {"optimizer": state_dict, "schedule": state_dict}.
        trainer: JSON values: `step`, `epoch`, `samples`, `skipped` (number of skipped steps),
            `replaced` (how often another image was taken in place of an unreadable one),
            `evaluated` (step of the latest evaluation), `best` ({"step", "accuracy", "loss"} or
            None), `latest` (metrics of the latest evaluation), `identity` (the settings that affect
            the results), `world_size`.
        ema: moving averages of the weights, as `model`; None if the recipe asks for none.
        config: JSON values that inference needs, see `lrd.checkpoint.network_config`.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.trainer["step"])

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return _nbytes([self.model, self.optimizer, self.ema])


def _nbytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_nbytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_nbytes(item) for item in value)
    return 0


def checkpoints_dir(run_dir: Path) -> Path:
    """Return the folder with all checkpoints of a run."""
    return run_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints_dir(run_dir) / checkpoint_name(step)


def list_steps(run_dir: Path) -> list[int]:
    """Return the steps that have a published checkpoint, valid or not, oldest first."""
    if not checkpoints_dir(run_dir).is_dir():
        return []

    entries = checkpoints_dir(run_dir).iterdir()
    steps = [parse_name(entry.name) for entry in entries if entry.is_dir()]
    return sorted(step for step in steps if step is not None)


def parse_name(name: str) -> int | None:
    """The step of a checkpoint's folder, by its name; None if it is no name of a checkpoint."""
    match = _NAME_PATTERN.fullmatch(name)
    if match is None:
        return None

    # Nine digits that begin with a zero match too, but no run writes such a name.
    step = int(match[1])
    return step if name == checkpoint_name(step) else None


def save(run_dir: Path, state: TrainState) -> Path:
    """Write and publish one checkpoint. Rank 0 calls this; the other ranks must not.

    Args:
        run_dir: the run directory.
        state: what to save, with its tensors on the CPU. A checkpoint of the same step is replaced.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: it could not be written; what was there before is untouched.
    """
    target = checkpoint_path(run_dir, state.step)

    # Beside the target: a rename is atomic only within one file system.
    temporary = checkpoints_dir(run_dir) / f".{target.name}.{os.getpid()}.tmp"
    replaced = temporary.with_name(f"{temporary.stem}.old.tmp")

    try:
        temporary.mkdir(parents=True)
        _require_free_space(temporary, state.nbytes)
        files = _write_files(temporary, state, _find_previous(run_dir, state.step))

        # All bytes reach the disk before the rename makes them visible.
        for file in (*files, manifest.NAME):
            sync(temporary / file, drop_cache=True)
        sync(temporary, drop_cache=True)

        # If the process is killed between these two renames, recover_newest undoes the first.
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        sync(target.parent, drop_cache=True)

    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch wraps the system's error ("No space left on device") in one that says less.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(
            f"{target}: the checkpoint could not be written: {first_line(cause)}"
        ) from error

    finally:
        # Any exception may come between the two renames, an interrupt too. What was replaced may be
        # the only good checkpoint, so it is deleted only when another one is in its place.
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        if replaced.is_file():  # something else stood in the place of the checkpoint
            replaced.unlink(missing_ok=True)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _find_previous(run_dir: Path, step: int) -> manifest.Link | None:
    """The manifest of the newest checkpoint before a step, for the chain of manifests."""
    earlier = [earlier for earlier in list_steps(run_dir) if earlier < step]
    return manifest.read_link(checkpoint_path(run_dir, earlier[-1])) if earlier else None


def _write_files(folder: Path, state: TrainState, previous: manifest.Link | None) -> list[str]:
    """Write the files of a checkpoint into a folder, the manifest last.

    Returns:
        Their names, without the manifest's.
    """
    versions = package_versions()
    trainer = {**state.trainer, "versions": versions}
    (folder / TRAINER_FILE).write_text(json.dumps(trainer, indent=1), encoding="utf-8")

    config = network_config.for_weights(state.config, network_config.NETWORK, versions)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1), encoding="utf-8")

    files = [MODEL_FILE, OPTIMIZER_FILE, TRAINER_FILE, CONFIG_FILE]
    _write_weights(folder / MODEL_FILE, state.model, config)
    if state.ema is not None:
        files.append(EMA_FILE)
        config = network_config.for_weights(state.config, network_config.EMA, versions)
        _write_weights(folder / EMA_FILE, state.ema, config)

    # Given a file name, torch hides the system's error message; given a stream, it does not.
    with (folder / OPTIMIZER_FILE).open("wb") as stream:
        torch.save(state.optimizer, stream)

    # safetensors lets only the owner read its files; the umask decides about the other files.
    for file in files:
        (folder / file).chmod((folder / TRAINER_FILE).stat().st_mode)

    manifest.write_manifest(folder, state.step, files, previous)
    return files


def _write_weights(path: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a safetensors file with a config in its metadata; equal values give equal bytes."""
    # safetensors refuses tensors that are not contiguous, such as channels_last ones, and tensors
    # that share memory, such as those of tied layers.
    tensors: dict[str, Tensor] = {}
    memory = set[int]()
    for key, value in weights.items():
        value = value.contiguous()
        address = value.untyped_storage().data_ptr()
        tensors[key] = value.clone() if address in memory else value
        memory.add(address)
    safetensors.torch.save_file(tensors, path, network_config.to_metadata(config))

    # safetensors writes the keys of the metadata in a random order. Two runs that end with the same
    # bits must end with the same files.
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        stream.seek(8)
        stream.write(text.ljust(size))


def _require_free_space(folder: Path, nbytes: int) -> None:
    """Raise OSError if the disk has less than `nbytes` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(None, f"it needs {nbytes / 1e6:.1f} MB, free are {free / 1e6:.1f} MB")


def delete_old(run_dir: Path, keep_last: int, best_step: int | None) -> list[str]:
    """Delete old checkpoints, after newer ones were read back from the disk and verified.

    These are kept: the newest `keep_last`, the best one, the one that a fork began with, and as
    many as it takes to have MIN_VALID valid ones. Nothing is deleted before that many have been
    verified.

    Args:
        run_dir: the run directory.
        keep_last: number of newest checkpoints to keep, valid or not.
        best_step: step of the best checkpoint; None if there is none.

    Returns:
        A line for each checkpoint that was damaged and moved aside.
    """
    steps = list_steps(run_dir)
    lines = []
    num_valid = 0

    for index, step in enumerate(reversed(steps)):
        path = checkpoint_path(run_dir, step)

        if index >= keep_last and num_valid >= MIN_VALID:
            if step != best_step and not _is_fork_point(path, step):
                _delete(path)
            continue

        # Verifying reads whole files: only as many as are needed, and only if any could be deleted.
        if num_valid < MIN_VALID and len(steps) > keep_last:
            damage = find_damage(path)
            if damage is None:
                num_valid += 1
            elif not has_other_layout(path):
                lines.append(move_aside(path, damage))

    return lines


def _is_fork_point(path: Path, step: int) -> bool:
    """Whether a run was forked from another one at this checkpoint: nothing else replaces it."""
    try:
        forked_from = read_trainer(path).get("forked_from") or {}
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(forked_from, dict) and forked_from.get("step") == step


def has_other_layout(path: Path) -> bool:
    """Whether a checkpoint has a layout that this lrd does not read. That is not damage."""
    return manifest.layout_version(path) not in (None, *manifest.READABLE_VERSIONS)


def _delete(path: Path) -> None:
    """Delete a checkpoint. One rename hides it from readers before its files go one by one."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden)


def find_damage(path: Path) -> str | None:
    """Verify a checkpoint against its manifest and the step in its name.

    Returns:
        One line that names the first file that is wrong and the reason; None if the checkpoint is
        valid.
    """
    match = _NAME_PATTERN.match(path.name)
    step = int(match[1]) if match else -1
    return manifest.find_damage(path, step, _REQUIRED_FILES, _OPTIONAL_FILES)


def find_newest_valid(run_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the newest valid checkpoint without changing anything on disk.

    Returns:
        Its folder (None if there is none), and each newer checkpoint with what is wrong with it.

    Raises:
        UserError: a newer checkpoint has another layout version. That is not damage, so an older
            checkpoint must not silently take its place.
    """
    damaged: list[tuple[Path, str]] = []
    for step in reversed(list_steps(run_dir)):
        path = checkpoint_path(run_dir, step)
        damage = find_damage(path)
        if damage is None:
            return path, damaged
        if has_other_layout(path):
            raise UserError(f"{path}: {damage}")
        damaged.append((path, damage))
    return None, damaged


def recover_newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the newest valid checkpoint for a run that resumes, and clean up.

    Rank 0 calls this; the other ranks must not.

    Damaged checkpoints are moved aside to `*.damaged`, never deleted. What interrupted writes left
    behind is removed.

    Returns:
        The folder of the newest valid checkpoint (None if there is none), and a line for each
        damaged one.

    Raises:
        UserError: a checkpoint has another layout version.
    """
    # A save that replaces a checkpoint may have been killed between its two renames.
    for replaced in checkpoints_dir(run_dir).glob(".step-*.old.tmp"):
        target = checkpoints_dir(run_dir) / replaced.name.split(".")[1]
        if not target.exists():
            replaced.rename(target)

    for leftover in checkpoints_dir(run_dir).glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)

    newest, damaged = find_newest_valid(run_dir)
    lines = []
    for path, damage in damaged:
        lines.append(move_aside(path, damage))
    return newest, lines


def move_aside(path: Path, damage: str) -> str:
    """Rename a damaged checkpoint to `*.damaged`. Returns a line that says so."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")

    path.rename(aside)
    return f"{path}: damaged: {damage}; moved aside to {aside.name}"


def read(path: Path) -> TrainState:
    """Read a checkpoint that was verified before. No code from its files is run.

    Raises:
        UserError: it cannot be read all the same.
    """
    return parse_files(path, read_files(path))


def read_files(path: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint as they are: file name -> bytes.

    Rank 0 sends these bytes to the other ranks.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        return {file: (path / file).read_bytes() for file in manifest.read_files(path)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None


def parse_files(path: Path, files: dict[str, bytes]) -> TrainState:
    """Load a state from the files of a checkpoint. No code from them is run.

    Args:
        path: the checkpoint, for error messages only.
        files: what `read_files` returned.

    Raises:
        UserError: the files contain no state.
    """
    try:
        optimizer_stream = io.BytesIO(files[OPTIMIZER_FILE])
        has_ema = EMA_FILE in files
        return TrainState(
            model=safetensors.torch.load(files[MODEL_FILE]),
            optimizer=torch.load(optimizer_stream, map_location="cpu", weights_only=True),
            trainer=_parse_trainer(files[TRAINER_FILE]),
            ema=safetensors.torch.load(files[EMA_FILE]) if has_ema else None,
            config=json.loads(files.get(CONFIG_FILE, b"{}")),
        )
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: {OPTIMIZER_FILE} contains more than tensors and plain values; "
            "it was not loaded"
        ) from None
    except Exception as error:  # torch.load raises whatever the pickle machinery raises
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None


def _parse_trainer(raw: bytes) -> dict[str, Any]:
    """Read the values of `trainer.json`.

    Raises:
        ValueError: they are not what a run writes.
    """
    values = json.loads(raw)
    if not isinstance(values, dict):
        raise ValueError(f"{TRAINER_FILE}: does not hold keys and values")
    for key, types in _TRAINER_TYPES.items():
        if not isinstance(values.get(key), types):
            raise ValueError(f"{TRAINER_FILE}: {key} is {values.get(key)!r}")
    if not 0 <= values["step"] <= _MAX_STEP:
        raise ValueError(f"{TRAINER_FILE}: step is {values['step']}")
    return values


def read_trainer(path: Path) -> dict[str, Any]:
    """Read the `trainer.json` of a checkpoint."""
    values: dict[str, Any] = json.loads((path / TRAINER_FILE).read_bytes())
    return values


def read_config_file(path: Path) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint; empty if it has none, as in a former version."""
    try:
        values = json.loads((path / CONFIG_FILE).read_bytes())
    except FileNotFoundError:
        return {}
    return values if isinstance(values, dict) else {}


def package_versions() -> dict[str, str]:
    """Return the versions that a checkpoint records."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": importlib.metadata.version("accelerate"),
    }
