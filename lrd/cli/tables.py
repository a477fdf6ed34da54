"""Tables of runs and of a run's checkpoints."""

from __future__ import annotations

from pathlib import Path

import yaml

from lrd import console
from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.run_dir import read_status
from lrd.errors import UserError


def runs_table(root: Path) -> None:
    """Print a row for each run directory at or below `root`.

    Raises:
        UserError: the folder is missing, or there is no run in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")

    run_dirs = [path.parent for path in sorted(root.rglob("status.json"))]
    rows = []
    for run_dir in run_dirs:
        status = read_status(run_dir)
        if status is None:  # another program's file
            continue

        steps = f"{status.get('step', '?')}/{status.get('total_steps', '?')}"
        best = status.get("best_accuracy")
        accuracy = "" if best is None else f"{best:.4f}"
        rows.append([run_dir, _describe_recipe(run_dir), steps, accuracy, _describe_state(status)])

    if not rows:
        raise UserError(f"{root}: no run in it; a run leaves a status.json in its run_dir")
    console.table("", ["run", "recipe", "steps", "best accuracy", "state"], rows)


def checkpoints_table(run_dir: Path, verify: bool) -> bool:
    """Print a row for each checkpoint of a run, also for those that were moved aside as damaged.

    Args:
        run_dir: the run directory.
        verify: hash all files and add a column with the result.

    Returns:
        False if `verify` found a damaged checkpoint.

    Raises:
        UserError: the run directory is missing or has no checkpoint.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")

    folder = store.checkpoints_dir(run_dir)
    paths = sorted(path for path in folder.glob("step-*") if path.is_dir())
    if not paths:
        raise UserError(f"{run_dir}: no checkpoint in it")

    columns = ["checkpoint", "size", "epoch", "best accuracy"]
    if verify:
        columns.append("verified")

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

    console.table(str(run_dir), columns, rows)
    return all_valid


def export_weights_and_report(run_dir: Path, out: Path) -> None:
    """Write the weights of the newest valid checkpoint to a file and print how to load them.

    Raises:
        UserError: there is no valid checkpoint, or `out` cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")

    path = store.export_weights(run_dir, out)
    console.info(f"{out}: the weights of {path}; load them with safetensors.torch.load_file")


def _describe_state(status: dict[str, object]) -> str:
    """The state of a run, with the first line of its message if there is one."""
    state = str(status["state"])
    message = str(status.get("message", "")).splitlines()
    return f"{state}: {message[0]}" if message else state


def _describe_recipe(run_dir: Path) -> str:
    """A run's recipe in a few words; `?` if it cannot be read."""
    try:
        text = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
        recipe = recipes.parse(yaml.safe_load(text), str(run_dir))
    except (OSError, yaml.YAMLError, UserError):
        return "?"

    words = (
        f"{recipe.data.dataset} {recipe.model.arch}, "
        f"{recipe.optimizer.name} lr {recipe.optimizer.lr:g}"
    )
    if recipe.lr_dropout is not None:
        words += f", keep_prob {recipe.lr_dropout.keep_prob:g}"
    return words


def _describe_position(path: Path) -> tuple[str, str]:
    """The epoch of a checkpoint and the best result so far; `?` if they cannot be read."""
    try:
        trainer = store.read_trainer(path)
        epoch = str(trainer["epoch"])
        best = trainer["best"]
        if best is None:
            return epoch, ""
        return epoch, f"{best['accuracy']:.4f} at step {best['step']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "?", "?"
