"""Recipe -> torch lr scheduler, with an optional linear warm-up; lr trajectories without training.

The scheduler drives the raw optimizer and is never handed to Accelerate: one that was `prepare`d
steps `num_processes` times per update.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable
from typing import Any

import simpleeval
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from lrd import recipe as recipes
from lrd.errors import UserError, first_line

# The functions that an expression may call, see `parse_lambda`.
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "cos": math.cos,
    "sin": math.sin,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "floor": math.floor,
    "ceil": math.ceil,
}


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
    """

    def __init__(
        self,
        optimizer: Optimizer,
        section: recipes.Schedule,
        steps_of_all_epochs: int,
        steps_per_epoch: int,
    ) -> None:
        self.optimizer = optimizer
        self.unit = section.unit
        self.warmup_steps = section.warmup_steps
        self.steps = 0

        # The length of all epochs in the schedule's unit.
        total = steps_of_all_epochs
        if section.unit == "epoch":
            total = math.ceil(steps_of_all_epochs / steps_per_epoch)

        # What `end_evaluation` passes on to ReduceLROnPlateau: `loss` or `accuracy`.
        self.metric = ""
        if section.name == "ReduceLROnPlateau":
            self.metric = section.metric.removeprefix("test_")

        self.scheduler = _build_scheduler(optimizer, section, total)
        self._lrs_before_warmup = self._read_lrs()
        self._apply_warmup()

    @property
    def needs_metric(self) -> bool:
        return isinstance(self.scheduler, torch_schedulers.ReduceLROnPlateau)

    def step(self) -> None:
        """Set the lr of the next step. Call it after each optimizer step."""
        self.steps += 1
        if self.unit == "step" and not self.needs_metric:
            self._step_scheduler()
        self._apply_warmup()

    def end_epoch(self) -> None:
        """Set the lr of the next epoch. Call it after the last step of each epoch."""
        if self.unit == "epoch" and not self.needs_metric:
            self._step_scheduler()
            self._apply_warmup()

    def end_evaluation(self, metrics: dict[str, float]) -> None:
        """Let ReduceLROnPlateau look at an evaluation. Call it after those at an epoch's end.

        Args:
            metrics: `loss` and `accuracy` on the test set.
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
        self.scheduler.step(*metric)
        self._lrs_before_warmup = self._read_lrs()

    def _apply_warmup(self) -> None:
        factor = 1.0
        if self.warmup_steps > 0:
            factor = min(1.0, (self.steps + 1) / self.warmup_steps)
        self._write_lrs([lr * factor for lr in self._lrs_before_warmup])

    def _read_lrs(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

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
    """Whether the lr at a step depends on the length of the run."""
    if section.name == "CosineAnnealingLR":
        return section.T_max is None
    return section.name == "LambdaLR"


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

    # A schedule sees nothing but lrs, so any optimizer of any parameters will do.
    groups = [{"name": name, "lr": lr, "params": [torch.zeros(())]} for name, lr in lrs.items()]
    optimizer = torch.optim.SGD(groups)
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


def parse_lambda(text: str, total: int) -> Callable[[int], float]:
    """An arithmetic expression as a function from the schedule's position to a factor of the lr.

    An expression can use the names `t` (steps or epochs done, depending on `schedule.unit`),
    `total`, `pi` and `e`, and the functions min, max, abs, cos, sin, exp, log, sqrt, floor and
    ceil. simpleeval parses and evaluates it: attributes and calls of anything else are refused.

    Args:
        text: the expression, e.g. `(1 - t / total) ** 2`.
        total: length of the run in steps or epochs.

    Raises:
        UserError: if it is not such an expression, or its value at the first or last position is
            not a finite number >= 0. The function raises it for the other positions.
    """
    names = {"t": 0, "total": total, "pi": math.pi, "e": math.e}
    evaluator = simpleeval.SimpleEval(functions=_FUNCTIONS, names=names, allowed_attrs={})
    refusals_to_parse = (
        simpleeval.InvalidExpression,
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    )
    refusals_to_evaluate = (
        simpleeval.InvalidExpression,
        ArithmeticError,
        TypeError,
        ValueError,
        RecursionError,
    )

    try:
        # simpleeval alone would accept an assignment, or a second statement.
        ast.parse(text.strip(), mode="eval")
        parsed = evaluator.parse(text)
    except refusals_to_parse as error:
        raise UserError(
            f"schedule.lr_lambda: {text!r} is not an expression: {first_line(error)}"
        ) from None

    def factor(t: int) -> float:
        evaluator.names["t"] = t
        try:
            value = float(evaluator.eval(text, previously_parsed=parsed))
        except refusals_to_evaluate as error:
            raise UserError(
                f"schedule.lr_lambda: {text!r} cannot be evaluated at t={t}: {first_line(error)}"
            ) from None

        if not math.isfinite(value) or value < 0.0:
            raise UserError(
                f"schedule.lr_lambda: {text!r} is {value} at t={t}; "
                "it must be finite and not negative"
            )
        return value

    # Most mistakes show at one of the two ends: report them before training starts.
    factor(0)
    factor(total)
    return factor


def _build_scheduler(optimizer: Optimizer, section: recipes.Schedule, total: int) -> Any:
    """The torch scheduler that a recipe names, or None for a constant lr."""
    if section.name == "constant":
        return None

    arguments = section.arguments
    if section.name == "LambdaLR":
        expression = "1" if section.lr_lambda is None else section.lr_lambda
        arguments["lr_lambda"] = parse_lambda(expression, total)
    elif section.name == "CosineAnnealingLR":
        arguments.setdefault("T_max", total)
    elif section.name == "ReduceLROnPlateau":
        arguments.setdefault("mode", "max" if section.metric == "test_accuracy" else "min")

    cls = getattr(torch_schedulers, section.name)
    try:
        return cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule: {section.name} refuses: {first_line(error)}") from None
