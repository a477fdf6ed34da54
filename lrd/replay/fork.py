"""A new run that goes on from any step of another one.

The state after that step is a checkpoint of the run, or is computed again from the newest one
before it. The new run gets it as its first checkpoint, with all records up to it, so its curves in
TensorBoard begin where its parent's do. Without changes it takes the steps that its parent took,
bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrd import recipe as recipes
from lrd.checkpoint import manifest, store
from lrd.checkpoint.run_dir import RunDir, read_status
from lrd.checkpoint.starts import Start, describe_fork, render_starts
from lrd.errors import UserError
from lrd.parts.schedules import result_settings
from lrd.replay.computing.launching import compute, scratch_folder
from lrd.replay.computing.plan import Watch
from lrd.replay.history import RunHistory, differing_values, read_history
from lrd.replay.probe import build_parameters
from lrd.tracking import pages
from lrd.tracking.copying import copy_records


@dataclass(frozen=True)
class Fork:
    """A run that was forked and has not been started.

    Attributes:
        run_dir: of the new run.
        step: the step that it goes on from.
        parent: the run that it was forked from.
        changes: key of the recipe -> the parent's value and the new one.
        ranks: of the parent at that step.
        num_replayed: how many steps were computed again to get there.
        is_exact: whether it will take its parent's steps if nothing is changed.
    """

    run_dir: Path
    step: int
    parent: Path
    changes: dict[str, tuple[Any, Any]]
    ranks: int
    num_replayed: int
    is_exact: bool


def fork(parent: Path, step: int, overrides: Sequence[str]) -> Fork:
    """Make a new run that goes on from a step of another one. It is not started.

    Args:
        parent: the run directory of that run.
        step: how many of its steps the new run begins with.
        overrides: `run_dir=NEW`, and settings to change from there on.

    Raises:
        UserError: there is no such step; `run_dir` is missing or in use; a setting is wrong; or
            the step cannot be computed here.
    """
    history = read_history(parent)
    if not _has_run_dir(overrides):
        raise UserError("fork: run_dir=NEW is missing: the directory of the new run")
    if not 0 < step <= history.last_step:
        raise UserError(
            f"fork: --at {step}: {parent} has checkpoints up to step {history.last_step}, and a "
            "fork begins at step 1 or later"
        )
    recipe = _changed_recipe(history, step, overrides)
    run_dir = Path(recipe.run_dir)
    build_parameters(recipe, history)  # refuses what network and optimizer do not take
    _require_writable(run_dir)
    if store.list_steps(run_dir) or (run_dir / "recipe.yaml").exists():
        raise UserError(f"run_dir: {run_dir} has a run already; name another one")

    with scratch_folder(parent) as out:
        state, num_replayed = _state_at(history, step, out)
        forked_from = _describe_origin(history, step)
        trainer = {
            **state.trainer,
            "starts": _starts_until(history, step),
            "forked_from": forked_from,
        }
        _write_run(run_dir, recipe, replace(state, trainer=trainer), history)

    changes = _describe_changes(history, step, recipe)
    # Such a run averages its momentum where it saves, which changes the last bits.
    is_exact = num_replayed == 0 or recipe.trainer.gradient_exchange != "kept"
    return Fork(run_dir, step, parent, changes, history.ranks_at(step), num_replayed, is_exact)


def _describe_origin(history: RunHistory, step: int) -> dict[str, Any]:
    """The ancestry of a fork, for its checkpoints."""
    first = history.checkpoint_before(step)
    link = manifest.read_link(history.checkpoints[first]) if first else None
    return {
        "run": str(history.run_dir.resolve()),
        "step": step,
        "checkpoint": first,
        "manifest": "" if link is None else link.sha256,
    }


def _write_run(
    run_dir: Path, recipe: recipes.Recipe, state: store.TrainState, history: RunHistory
) -> None:
    """Fill the directory of a new run."""
    parent_status = read_status(history.run_dir) or {}
    origin = describe_fork(state.trainer["forked_from"])
    owner = RunDir(run_dir)
    try:
        texts = [
            pages.recipe_text(recipe),
            pages.table_text("forked_from", [("this run", origin)]),
        ]
        copy_records(history.run_dir, run_dir, state.step, texts)
        store.save(run_dir, state)
        total_steps = parent_status.get("total_steps")
        owner.write_status("stopped", step=state.step, total_steps=total_steps)
        # Last: without it nobody starts from half of a run.
        owner.write("recipe.yaml", f"# {origin}\n{recipe.dump()}")
    finally:
        owner.close()


def _require_writable(run_dir: Path) -> None:
    """Refuse a directory that cannot be made, before steps are computed for it."""
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run_dir: {run_dir} cannot be written")


def _has_run_dir(overrides: Sequence[str]) -> bool:
    """Whether the new run's directory is among the settings."""
    return any(override.startswith("run_dir=") for override in overrides)


def _changed_recipe(history: RunHistory, step: int, overrides: Sequence[str]) -> recipes.Recipe:
    """The recipe by which the parent took the step after this one, with the changes.

    The parent's mirror stays the parent's: two runs in one would delete each other's checkpoints.
    """
    values = history.recipe_at(step)
    values["checkpoint"]["mirror"] = None
    return recipes.parse(values, str(history.run_dir), list(overrides))


def _describe_changes(
    history: RunHistory, step: int, recipe: recipes.Recipe
) -> dict[str, tuple[Any, Any]]:
    """The settings that affect the results or the length, and are not the parent's."""
    parent_recipe = recipes.parse(history.recipe_at(step), history.name)
    before, now = (
        {**result_settings(each), "trainer.epochs": each.trainer.epochs}
        for each in (parent_recipe, recipe)
    )
    return differing_values(before, now)


def _state_at(history: RunHistory, step: int, out: Path) -> tuple[store.TrainState, int]:
    """The state after a step, and how many steps were computed again for it."""
    if step in history.checkpoints:
        return store.read(history.checkpoints[step]), 0

    legs = history.legs(step, step)
    legs[-1].saves = True
    compute(legs, Watch(), out, history.name)
    return store.read(store.checkpoint_path(out, step)), step - legs[0].first


def _starts_until(history: RunHistory, step: int) -> list[dict[str, Any]]:
    """The parent's starts that led to a step, each with its own recipe."""
    starts = [start for start in history.starts if start.step < step]
    has_later_recipe = any(start.recipe is not None for start in history.starts[len(starts) :])
    if starts and has_later_recipe and starts[-1].recipe is None:
        last = starts[-1]
        starts[-1] = Start(last.step, last.circumstances, history.recipe_at(last.step))
    return render_starts(starts)
