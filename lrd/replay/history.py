"""What the files of a run say of its steps: checkpoints, starts, recipes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import lrd
from lrd import recipe as recipes
from lrd.checkpoint import network_config, store
from lrd.checkpoint.run_dir import read_status
from lrd.checkpoint.starts import Start, parse_starts
from lrd.distributed import hardware
from lrd.errors import UserError, first_line
from lrd.parts.schedules import result_settings
from lrd.recipe import named
from lrd.replay.computing.plan import SAVED, Leg
from lrd.replay.records import has_evaluation, read_records

# Sections that are not in `config.json`. They decide what is recorded, and with
# `gradient_exchange: kept` when the momentum is averaged.
_LOCAL_SECTIONS = ("checkpoint", "tracking")


@dataclass
class RunHistory:
    """A run, as its files tell of it. Nothing is written.

    Attributes:
        run_dir: the run directory.
        recipe_file: its `recipe.yaml`: the recipe of the last start.
        checkpoints: the valid ones, by step.
        trainers: their `trainer.json`, by step.
        damaged: a line for each checkpoint that is not valid.
        overrides: settings that were changed for the replay, such as `data.root`.
        starts: that led to the newest checkpoint; empty if the run does not say.
        saved_recipes: those in the checkpoints' `config.json`, by step.
        notes: lines on what the run lacks.
    """

    run_dir: Path
    recipe_file: dict[str, Any]
    checkpoints: dict[int, Path]
    trainers: dict[int, dict[str, Any]]
    damaged: list[str]
    overrides: Sequence[str] = ()
    starts: list[Start] = field(default_factory=list)
    saved_recipes: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.run_dir)

    @property
    def first_step(self) -> int:
        """The step at which the run's own history begins: that of a fork, or 0."""
        return 0 if self.forked_from is None else int(self.forked_from["step"])

    @property
    def forked_from(self) -> dict[str, Any] | None:
        """The run that it was forked from, as in `trainer.json`; None if it was not."""
        values = self.trainers[self.last_step].get("forked_from") if self.checkpoints else None
        return values if isinstance(values, dict) else None

    @property
    def last_step(self) -> int:
        """The step of the newest valid checkpoint; 0 if there is none."""
        return max(self.checkpoints, default=0)

    def checkpoint_before(self, step: int) -> int:
        """The step of the newest valid checkpoint at or before a step; 0: the beginning.

        Raises:
            UserError: there is none, and the run does not begin at step 0.
        """
        earlier = [saved for saved in self.checkpoints if saved <= step]
        if earlier:
            return max(earlier)
        if self.first_step > 0:
            assert self.forked_from is not None
            raise UserError(
                f"{self.run_dir}: begins after step {self.first_step}, where it was forked from "
                f"{self.forked_from['run']}"
            )
        return 0

    def start_at(self, step: int) -> Start | None:
        """The start that took the step after `step` steps; None if the run does not say."""
        begun = [start for start in self.starts if start.step <= step]
        return begun[-1] if begun else None

    def recipe_at(self, step: int) -> dict[str, Any]:
        """The recipe by which the step after `step` steps was taken, whole."""
        merged = {**self.recipe_file, "run_dir": str(self.run_dir)}
        # After the newest checkpoint the last start trained, whose recipe this is.
        if step < self.last_step:
            later = [start for start in self.starts if start.step > step]
            begun = [start for start in self.starts if start.step <= step]
            candidates = [start.recipe for start in [*begun[-1:], *later] if start.recipe]
            candidates += [
                self.saved_recipes[saved] for saved in sorted(self.saved_recipes) if saved > step
            ]
            merged |= candidates[0] if candidates else {}

            facts = begun[-1].circumstances if begun else {}
            merged |= {key: facts[key] for key in _LOCAL_SECTIONS if key in facts}
            merged["trainer"] = {**merged.get("trainer", {}), **facts.get("trainer", {})}
        recipe = recipes.parse(merged, str(self.run_dir), self.overrides)
        return recipe.model_dump(mode="json")

    def legs(self, first: int, last: int) -> list[Leg]:
        """The legs that lead from the newest checkpoint before `first` to `last`.

        Args:
            first: steps done when the steps that matter begin: those from `first` + 1 are observed.
            last: steps done when they end.
        """
        begin = self.checkpoint_before(first)
        bounds = [start.step for start in self.starts if begin < start.step < last]
        steps = [begin, *bounds, last]

        # A start may have evaluated at its end because its recipe ended there.
        records = read_records(self.run_dir) if bounds else {}
        legs: list[Leg] = []
        for leg_first, leg_last in itertools.pairwise(steps):
            start = self.start_at(leg_first)
            facts = {} if start is None else start.circumstances
            recipe = self.recipe_at(leg_first)
            checkpoint = self.checkpoints.get(leg_first)
            is_first = not legs
            has_other_recipe = leg_first > 0 and self.changes_at(leg_first)
            if leg_first == self.first_step and self.forked_from is not None:
                has_other_recipe = True  # its first checkpoint is of its parent's recipe

            if is_first:
                name = str(checkpoint) if leg_first else None
            else:
                name = SAVED
                legs[-1].saves = True
            if leg_last in self.checkpoints and leg_last == last:
                # A signal, or an interval that is no multiple of the epoch, may have left the
                # evaluation to the next start.
                skips = self.trainers[leg_last].get("evaluated") != leg_last
            else:
                skips = False
            legs.append(
                Leg(
                    recipe=recipe,
                    ranks=self.ranks_at(leg_first),
                    threads=facts.get("threads"),
                    on_cpu=facts.get("device", "cpu") == "cpu",
                    first=leg_first,
                    last=leg_last,
                    checkpoint=name,
                    has_other_recipe=has_other_recipe,
                    settings=self._settings_after(leg_first),
                    observes_from=first + 1,
                    skips_last_evaluation=skips,
                    evaluates_at_end=leg_last in bounds and has_evaluation(records, leg_last),
                )
            )
        return legs

    def _settings_after(self, step: int) -> dict[str, Any] | None:
        """The settings with which the step after `step` steps was taken, by a checkpoint after it.

        None if the start that took it has left none.
        """
        later = [saved for saved in sorted(self.checkpoints) if saved > step]
        if not later or self.start_at(later[0] - 1) != self.start_at(step):
            return None
        settings = self.trainers[later[0]].get("identity")
        return settings if isinstance(settings, dict) else None

    def changes_at(self, step: int) -> bool:
        """Whether a start that began after `step` steps changed what affects the results."""
        before = recipes.parse(self.recipe_at(step - 1), self.name)
        after = recipes.parse(self.recipe_at(step), self.name)
        return result_settings(before) != result_settings(after)

    def ranks_at(self, step: int) -> int:
        """How many ranks took the step after `step` steps."""
        status = read_status(self.run_dir) or {}
        start = self.start_at(step)
        if step >= self.last_step and status.get("ranks"):  # the last start, see `recipe_at`
            return int(status["ranks"])
        if start is not None:
            return int(start.circumstances["ranks"])
        later = [saved for saved in sorted(self.checkpoints) if saved > step]
        return int(self.trainers[later[0]].get("world_size", 1)) if later else 1

    def describe_other_code(self, first: int, last: int) -> list[str]:
        """A line if some steps were taken by other source files of lrd than those here."""
        here = named.source_digest(Path(lrd.__file__).parent)
        for step in [first, *(start.step for start in self.starts if first < start.step < last)]:
            start = self.start_at(step)
            if start is not None and start.circumstances["lrd_source"] != here:
                return [f"{self.run_dir}: was computed by other source files of lrd than these"]
        return []

    def describe_other_circumstances(self, first: int, last: int) -> list[str]:
        """How this host differs from those that computed some steps, a line for each difference.

        With any of them the last bits may differ.
        """
        processor = hardware.describe_processor()
        torch_version = store.package_versions()["torch"]
        lines: list[str] = []
        for step in [first, *(start.step for start in self.starts if first < start.step < last)]:
            start = self.start_at(step)
            if start is None:  # of a former version, see `notes`
                continue
            facts = start.circumstances
            if facts["device"] == "cpu" and facts["processor"] != processor:
                lines.append(f"processor: {facts['processor']}, here {processor}")
            if facts["versions"]["torch"] != torch_version:
                lines.append(f"torch: {facts['versions']['torch']}, here {torch_version}")
        return list(dict.fromkeys(lines))


