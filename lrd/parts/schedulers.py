"""`schedule` -> torch's lr scheduler, or one of the user's own, without the warm-up."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import LRScheduler

from lrd import recipe as recipes
from lrd.errors import UserError, first_line
from lrd.recipe import schema
from lrd.recipe.expressions import parse_lambda
from lrd.recipe.named import call_named, check_arguments, import_callable

T = TypeVar("T")

# What torch raises for an argument with a wrong value.
_REFUSALS = (TypeError, ValueError, ArithmeticError)


def build_scheduler(
    optimizer: Optimizer, section: recipes.Schedule, total: int, key: str = "schedule"
) -> LRScheduler | None:
    """The scheduler that a section of a recipe names; None for a constant lr.

    Args:
        optimizer: its lr, and what else the scheduler changes, are set to those of the first step.
        section: the recipe's `schedule`, or one of its `schedules`.
        total: the run's length in the schedule's unit, or that of the part of it that an inner
            schedule has.
        key: of the section, for messages.

    Raises:
        UserError: the scheduler cannot be imported, or refuses an argument.
    """
    if isinstance(section, schema.ConstantSchedule):
        return None
    if isinstance(section, schema.OwnSchedule):
        return _build_own(optimizer, section, total, key)
    if isinstance(section, schema.SequentialLR):
        return _build_sequential(optimizer, section, total, key)

    arguments = _complete_arguments(optimizer, section, total, key)
    cls: type[Any] = getattr(torch_schedulers, section.name)
    try:
        scheduler: LRScheduler = cls(optimizer, **arguments)
    except _REFUSALS as error:
        raise UserError(f"{key}: {section.name} refuses: {first_line(error)}") from None
    return scheduler


def segment_lengths(section: schema.SequentialLR, total: int) -> list[int]:
    """The length of each inner schedule: up to its milestone; the last has the rest of the run."""
    starts = [0, *section.milestones]
    ends = [*section.milestones, max(total, starts[-1] + 1)]
    return [end - start for start, end in zip(starts, ends, strict=True)]


def lists_by_group(section: recipes.Schedule) -> list[list[Any]]:
    """The arguments of a schedule that are lists with a value for each parameter group."""
    if isinstance(section, schema.SequentialLR):
        return [values for inner in section.schedules for values in lists_by_group(inner)]

    values = [getattr(section, key, None) for key in ("lr_lambda", "max_lr")]
    return [value for value in values if isinstance(value, list)]


# torch's


def _complete_arguments(
    optimizer: Optimizer, section: recipes.Schedule, total: int, key: str
) -> dict[str, Any]:
    """The arguments of the torch class: those of the recipe, and defaults from the run's length."""
    arguments = section.arguments
    match section:
        case schema.MultiStepLR():
            _require_increasing(section.milestones, f"{key}.milestones")
        case schema.CosineAnnealingLR():
            arguments.setdefault("T_max", total)
        case schema.LinearLR() | schema.PolynomialLR():
            arguments.setdefault("total_iters", total)
        case schema.ReduceLROnPlateau():
            is_accuracy = str(section.metric).endswith("accuracy")
            arguments.setdefault("mode", "max" if is_accuracy else "min")
        case schema.LambdaLR():
            arguments["lr_lambda"] = _parse_lambdas(optimizer, section, total, f"{key}.lr_lambda")
        case schema.OneCycleLR():
            arguments.setdefault("total_steps", total)
            if isinstance(section.max_lr, list):
                arguments["max_lr"] = _by_group(section.max_lr, optimizer, f"{key}.max_lr")
            _check_phases(section, arguments["total_steps"], key)
            if section.cycle_momentum is not False:
                _require_momentum(optimizer, key)
    return arguments


def _parse_lambdas(
    optimizer: Optimizer, section: schema.LambdaLR, total: int, key: str
) -> Callable[[int], float] | list[Callable[[int], float]]:
    """One function for all parameter groups, or a list of them."""
    if not isinstance(section.lr_lambda, list):
        text = "1" if section.lr_lambda is None else section.lr_lambda
        return parse_lambda(text, total, key)

    functions = [parse_lambda(text, total, key) for text in section.lr_lambda]
    return _by_group(functions, optimizer, key)


