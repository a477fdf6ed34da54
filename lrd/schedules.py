"""Recipe -> torch lr scheduler, with an optional linear warm-up; the trajectory without training.

The scheduler drives the raw optimizer and is never handed to Accelerate: one that was `prepare`d steps
`num_processes` times per update.
"""

from __future__ import annotations

import ast
import difflib
import inspect
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

NAMES = ("constant", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR", "ReduceLROnPlateau", "LambdaLR")
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min, "max": max, "abs": abs, "cos": math.cos, "sin": math.sin, "exp": math.exp, "log": math.log,
    "sqrt": math.sqrt, "floor": math.floor, "ceil": math.ceil,
}  # fmt: skip


class Schedule:
    """A torch scheduler that steps once per optimizer step or per epoch, times a linear warm-up.

    The warm-up multiplies what the schedule says by min(1, (step + 1) / warmup_steps): the first update has
    lr / warmup_steps, update number `warmup_steps` the full lr, and milestones stay where the recipe puts them (Goyal
    et al., arXiv 1706.02677).

    Args:
        optimizer: the raw torch optimizer.
        section: the recipe's `schedule`.
        total_steps: optimizer steps of the whole run; `T_max` and an expression's `total` come from it.
        steps_per_epoch: optimizer steps of one epoch.
    """

    def __init__(self, optimizer: Optimizer, section: recipes.Schedule, total_steps: int, steps_per_epoch: int) -> None:
        self.optimizer = optimizer
        self.unit = section.unit
        self.metric = section.metric
        self.warmup_steps = section.warmup_steps
        self.steps = 0
        total = total_steps if section.unit == "step" else math.ceil(total_steps / steps_per_epoch)
        self.scheduler = _build(optimizer, section, total)
        self._scheduled = [float(group["lr"]) for group in optimizer.param_groups]  # without the warm-up
        self._apply()

    @property
    def needs_metric(self) -> bool:
        return isinstance(self.scheduler, torch_schedulers.ReduceLROnPlateau)

    def step(self) -> None:
        """After each optimizer step."""
        self.steps += 1
        if self.unit == "step":
            self._advance()
        self._apply()

    def end_epoch(self) -> None:
        """After the last step of each epoch."""
        if self.unit == "epoch":
            self._advance()
            self._apply()

    def end_evaluation(self, metrics: dict[str, float]) -> None:
        """After each evaluation: what ReduceLROnPlateau goes by. `metrics` has `loss` and `accuracy`."""
        if self.needs_metric:
            self._advance(metrics[self.metric.removeprefix("test_")])
            self._apply()

    def _advance(self, *metric: float) -> None:
        if self.scheduler is None or self.needs_metric != bool(metric):
            return
        # torch's schedulers compute the next lr from the present one, so they must see theirs, not the warmed-up one.
        for group, lr in zip(self.optimizer.param_groups, self._scheduled, strict=True):
            _set_lr(group, lr)
        self.scheduler.step(*metric)
        self._scheduled = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _apply(self) -> None:
        warm = min(1.0, (self.steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        for group, lr in zip(self.optimizer.param_groups, self._scheduled, strict=True):
            _set_lr(group, lr * warm)

    def state_dict(self) -> dict[str, Any]:
        """Loads with `weights_only=True`: numbers and lists only."""
        own = {"steps": self.steps, "scheduled": self._scheduled}
        return own if self.scheduler is None else {**own, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self._scheduled = list(state["scheduled"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._apply()

    def replay(self, steps: int, steps_per_epoch: int) -> None:
        """Go to where the schedule is after `steps` steps, metrics aside: a changed recipe has no state to load."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of scheduler steps without optimizer steps
            for step in range(self.steps + 1, steps + 1):
                self.step()
                if step % steps_per_epoch == 0:
                    self.end_epoch()


def depends_on_length(section: recipes.Schedule) -> bool:
    """Whether the lr at a step depends on how long the run is to be."""
    return section.name == "LambdaLR" or (section.name == "CosineAnnealingLR" and "T_max" not in section.arguments)


def trajectory(recipe: recipes.Recipe, steps_per_epoch: int) -> dict[str, list[float]]:
    """lr of each step and parameter group as the recipe has it, without training: group name -> lr per step.

    ReduceLROnPlateau answers to results, which nobody has yet: its line is what it is when the metric never stalls.
    """
    section = recipe.optimizer
    lrs = {"group0": section.lr}
    for i, own in enumerate(section.groups):
        lrs[own.name or f"group{i + 1}"] = section.lr if own.lr is None else own.lr
    groups = [{"name": name, "lr": lr, "params": [torch.zeros(())]} for name, lr in lrs.items()]
    optimizer = torch.optim.SGD(groups)  # whichever optimizer it is, the schedule sees lr alone
    total = run_length(recipe, steps_per_epoch)
    schedule = Schedule(optimizer, recipe.schedule, recipe.trainer.epochs * steps_per_epoch, steps_per_epoch)
    lines: dict[str, list[float]] = {group["name"]: [] for group in optimizer.param_groups}
    for step in range(1, total + 1):
        for group in optimizer.param_groups:
            lines[group["name"]].append(float(group["lr"]))
        schedule.replay(step, steps_per_epoch)
    return lines


def run_length(recipe: recipes.Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: its epochs, or `trainer.max_steps` where that is fewer."""
    whole = recipe.trainer.epochs * steps_per_epoch
    return whole if recipe.trainer.max_steps is None else min(whole, recipe.trainer.max_steps)


def expression(text: str, total: int) -> Callable[[int], float]:
    """A factor of the lr as a function of the schedule's position, from an arithmetic expression.

    Names: `t` (steps or epochs done, as `schedule.unit` says), `total`, `pi`, `e`; functions: min, max, abs, cos, sin,
    exp, log, sqrt, floor, ceil. Parsed and evaluated by simpleeval: no attribute, no call of anything else.

    Raises:
        UserError: no such expression, or it gives no finite number >= 0 somewhere in the run's first or last position.
    """
    names = {"t": 0, "total": total, "pi": math.pi, "e": math.e}
    evaluator = simpleeval.SimpleEval(functions=_FUNCTIONS, names=names, allowed_attrs={})
    try:
        ast.parse(text.strip(), mode="eval")  # one expression: no assignment, no second statement
        parsed = evaluator.parse(text)
    except (simpleeval.InvalidExpression, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"schedule.lr_lambda: {text!r} is no expression: {first_line(error)}") from None

    def factor(t: int) -> float:
        evaluator.names["t"] = t
        try:
            value = float(evaluator.eval(text, previously_parsed=parsed))
        except (simpleeval.InvalidExpression, ArithmeticError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"schedule.lr_lambda: {text!r} at t={t}: {first_line(error)}") from None
        if not (math.isfinite(value) and value >= 0.0):
            raise UserError(f"schedule.lr_lambda: {text!r} is {value} at t={t}; a factor is finite and not negative")
        return value

    factor(0), factor(total)
    return factor


def _build(optimizer: Optimizer, section: recipes.Schedule, total: int) -> Any:
    if section.name not in NAMES:
        near = difflib.get_close_matches(section.name, NAMES, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"schedule.name: is {section.name!r}, may be {', '.join(NAMES)}{hint}")
    arguments = section.arguments
    if section.name == "constant":
        if arguments:
            raise UserError(f"schedule.{next(iter(arguments))}: a constant schedule has no arguments")
        return None
    cls = getattr(torch_schedulers, section.name)
    accepted = [
        name for name in inspect.signature(cls).parameters if name not in ("optimizer", "last_epoch", "verbose")
    ]
    for name in arguments:
        if name not in accepted:
            raise UserError(f"schedule.{name}: {section.name} has no such argument; it has {', '.join(accepted)}")
    if section.name == "LambdaLR":
        arguments = {"lr_lambda": expression(str(arguments.get("lr_lambda", "1")), total)}
    elif section.name == "CosineAnnealingLR":
        arguments.setdefault("T_max", total)
    elif section.name == "ReduceLROnPlateau":
        if section.unit != "epoch":
            raise UserError(
                f"schedule.unit: is {section.unit!r}, ReduceLROnPlateau steps after evaluations: may be 'epoch'"
            )
        arguments.setdefault("mode", "max" if section.metric == "test_accuracy" else "min")
    try:
        return cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule: {section.name} refuses: {first_line(error)}") from None


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
