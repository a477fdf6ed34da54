"""Finished and unfinished runs -> tables."""

from __future__ import annotations

from pathlib import Path

import yaml

from lrd import checkpoint, console
from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.rundir import read_status


def runs_table(root: Path) -> None:
    """A row for each run directory at or below `root`.

    Raises:
        UserError: no run is there.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found = {path.parent: read_status(path.parent) for path in sorted(root.rglob("status.json"))}
    if not any(found.values()):
        raise UserError(f"{root}: no run in it; a run leaves a status.json in its run_dir")
    rows = []
    for run_dir, status in found.items():
        if status is None:  # some other program's
            continue
        best = status.get("best_accuracy")
        steps = f"{status.get('step', '?')}/{status.get('total_steps', '?')}"
        rows.append([run_dir, _describe(run_dir), steps, "" if best is None else f"{best:.4f}", _state(status)])
    console.table("", ["run", "recipe", "steps", "best accuracy", "state"], rows)


def _state(status: dict[str, object]) -> str:
    message = str(status.get("message", "")).splitlines()
    return f"{status['state']}: {message[0]}" if message else str(status["state"])


def _describe(run_dir: Path) -> str:
    """The recipe of a run in a few words."""
    try:
        recipe = recipes.parse(yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8")), str(run_dir))
    except (OSError, yaml.YAMLError, UserError):
        return "?"
    dropout = recipe.lr_dropout
    kept = "" if dropout is None else f", keep_prob {dropout.keep_prob:g}"
    return f"{recipe.data.dataset} {recipe.model.arch}, {recipe.optimizer.name} lr {recipe.optimizer.lr:g}{kept}"


def checkpoints_table(run_dir: Path, verify: bool) -> bool:
    """A row for each checkpoint of a run, those moved aside as damaged too. Returns whether all shown are whole.

    Raises:
        UserError: the run has none.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    paths = sorted(path for path in checkpoint.folder(run_dir).glob("step-*") if path.is_dir())
    if not paths:
        raise UserError(f"{run_dir}: no checkpoint in it")
    rows, whole = [], True
    for path in paths:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        row = [path.name, f"{size / 1e6:.1f} MB", *_position(path)]
        if verify:
            why = checkpoint.damage(path)
            whole = whole and why is None
            row.append("whole" if why is None else f"damaged: {why}")
        rows.append(row)
    columns = ["checkpoint", "size", "epoch", "best accuracy", *(["verified"] if verify else [])]
    console.table(str(run_dir), columns, rows)
    return whole


def export_weights(run_dir: Path, out: Path) -> None:
    """Write the newest whole checkpoint's weights to `out` and say how they load.

    Raises:
        UserError: there is none, or `out` cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    path = checkpoint.export(run_dir, out)
    console.say(f"{out}: the weights of {path}; safetensors.torch.load_file reads them")


def _position(path: Path) -> list[str]:
    try:
        trainer = checkpoint.read_trainer(path)
        best = trainer["best"]
        return [str(trainer["epoch"]), "" if best is None else f"{best['accuracy']:.4f} at step {best['step']}"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["?", "?"]