def read_history(run_dir: Path, overrides: Sequence[str] = ()) -> RunHistory:
    """Read what the files of a run say, and verify its checkpoints.

    Args:
        run_dir: the run directory.
        overrides: settings to change for the replay, such as `data.root=images`.

    Raises:
        UserError: it is no run directory, or its recipe cannot be read.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")

    recipe_file = _read_recipe_file(run_dir)
    checkpoints = {}
    trainers = {}
    damaged = []
    for step in store.list_steps(run_dir):
        path = store.checkpoint_path(run_dir.absolute(), step)  # the ranks may start elsewhere
        damage = store.find_damage(path)
        if damage is not None:
            damaged.append(f"{path}: {damage}")
            continue
        checkpoints[step] = path
        trainers[step] = store.read_trainer(path)

    history = RunHistory(run_dir, recipe_file, checkpoints, trainers, damaged, overrides)
    if checkpoints:
        history.starts = parse_starts(trainers[history.last_step].get("starts"))
        for step, path in checkpoints.items():
            recipe = network_config.read_recipe(store.read_config_file(path))
            if recipe is not None:
                history.saved_recipes[step] = recipe
    if checkpoints and (not history.starts or history.starts[0].step > history.first_step):
        history.notes.append(
            f"{run_dir}: its first steps were taken by a version of lrd that did not record ranks, "
            "threads and processor; they are computed with the ranks of the checkpoint and the "
            "threads of this start, and may differ in the last bits"
        )
    history.recipe_at(history.last_step)  # refuses overrides that are wrong
    return history


def _read_recipe_file(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "recipe.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: contains no recipe")
    return values


def differing_values(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each key in which two sets of settings differ."""
    return {
        key: (first.get(key), second.get(key))
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
    }
