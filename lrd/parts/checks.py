"""Checks of optimizers and schedules before training: a fault is a line, and not a wrong resume.

Own optimizers and schedules are tried out on a tiny optimizer with the recipe's settings and
groups. This takes a fraction of a second.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd import console
from lrd import recipe as recipes
from lrd.errors import UserError, first_line
from lrd.optim import tensor_bits
from lrd.optim.dropout import LRDropout, get_lr_dropout
from lrd.parts.optimizers import build_tiny_optimizer
from lrd.parts.schedules import Schedule, check_length, run_length, total_steps
from lrd.recipe.named import call_named, named_parts
from lrd.recipe.schema import is_own

# Steps before the state is saved, and after it is loaded. Some optimizers do something else in
# every fifth or sixth step.
_STEPS_BEFORE = 4
_STEPS_AFTER = 4

# With these, `lr_dropout.masks`, the elements of the parameters are not masked.
_CONTROLS = ("gradient", "momentum_buffer")

_MAX_POSITIONS = 5_000  # of any schedule: 5,000 expressions take 0.15 s
_MAX_OWN_POSITIONS = 500  # of an own one, which is run several times


# Optimizers


def check_optimizer(model: nn.Module, recipe: recipes.Recipe) -> None:
    """Try an optimizer of the user's own on a few small parameters.

    Args:
        model: the network; it is left as it is.
        recipe: its `optimizer` and `lr_dropout` are used.

    Raises:
        UserError: learning rate dropout cannot attach to it or does not hold dropped elements, a
            step fails or moves nothing, the lr of the parameter groups has no effect, two runs
            differ, or a run that goes on from a saved state does.
    """
    if not is_own(recipe.optimizer.name):
        return

    # An optimizer that draws random numbers is refused, but it has drawn them by then.
    rng_state = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_lr(model, recipe)
            _check_steps(model, recipe)
            _check_resume(model, recipe)
    finally:
        torch.set_rng_state(rng_state)


def _check_lr(model: nn.Module, recipe: recipes.Recipe) -> None:
    """The optimizer moves the network's weights, by the lr that stands in its parameter groups."""
    optimizer = build_tiny_optimizer(model, recipe, with_lr_dropout=False)
    if callable(getattr(optimizer, "eval", None)):  # schedule-free optimizers
        raise _fault(
            recipe, "it has other weights for evaluations, eval(), which are not used here"
        )
    if not all("lr" in group for group in optimizer.param_groups):
        raise _fault(recipe, "its parameter groups have no lr, which a schedule would change")
    if all(float(group["lr"]) == 0.0 for group in optimizer.param_groups):
        return

    start = _values(optimizer)
    _take_steps(optimizer, recipe, range(_STEPS_BEFORE + _STEPS_AFTER))
    if _are_equal(_values(optimizer), start):
        raise _fault(recipe, f"{_STEPS_BEFORE + _STEPS_AFTER} steps of it move no parameter")

    other = build_tiny_optimizer(model, recipe, with_lr_dropout=False)
    for group in other.param_groups:
        group["lr"] = group["lr"] * 0.5
    _take_steps(other, recipe, range(_STEPS_BEFORE + _STEPS_AFTER))
    if _are_equal(_values(other), _values(optimizer)):
        raise _fault(
            recipe, "the lr of its parameter groups has no effect, so that no schedule would have"
        )


def _check_steps(model: nn.Module, recipe: recipes.Recipe) -> None:
    """Two runs are equal, dropped elements do not move, and all state belongs to a parameter."""
    optimizer = build_tiny_optimizer(model, recipe, with_lr_dropout=True)
    dropout = get_lr_dropout(optimizer)
    before = _values(optimizer)
    _take_steps(optimizer, recipe, range(1))
    is_control = recipe.lr_dropout is not None and recipe.lr_dropout.masks in _CONTROLS
    if dropout is not None and not is_control:
        _check_dropped(optimizer, dropout, before, recipe)

    again = build_tiny_optimizer(model, recipe, with_lr_dropout=True)
    _take_steps(optimizer, recipe, range(1, _STEPS_BEFORE))
    _take_steps(again, recipe, range(_STEPS_BEFORE))
    if not _are_equal(_values(again), _values(optimizer)):
        raise _fault(recipe, "two runs of it with the same gradients differ")

    for owner, state in optimizer.state.items():
        if not isinstance(owner, Tensor) or not isinstance(state, dict):
            raise _fault(
                recipe,
                f"its state has {owner!r}, which belongs to no parameter; "
                "keep it in the parameter groups",
            )


