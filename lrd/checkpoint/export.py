"""Weights of a run for use outside of it: one safetensors file, or a folder as Hugging Face has it.

OUT.safetensors             the weights; their metadata contains the config

OUT/
    model.safetensors       the same file
    config.json             the config: network, classes, image size, recipe, results, versions
    preprocessor_config.json  how the inputs are made
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from lrd import console
from lrd.checkpoint import manifest, network_config, store
from lrd.errors import UserError, first_line
from lrd.files import sync

SUFFIX = ".safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
FOLDER_FILES = {store.MODEL_FILE, store.CONFIG_FILE, PREPROCESSOR_FILE}


def find_checkpoint(run_dir: Path, best: bool = False, step: int | None = None) -> Path:
    """Find a valid checkpoint of a run: the newest one if nothing else is asked for.

    Args:
        run_dir: the run directory.
        best: the checkpoint of the best evaluation.
        step: the checkpoint of this step.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if best and step is not None:
        raise UserError("best and step: give only one of them")
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")

    if step is not None:
        return _find_step(run_dir, step, "")

    newest, damaged = store.find_newest_valid(run_dir)
    for path, damage in damaged:
        console.info(f"{path}: passed over, it is damaged: {damage}")
    if newest is None:
        raise UserError(f"{run_dir}: there is no valid checkpoint in it")
    if not best:
        return newest

    result = store.read_trainer(newest)["best"]
    if result is None:
        raise UserError(f"{run_dir}: there was no evaluation yet, so no checkpoint is the best")
    return _find_step(
        run_dir, int(result["step"]), " of the best evaluation (checkpoint.keep_best keeps it)"
    )


def _find_step(run_dir: Path, step: int, what: str) -> Path:
    path = store.checkpoint_path(run_dir, step)
    if not path.is_dir():
        steps = ", ".join(str(step) for step in store.list_steps(run_dir)) or "no step"
        raise UserError(f"{run_dir}: the checkpoint of step {step}{what} is not there; has {steps}")

    damage = store.find_damage(path)
    if damage is not None:
        raise UserError(f"{path}: {damage}")
    return path


def weights_file(checkpoint: Path, ema: bool) -> Path:
    """The file of a checkpoint that contains the weights, or their moving averages.

    Raises:
        UserError: there are no averages.
    """
    if not ema:
        return checkpoint / store.MODEL_FILE
    if not (checkpoint / store.EMA_FILE).is_file():
        raise UserError(
            f"{checkpoint}: has no averaged weights; a run has them with trainer.ema_decay"
        )
    return checkpoint / store.EMA_FILE


def export_weights(
    run_dir: Path,
    out: Path,
    best: bool = False,
    ema: bool = False,
    step: int | None = None,
) -> Path:
    """Copy the weights of a checkpoint to a safetensors file or a folder, and verify the copy.

    Args:
        run_dir: the run directory.
        out: a file whose name ends in `.safetensors`, or a folder. An existing file is replaced;
            so is a folder that is empty or contains an earlier export and nothing else.
        best: take the checkpoint of the best evaluation; default: the newest valid one.
        ema: take the moving averages of the weights.
        step: take the checkpoint of this step.

    Returns:
        The checkpoint that the weights come from.

    Raises:
        UserError: there is no such checkpoint, or `out` cannot be written or has another suffix;
            it is then untouched.
    """
    is_folder = _is_folder(out)
    checkpoint = find_checkpoint(run_dir, best, step)
    source = weights_file(checkpoint, ema)
    config = network_config.read_config(source)
    if is_folder and not config:
        raise UserError(
            f"{checkpoint}: was written by an older lrd and does not describe its network; "
            f"its weights can be exported to a {SUFFIX} file only"
        )

    # Beside the target: a rename is atomic only within one file system.
    temporary = out.parent / f".lrd-export.{os.getpid()}.tmp"
    replaced = out.parent / f".lrd-export.{os.getpid()}.old.tmp"
    try:
        if not is_folder:
            _copy_verified(source, temporary)
            temporary.replace(out)
            return checkpoint

        temporary.mkdir()
        _copy_verified(source, temporary / store.MODEL_FILE)
        _write_json(temporary / store.CONFIG_FILE, config)
        _write_json(temporary / PREPROCESSOR_FILE, network_config.preprocessor_config(config))
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {first_line(error)}") from None
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        for left in (temporary, replaced):
            shutil.rmtree(left, ignore_errors=True)
            with suppress(OSError):
                left.unlink()
    return checkpoint


def _is_folder(out: Path) -> bool:
    """Whether an export to this path is a folder.

    Raises:
        UserError: it can be neither a folder nor a safetensors file.
    """
    # Unlike Path's methods, os.path's raise nothing: a path that is too long fails when it is
    # written.
    is_dir = os.path.isdir(out)
    if out.suffix == SUFFIX and not is_dir:
        return False
    if not is_dir:
        if out.suffix or os.path.exists(out):
            raise UserError(
                f"{out}: an export is a file that ends in {SUFFIX}, or a folder, "
                "whose name has no suffix"
            )
        return True

    others = sorted(entry.name for entry in out.iterdir() if entry.name not in FOLDER_FILES)
    if others:
        raise UserError(
            f"{out}: is not replaced: it contains {others[0]}, which is no part of an export"
        )
    return True


def _copy_verified(source: Path, target: Path) -> None:
    """Copy a file of a checkpoint and read the copy back from the disk.

    Raises:
        OSError: it cannot be written, or it is not what the checkpoint's manifest says.
    """
    shutil.copyfile(source, target)
    sync(target, drop_cache=True)

    expected = manifest.read_files(source.parent)[source.name]
    if manifest.measure(target) != expected:
        raise OSError(None, "the copy differs from the checkpoint")


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sync(path, drop_cache=True)
