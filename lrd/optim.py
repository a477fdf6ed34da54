"""Recipe -> torch optimizer with its parameter groups."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lrd import recipe as recipes
from lrd.dropout import LRDropout
from lrd.errors import UserError, first_line

NAMES = (
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD",
)  # fmt: skip
REFUSED = {
    "LBFGS": "one step of it evaluates the loss several times along a line; the training loop takes one gradient a "
    "step, and a masked line search has no meaning",
    "SparseAdam": "it takes sparse gradients only, and every gradient of a ResNet is dense",
}


_REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)


def build_optimizer(model: nn.Module, recipe: recipes.Recipe) -> Optimizer:
    """The optimizer a recipe names, its parameter groups, and LRDropout attached where the recipe has `lr_dropout`.

    Each group carries a `name`. Groups come in the order of the recipe, the parameters that no pattern matches first.

    Raises:
        UserError: an unknown optimizer or argument, a value torch refuses, a pattern that matches no parameter.
    """
    section = recipe.optimizer
    cls = _optimizer_class(section.name)
    arguments = {key: value for key in ("momentum", "nesterov", "weight_decay", "betas", "eps")
                 if (value := getattr(section, key)) is not None}  # fmt: skip
    arguments.update(section.arguments)
    _check_arguments("optimizer", cls, arguments)
    try:
        optimizer: Optimizer = cls(_groups(model, section, cls, arguments), lr=section.lr, **arguments)
    except _REFUSALS as error:
        raise UserError(f"optimizer: {cls.__name__} refuses: {first_line(error)}") from None
    if recipe.lr_dropout is not None:
        LRDropout(
            optimizer,
            keep_prob=recipe.lr_dropout.keep_prob,
            seed=recipe.mask_seed,
            granularity=recipe.lr_dropout.granularity,
            rescale=recipe.lr_dropout.rescale,
        )
    return optimizer


def _optimizer_class(name: str) -> type[Any]:
    if name in REFUSED:
        raise UserError(f"optimizer.name: {name} cannot serve here: {REFUSED[name]}")
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"optimizer.name: is {name!r}, may be {', '.join(NAMES)}{hint}")
    cls: type[Any] = getattr(torch.optim, name)
    return cls


def _check_arguments(key: str, cls: type[Any], arguments: dict[str, Any]) -> None:
    accepted = [name for name in inspect.signature(cls).parameters if name not in ("self", "params")]
    unknown = [name for name in arguments if name not in accepted]
    if unknown:
        raise UserError(
            "\n".join(
                f"{key}.{name}: {cls.__name__} has no such argument; it has {', '.join(accepted)}" for name in unknown
            )
        )


def _groups(
    model: nn.Module, section: recipes.Optimizer, cls: type[Any], arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    """Parameter groups: each parameter in the first group one of whose patterns matches its name, else in the rest."""
    rest: dict[str, Any] = {"name": "group0", "params": []}
    groups: list[dict[str, Any]] = []
    for i, group in enumerate(section.groups):
        own = {key: value for key in ("lr", "weight_decay", "keep_prob") if (value := getattr(group, key)) is not None}
        own.update(group.arguments)
        theirs = {key: value for key, value in own.items() if key != "keep_prob"}
        _check_arguments(f"optimizer.groups.{i}", cls, theirs)
        try:  # torch checks the defaults only
            cls([nn.Parameter(torch.zeros(1))], **{"lr": section.lr, **arguments, **theirs})
        except _REFUSALS as error:
            raise UserError(f"optimizer.groups.{i}: {cls.__name__} refuses: {first_line(error)}") from None
        groups.append({"name": group.name or f"group{i + 1}", "params": [], **own})
    for name, parameter in model.named_parameters():
        matching = (
            own
            for own, group in zip(groups, section.groups, strict=True)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in group.patterns)
        )
        next(matching, rest)["params"].append(parameter)
    for i, group in enumerate(section.groups):
        if not groups[i]["params"]:
            raise UserError(f"optimizer.groups.{i}.match: {group.match!r} matches no parameter that is not taken yet")
    everything = [rest, *groups] if rest["params"] else groups
    names = [group["name"] for group in everything]
    if len(set(names)) < len(names):
        raise UserError(f"optimizer.groups: two groups of one name in {', '.join(names)}")
    return everything