def _check_dropped(
    optimizer: Optimizer, dropout: LRDropout, before: list[Tensor], recipe: recipes.Recipe
) -> None:
    """Refuse an optimizer whose latest step has moved an element that was dropped.

    Args:
        before: the values before the step.
    """
    for index, (old, new) in enumerate(zip(before, _values(optimizer), strict=True)):
        has_moved = tensor_bits.as_integers(old) != tensor_bits.as_integers(new)
        for element in has_moved.flatten().nonzero().flatten().tolist():
            if not dropout.keeps(index, element):
                raise _fault(
                    recipe, "learning rate dropout does not reach it: a dropped element has moved"
                )


def _check_resume(model: nn.Module, recipe: recipes.Recipe) -> None:
    """A state_dict that has been in a file continues the run bit for bit."""
    first = build_tiny_optimizer(model, recipe, with_lr_dropout=True)
    _take_steps(first, recipe, range(_STEPS_BEFORE))
    saved = _through_a_file(first.state_dict(), "optimizer.name", recipe.optimizer.name)

    resumed = build_tiny_optimizer(model, recipe, with_lr_dropout=True)
    with torch.no_grad():
        for parameter, value in zip(_params(resumed), _values(first), strict=True):
            parameter.copy_(value)
    call_named(
        f"{recipe.optimizer.name}: load_state_dict of its own state_dict",
        "optimizer.name",
        lambda: resumed.load_state_dict(saved),
    )

    rest = range(_STEPS_BEFORE, _STEPS_BEFORE + _STEPS_AFTER)
    _take_steps(first, recipe, rest)
    _take_steps(resumed, recipe, rest)
    if not _are_equal(_values(resumed), _values(first)):
        raise _fault(
            recipe,
            "its state_dict does not hold all of its state: after loading it the next steps differ",
        )


def _fault(recipe: recipes.Recipe, what: str) -> UserError:
    return UserError(f"optimizer.name: {recipe.optimizer.name}: {what}")


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _values(optimizer: Optimizer) -> list[Tensor]:
    """Copies of the parameters' values."""
    return [parameter.detach().clone() for parameter in _params(optimizer)]


