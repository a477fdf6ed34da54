"""Recipe -> torch optimizer with its parameter groups, and learning rate dropout if asked for."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lrd import recipe as recipes
from lrd.errors import UserError, first_line
from lrd.optim.dropout import LRDropout
from lrd.optim.magma import Magma

NAMES = (
    "SGD",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "Rprop",
    "ASGD",
)

# Classes of torch.optim that cannot be used, and why.
UNSUPPORTED = {
    "LBFGS": "one step of it evaluates the loss several times along a line; the training loop "
    "takes one gradient a step, and a masked line search has no meaning",
    "SparseAdam": "it takes sparse gradients only, and every gradient of a ResNet is dense",
    "Muon": "it takes matrices only, and a ResNet's convolutions have weights of four dimensions",
}

# What torch raises for an argument with a wrong value.
_REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)


def build_optimizer(model: nn.Module, recipe: recipes.Recipe) -> Optimizer:
    """The optimizer that a recipe names, with its `lr_dropout` attached if it has this section.

    Each parameter group has a `name`. The parameters that no pattern matches come first, then the
    groups in the order of the recipe.

    Args:
        model: the network whose parameters are optimized.
        recipe: its sections `optimizer` and `lr_dropout` are used, and `seed`.

    Raises:
        UserError: if the optimizer or an argument is unknown, torch refuses a value, or a pattern
            matches no parameter.
    """
    section = recipe.optimizer
    cls = _optimizer_class(section.name)

    arguments = {
        "momentum": section.momentum,
        "nesterov": section.nesterov,
        "weight_decay": section.weight_decay,
        "betas": None if section.betas is None else tuple(section.betas),
        "eps": section.eps,
    }
    # What is not given is left to torch's default.
    arguments = {key: value for key, value in arguments.items() if value is not None}
    arguments |= section.arguments
    _check_arguments("optimizer", cls, arguments)

    groups = _build_groups(model, section, cls, arguments)
    try:
        optimizer: Optimizer = cls(groups, lr=section.lr, **arguments)
    except _REFUSALS as error:
        raise UserError(f"optimizer: {cls.__name__} refuses: {first_line(error)}") from None

    if recipe.lr_dropout is not None:
        _attach_lr_dropout(optimizer, recipe.lr_dropout, recipe.mask_seed)
    return optimizer


def _attach_lr_dropout(optimizer: Optimizer, section: recipes.LRDropout, seed: int) -> None:
    cls: type[LRDropout] = LRDropout
    if section.kind == "magma":
        _require_momentum(optimizer)
        cls = Magma

    try:
        cls(optimizer, seed=seed, **section.arguments)
    except ValueError as error:
        raise UserError(f"lr_dropout: {error}") from None


def _require_momentum(optimizer: Optimizer) -> None:
    """Refuse Magma before the run if a parameter group keeps no momentum.

    Magma itself finds out in the first step. The optimizers in `NAMES` that keep one have an
    argument `momentum`, which may be 0, or `betas`.
    """
    for group in optimizer.param_groups:
        if not group.get("momentum") and "betas" not in group:
            raise UserError(
                "lr_dropout.kind: magma needs a momentum, and "
                f"{type(optimizer).__name__} keeps none in the parameter group {group['name']}"
            )


def _optimizer_class(name: str) -> type[Any]:
    if name in UNSUPPORTED:
        raise UserError(f"optimizer.name: {name} cannot be used here: {UNSUPPORTED[name]}")
    if name not in NAMES:
        hint = _did_you_mean(name, NAMES)
        raise UserError(f"optimizer.name: is {name!r}, may be {', '.join(NAMES)}{hint}")

    cls: type[Any] = getattr(torch.optim, name)
    return cls


def _check_arguments(key: str, cls: type[Any], arguments: dict[str, Any]) -> None:
    """Refuse arguments that an optimizer does not have, with a line for each.

    Args:
        key: the section that contains them, for the message.
        cls: the optimizer.
        arguments: name -> value.
    """
    accepted = [
        name for name in inspect.signature(cls).parameters if name not in ("self", "params")
    ]
    lines = [
        f"{key}.{name}: {cls.__name__} has no such argument{_did_you_mean(name, accepted)}; "
        f"it has {', '.join(accepted)}"
        for name in arguments
        if name not in accepted
    ]
    if lines:
        raise UserError("\n".join(lines))


def _did_you_mean(name: str, known_names: Sequence[str]) -> str:
    """The known name that is closest to a wrong one, as the end of a message; else nothing."""
    by_lower_case = {known.lower(): known for known in known_names}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    return f" (did you mean {by_lower_case[matches[0]]}?)" if matches else ""


def _build_groups(
    model: nn.Module,
    section: recipes.Optimizer,
    cls: type[Any],
    arguments: dict[str, Any],
) -> list[dict[str, Any]]:
    """The parameter groups of a recipe, as torch's optimizers take them.

    A parameter belongs to the first group with a pattern that matches its name; what is left over
    is `group0`.

    Args:
        model: the network whose parameters are divided.
        section: the recipe's `optimizer`.
        cls: the optimizer.
        arguments: the optimizer's arguments for all groups.
    """
    rest: dict[str, Any] = {"name": "group0", "params": []}
    groups: list[dict[str, Any]] = []
    for i, group_section in enumerate(section.groups):
        settings = _group_settings(group_section)
        _check_group_settings(f"optimizer.groups.{i}", settings, section, cls, arguments)
        groups.append({"name": section.group_names[i], "params": [], **settings})

    for name, parameter in model.named_parameters():
        group = _find_group(name, groups, section.groups) or rest
        group["params"].append(parameter)

    for i, group_section in enumerate(section.groups):
        if not groups[i]["params"]:
            raise UserError(
                f"optimizer.groups.{i}.match: {group_section.match!r} matches no parameter that "
                "is not in an earlier group"
            )

    if rest["params"]:
        groups.insert(0, rest)
    names = [group["name"] for group in groups]
    if len(set(names)) < len(names):
        raise UserError(f"optimizer.groups: two groups have the same name: {', '.join(names)}")
    return groups


def _group_settings(section: recipes.OptimizerGroup) -> dict[str, Any]:
    """The settings that apply to one group alone."""
    settings = {
        "lr": section.lr,
        "weight_decay": section.weight_decay,
        "keep_prob": section.keep_prob,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    return given | section.arguments


def _check_group_settings(
    key: str,
    settings: dict[str, Any],
    section: recipes.Optimizer,
    cls: type[Any],
    arguments: dict[str, Any],
) -> None:
    """Let torch check the settings of one group.

    torch checks only the values that are given for all groups. Those of one group would fail at
    the first step, or never, so an optimizer is built that has them for all.
    """
    for_torch = {name: value for name, value in settings.items() if name != "keep_prob"}
    _check_arguments(key, cls, for_torch)

    parameter = nn.Parameter(torch.zeros(1))
    try:
        cls([parameter], **{"lr": section.lr, **arguments, **for_torch})
    except _REFUSALS as error:
        raise UserError(f"{key}: {cls.__name__} refuses: {first_line(error)}") from None


def _find_group(
    name: str,
    groups: list[dict[str, Any]],
    sections: list[recipes.OptimizerGroup],
) -> dict[str, Any] | None:
    """The first group with a pattern that matches a parameter's name."""
    for group, section in zip(groups, sections, strict=True):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in section.patterns):
            return group
    return None