def _by_group(values: list[T], optimizer: Optimizer, key: str) -> list[T]:
    """A value for each parameter group of the optimizer, from those for the recipe's groups.

    A group and the one that was split from it, to have no weight decay, share a value.
    """
    groups = enumerate(optimizer.param_groups)
    names = [group.get("split_from", group.get("name", f"group{i}")) for i, group in groups]
    recipe_names = list(dict.fromkeys(names))
    if len(values) != len(recipe_names):
        raise UserError(
            f"{key}: has {len(values)} values, must have one for each parameter group: "
            f"{', '.join(recipe_names)}"
        )

    value_of = dict(zip(recipe_names, values, strict=True))
    return [value_of[name] for name in names]


def _require_increasing(milestones: list[int], key: str) -> None:
    for earlier, later in itertools.pairwise(milestones):
        if earlier >= later:
            raise UserError(f"{key}: has {later} after {earlier}, must be in increasing order")


def _check_phases(section: schema.OneCycleLR, total_steps: int, key: str) -> None:
    """Refuse phases without a length, for which torch divides by zero, often at the very end."""
    pct_start = 0.3 if section.pct_start is None else section.pct_start

    # Where each phase ends, as torch computes it.
    ends = [pct_start * total_steps - 1, float(total_steps - 1)]
    if section.three_phase:
        ends.insert(1, 2 * pct_start * total_steps - 2)
    if any(start == end for start, end in zip([0.0, *ends[:-1]], ends, strict=True)):
        raise UserError(
            f"{key}.pct_start: is {pct_start}, with which a phase of the {total_steps} positions "
            "of OneCycleLR has no length"
        )


def _require_momentum(optimizer: Optimizer, key: str) -> None:
    """Refuse to change a momentum that the optimizer does not have: torch would turn it on."""
    if "betas" in optimizer.defaults:
        return
    if not all(group.get("momentum") for group in optimizer.param_groups):
        raise UserError(
            f"{key}.cycle_momentum: OneCycleLR changes the momentum, and "
            f"{type(optimizer).__name__} has none here; set optimizer.momentum, or false here"
        )


def _build_sequential(
    optimizer: Optimizer, section: schema.SequentialLR, total: int, key: str
) -> LRScheduler:
    _require_increasing(section.milestones, f"{key}.milestones")

    schedulers: list[LRScheduler] = []
    for i, length in enumerate(segment_lengths(section, total)):
        inner = build_scheduler(optimizer, section.schedules[i], length, f"{key}.schedules.{i}")
        if inner is None:
            inner = torch_schedulers.ConstantLR(optimizer, factor=1.0)
        schedulers.append(inner)

    # It takes back what the inner schedulers have done to the lr when they were made.
    try:
        return torch_schedulers.SequentialLR(optimizer, schedulers, section.milestones)
    except _REFUSALS as error:
        raise UserError(f"{key}: SequentialLR refuses: {first_line(error)}") from None


# The user's own


def _build_own(
    optimizer: Optimizer, section: schema.OwnSchedule, total: int, key: str
) -> LRScheduler:
    name = section.name
    function = import_callable(name, f"{key}.name")
    if inspect.isclass(function) and not issubclass(function, LRScheduler):
        raise UserError(
            f"{key}.name: {name} is not a subclass of torch.optim.lr_scheduler.LRScheduler"
        )

    arguments = section.arguments
    if takes_total(function):
        arguments.setdefault("total", total)
    check_arguments(name, key, function, arguments, num_positional=1)

    scheduler = call_named(name, f"{key}.name", lambda: function(optimizer, **arguments))
    if isinstance(scheduler, torch_schedulers.ReduceLROnPlateau):
        raise UserError(f"{key}.name: {name} needs a metric; use schedule.name: ReduceLROnPlateau")
    if not isinstance(scheduler, LRScheduler):
        kind = type(scheduler).__name__
        raise UserError(f"{key}.name: {name} returns a {kind}, not torch's LRScheduler")
    if not hasattr(scheduler, "base_lrs"):
        raise UserError(f"{key}.name: {name} does not call super().__init__(optimizer)")
    return scheduler


def takes_total(function: Callable[..., Any]) -> bool:
    """Whether an own schedule has the argument `total`; the run's length is passed to it."""
    try:
        return "total" in inspect.signature(function).parameters
    except (ValueError, TypeError):  # written in C
        return False
