"""Recipe -> torch lr scheduler, with an optional linear warm-up; lr trajectories without training.

The scheduler drives the raw optimizer and is never handed to Accelerate: one that was `prepare`d
steps `num_processes` times per update.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.parts.optimizers import FLOAT32_MAX
from lrd.parts.schedulers import (
    build_scheduler,
    lists_by_group,
    segment_lengths,
    takes_total,
)
from lrd.recipe import schema
from lrd.recipe.named import call_named, import_callable

# torch computes an lr from the one before, so that where a decay ends at zero it can be a little
# less by rounding.
_SMALLEST_LR = -1e-9


class Schedule:
    """A torch scheduler that steps once per optimizer step or per epoch, times a linear warm-up.

    The warm-up multiplies the scheduled lr by min(1, (step + 1) / warmup_steps): the first update
    has lr / warmup_steps, update number `warmup_steps` has the full lr, and milestones stay where
    the recipe puts them (Goyal et al., arXiv 1706.02677).

    Args:
        optimizer: the raw torch optimizer.
        section: the recipe's `schedule`.
        steps_of_all_epochs: optimizer steps of all `trainer.epochs`, whatever `trainer.max_steps`
            is; `T_max` and an expression's `total` come from it.
        steps_per_epoch: optimizer steps of one epoch.

    Raises:
        UserError: if the scheduler refuses an argument, or `lr_lambda` is not a valid expression.
            Here and in a later step: if the lr is negative or too large, or the scheduler fails.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        section: recipes.Schedule,
        steps_of_all_epochs: int,
        steps_per_epoch: int,
    ) -> None:
        self.optimizer = optimizer
        self.name = section.name
        self.unit = section.unit
        self.warmup_steps = section.warmup_steps
        self.steps = 0

        # What `end_evaluation` passes on to ReduceLROnPlateau: a key of its metrics.
        self.metric = ""
        if isinstance(section, schema.ReduceLROnPlateau) and section.metric is not None:
            self.metric = section.metric.removeprefix("test_")

        self.length = run_length(section, steps_of_all_epochs, steps_per_epoch)
        self.scheduler: Any = build_scheduler(optimizer, section, self.length)
        self._lrs_before_warmup = self._read_lrs()
        self._apply_warmup()

    @property
    def needs_metric(self) -> bool:
        """Whether the schedule goes by evaluations."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    def step(self) -> None:
        """Set the lr of the next step. Call it after each optimizer step."""
        self.steps += 1
        if self.unit == "step":
            self.advance()
        else:
            self._apply_warmup()

    def end_epoch(self) -> None:
        """Set the lr of the next epoch. Call it after the last step of each epoch."""
        if self.unit == "epoch":
            self.advance()

    def advance(self) -> None:
        """Move the scheduler on by one position: a step or an epoch, whichever it counts."""
        if not self.needs_metric:
            self._step_scheduler()
        self._apply_warmup()

    def end_evaluation(self, metrics: dict[str, float]) -> None:
        """Let ReduceLROnPlateau look at an evaluation. Call it after those at an epoch's end.

        Args:
            metrics: `loss` and `accuracy` on the test set, and with images that are held out also
                `validation_loss` and `validation_accuracy`.
        """
        if self.needs_metric:
            self._step_scheduler(metrics[self.metric])
            self._apply_warmup()

    def _step_scheduler(self, *metric: float) -> None:
        if self.scheduler is None:
            return

        # torch's schedulers compute the next lr from the one in the optimizer, so they must find
        # the lr that they set there, without the warm-up.
        self._write_lrs(self._lrs_before_warmup)
        call_named(self.name, "schedule", lambda: self.scheduler.step(*metric))
        self._lrs_before_warmup = self._read_lrs()

    def _apply_warmup(self) -> None:
        factor = 1.0
        if self.warmup_steps > 0:
            factor = min(1.0, (self.steps + 1) / self.warmup_steps)
        self._write_lrs([lr * factor for lr in self._lrs_before_warmup])

    def _read_lrs(self) -> list[float]:
        """The lrs that the scheduler has set.

        Raises:
            UserError: an lr is negative, or no number of float32. After the last step of the run
                it may be: no step uses that lr.
        """
        position = 0 if self.scheduler is None else self.scheduler.last_epoch
        lrs = []
        for number, group in enumerate(self.optimizer.param_groups):
            lr = float(group["lr"])
            if not _SMALLEST_LR <= lr <= FLOAT32_MAX and position < self.length:
                raise UserError(
                    f"schedule: {self.name} sets the lr of {group.get('name', f'group{number}')} "
                    f"to {lr} after {position} {self.unit}s; it must be at least 0 and at most "
                    f"{FLOAT32_MAX:.1e}, the largest number of float32"
                )
            lrs.append(lr)
        return lrs

    def _write_lrs(self, lrs: list[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            # An lr tensor is filled in place: a compiled or captured step reads that tensor.
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Plain values only, which `torch.load(weights_only=True)` accepts."""
        state: dict[str, Any] = {"steps": self.steps, "scheduled": self._lrs_before_warmup}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self._lrs_before_warmup = list(state["scheduled"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._apply_warmup()

    def fast_forward(self, steps: int, steps_per_epoch: int) -> None:
        """Step to where the schedule is after `steps` optimizer steps, without any evaluation.

        A run that continues with a changed recipe needs it: there is no state to load.
        """
        with warnings.catch_warnings():
            # torch warns about scheduler steps without optimizer steps.
            warnings.simplefilter("ignore")

            for step in range(self.steps + 1, steps + 1):
                self.step()
                if step % steps_per_epoch == 0:
                    self.end_epoch()


def depends_on_length(section: recipes.Schedule) -> bool:
    """Whether the lr at a step depends on the length of the run.

    A schedule of the user's own depends on it if it takes the argument `total` and the recipe does
    not give it.
    """
    match section:
        case schema.CosineAnnealingLR():
            return section.T_max is None
        case schema.LinearLR() | schema.PolynomialLR():
            return section.total_iters is None
        case schema.OneCycleLR():
            return section.total_steps is None
        case schema.LambdaLR():
            return True
        case schema.SequentialLR():
            # The others end at milestones.
            return depends_on_length(section.schedules[-1])
        case schema.OwnSchedule():
            function = import_callable(section.name, "schedule.name")
            return "total" not in section.arguments and takes_total(function)
    return False


def result_settings(recipe: recipes.Recipe) -> dict[str, Any]:
    """The recipe's `result_settings`, with the length of the run where the lr depends on it."""
    settings = recipe.result_settings()
    if depends_on_length(recipe.schedule):
        settings["trainer.epochs"] = recipe.trainer.epochs
    return settings


def lr_trajectory(recipe: recipes.Recipe, steps_per_epoch: int) -> dict[str, list[float]]:
    """The lr of each step and parameter group that a recipe leads to, without training.

    ReduceLROnPlateau reacts to results, which are not known here: its trajectory is the one of a
    metric that never stalls.

    Args:
        recipe: its optimizer's lrs, groups and schedule are used.
        steps_per_epoch: optimizer steps of one epoch.

    Returns:
        Name of the group -> lr at each step of the run.
    """
    section = recipe.optimizer
    lrs = {"group0": section.lr}
    for name, group_section in zip(section.group_names, section.groups, strict=True):
        lrs[name] = section.lr if group_section.lr is None else group_section.lr

    has_no_group0 = any(
        len(values) == len(section.groups) for values in lists_by_group(recipe.schedule)
    )
    if has_no_group0:  # the lists say that the groups of the recipe have all parameters
        del lrs["group0"]

    # What a schedule sees of an optimizer; it takes no steps.
    groups = [{"name": name, "lr": lr, "params": [torch.zeros(())]} for name, lr in lrs.items()]
    optimizer = Optimizer(groups, {"momentum": 0.9, "betas": (0.9, 0.999), "weight_decay": 0.0})
    check_length(recipe, steps_per_epoch)
    schedule = Schedule(
        optimizer,
        recipe.schedule,
        steps_of_all_epochs=recipe.trainer.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )

    trajectories: dict[str, list[float]] = {name: [] for name in lrs}
    for step in range(1, total_steps(recipe, steps_per_epoch) + 1):
        for group in optimizer.param_groups:
            trajectories[group["name"]].append(float(group["lr"]))
        schedule.fast_forward(step, steps_per_epoch)
    return trajectories


def total_steps(recipe: recipes.Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: those of its epochs, or `trainer.max_steps` if that is fewer."""
    steps = recipe.trainer.epochs * steps_per_epoch
    if recipe.trainer.max_steps is None:
        return steps
    return min(steps, recipe.trainer.max_steps)


def run_length(section: recipes.Schedule, steps: int, steps_per_epoch: int) -> int:
    """A number of optimizer steps in the unit of a schedule; an epoch that is begun counts."""
    return steps if section.unit == "step" else math.ceil(steps / steps_per_epoch)


def check_length(recipe: recipes.Recipe, steps_per_epoch: int) -> list[str]:
    """Compare a recipe's schedule with the length of its run.

    Returns:
        A line for each part of the schedule that lies beyond the end of the run.

    Raises:
        UserError: the run is longer than the cycle of OneCycleLR, which has no lr after its end.
    """
    section = recipe.schedule
    unit = f"{section.unit}s"
    steps = total_steps(recipe, steps_per_epoch)
    length = run_length(section, steps, steps_per_epoch)
    if isinstance(section, schema.OneCycleLR) and (section.total_steps or length) < length:
        raise UserError(
            f"schedule.total_steps: is {section.total_steps}, but the run has {length} {unit}, and "
            "OneCycleLR ends with its last one; leave the key out to have the run's length"
        )

    all_steps = recipe.trainer.epochs * steps_per_epoch
    total = run_length(section, all_steps, steps_per_epoch)
    lines = _describe_late_milestones(section, total, unit)
    if isinstance(section, schema.StepLR) and section.step_size >= total:
        lines.append(
            f"schedule.step_size: is {section.step_size}, but the run has {total} {unit}, "
            "so the lr never changes"
        )
    if section.warmup_steps > all_steps:
        lines.append(
            f"schedule.warmup_steps: is {section.warmup_steps}, but the run has {all_steps} steps, "
            "so the lr never reaches its full value"
        )
    return lines


def _describe_late_milestones(
    section: recipes.Schedule, total: int, unit: str, key: str = "schedule"
) -> list[str]:
    lines = []
    if isinstance(section, schema.MultiStepLR | schema.SequentialLR):
        late = [str(milestone) for milestone in section.milestones if milestone >= total]
        if late:
            where = "the run" if key == "schedule" else "its part of the run"
            lines.append(
                f"{key}.milestones: {', '.join(late)}: {where} has {total} {unit}, "
                "so nothing happens there"
            )

    if isinstance(section, schema.SequentialLR):
        for i, length in enumerate(segment_lengths(section, total)):
            inner = section.schedules[i]
            lines += _describe_late_milestones(inner, length, unit, f"{key}.schedules.{i}")
    return lines