def _take_steps(optimizer: Optimizer, recipe: recipes.Recipe, steps: range) -> None:
    """Take steps with normal gradients, the same ones for the same step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in _params(optimizer):
            if parameter.requires_grad:
                grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad = grad.to(parameter.device)
        # Accelerate passes a closure, as torch's optimizers take it.
        name = f"{recipe.optimizer.name}: its step(closure)"
        call_named(name, "optimizer.name", lambda: optimizer.step(None))
        optimizer.zero_grad()


# Schedules


def check_schedule(model: nn.Module, recipe: recipes.Recipe, steps_per_epoch: int) -> None:
    """Run a recipe's schedule without training, and report what is wrong with it.

    Milestones beyond the end of the run get a line each. A long run is followed for its first 5,000
    steps or epochs; an lr that cannot be used would stop it later.

    Args:
        model: the network; it is left as it is.
        recipe: its `optimizer`, `schedule` and `trainer` are used.
        steps_per_epoch: optimizer steps of one epoch.

    Raises:
        UserError: an lr is negative or too large for float32, the schedule ends before the run, or
            one of the user's own is not exactly repeatable and resumable.
    """
    for line in check_length(recipe, steps_per_epoch):
        console.info(line)

    steps = total_steps(recipe, steps_per_epoch)
    length = run_length(recipe.schedule, steps, steps_per_epoch)
    keys = [key for key in named_parts(recipe) if key.startswith("schedule")]
    with warnings.catch_warnings():
        # torch warns about scheduler steps without optimizer steps.
        warnings.simplefilter("ignore")
        schedule = _build_schedule(model, recipe, steps_per_epoch)
        for _ in range(min(length, _MAX_POSITIONS)):
            schedule.advance()
        if keys:
            length = min(length, _MAX_OWN_POSITIONS)
            _check_own_schedule(model, recipe, steps_per_epoch, length, ", ".join(keys))


def _check_own_schedule(
    model: nn.Module, recipe: recipes.Recipe, steps_per_epoch: int, length: int, key: str
) -> None:
    """Two runs are equal, and so is one that goes on from a saved state in the middle."""
    first = _build_schedule(model, recipe, steps_per_epoch)
    trajectory = _advance(first, length)

    again = _build_schedule(model, recipe, steps_per_epoch)
    half = length // 2
    if _advance(again, half) != trajectory[:half]:
        raise UserError(f"{key}: {recipe.schedule.name}: two runs of it differ")
    saved = _through_a_file(
        {"optimizer": again.optimizer.state_dict(), "schedule": again.state_dict()},
        key,
        recipe.schedule.name,
    )
    rest = _advance(again, length - half)
    if rest != trajectory[half:]:
        raise UserError(f"{key}: {recipe.schedule.name}: two runs of it differ")

    resumed = _build_schedule(model, recipe, steps_per_epoch)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    call_named(
        f"{recipe.schedule.name}: load_state_dict of its own state_dict",
        key,
        lambda: resumed.load_state_dict(saved["schedule"]),
    )
    if _advance(resumed, length - half) != rest:
        raise UserError(
            f"{key}: {recipe.schedule.name}: its state_dict does not hold all of its state: after "
            "loading it the next lrs or other settings differ"
        )


def _build_schedule(model: nn.Module, recipe: recipes.Recipe, steps_per_epoch: int) -> Schedule:
    return Schedule(
        build_tiny_optimizer(model, recipe, with_lr_dropout=False),
        recipe.schedule,
        steps_of_all_epochs=recipe.trainer.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )


def _advance(schedule: Schedule, count: int) -> list[list[dict[str, Any]]]:
    """Advance by so many positions, and return the settings of all groups at each of them."""
    trajectory = []
    for _ in range(count):
        trajectory.append(
            [
                {
                    key: value.clone() if isinstance(value, Tensor) else value
                    for key, value in group.items()
                    if key != "params"
                }
                for group in schedule.optimizer.param_groups
            ]
        )
        schedule.advance()
    return trajectory


# State


def _through_a_file(state: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """A state_dict as a checkpoint gives it back.

    Args:
        state: the state_dict.
        key: the key of the recipe that names the part, for messages.
        name: the part's name.

    Raises:
        UserError: it contains something that cannot be saved, or that is not loaded because loading
            it could run code; the line says where.
    """
    try:
        loaded: dict[str, Any] = _save_and_load(state)
    except Exception as error:  # of pickle, torch, or the user's class
        where = _find_unloadable(state) or first_line(error)
        raise UserError(
            f"{key}: {name}: a checkpoint cannot hold its state_dict: {where}; "
            "it must contain only tensors, numbers, text, lists and dicts"
        ) from None
    return loaded


def _save_and_load(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _find_unloadable(value: Any, path: str = "") -> str | None:
    """The first entry of a nested state that cannot be saved and loaded, with its type."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))

    for key, item in items:
        found = _find_unloadable(item, f"{path}.{key}" if path else str(key))
        if found is not None:
            return found

    try:
        _save_and_load(value)
    except Exception:  # of pickle, torch, or the user's class
        return f"{path or 'it'} is a {type(value).__name__}"
    return None


def _are_equal(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """Whether the tensors are the same bit for bit."""
    return all(
        torch.equal(tensor_bits.as_integers(tensor), tensor_bits.as_integers(other))
        for tensor, other in zip(tensors, others, strict=True)
    )
