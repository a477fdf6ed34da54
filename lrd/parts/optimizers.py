"""Recipe -> torch optimizer with its parameter groups, and learning rate dropout if asked for."""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lrd import recipe as recipes
from lrd.errors import UserError, did_you_mean, first_line
from lrd.optim.dropout import LRDropout
from lrd.optim.magma import Magma
from lrd.parts.argument_types import check_argument_types
from lrd.recipe.named import call_named, check_arguments, import_callable
from lrd.recipe.schema import is_own

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

FLOAT32_MAX = torch.finfo(torch.float32).max

# By number of dimensions: the shape of a parameter on which an optimizer is tried out.
_TINY_SHAPES: dict[int, tuple[int, ...]] = {
    0: (),
    1: (7,),
    2: (6, 5),
    3: (4, 3, 2),
    4: (4, 3, 2, 2),
}

Group = dict[str, Any]  # a parameter group, as torch's optimizers take it


def build_optimizer(model: nn.Module, recipe: recipes.Recipe) -> Optimizer:
    """The optimizer that a recipe names, with its `lr_dropout` attached if it has this section.

    Each parameter group has a `name`. The parameters that no pattern matches come first, then the
    groups in the order of the recipe. With `decay_norms_and_biases: false`, each group is followed
    by its parameters without weight decay, `<name>_no_decay`, which has the key `split_from`.

    Args:
        model: the network whose parameters are optimized.
        recipe: its sections `optimizer` and `lr_dropout` are used, and `seed`.

    Raises:
        UserError: if the optimizer or an argument is unknown, a value is refused, or a pattern
            matches no parameter.
    """
    optimizer = _make_optimizer(_build_groups(model, recipe.optimizer), recipe.optimizer)
    if recipe.lr_dropout is not None:
        _attach_lr_dropout(optimizer, recipe.lr_dropout, recipe.mask_seed)
    return optimizer


def build_tiny_optimizer(
    model: nn.Module, recipe: recipes.Recipe, *, with_lr_dropout: bool
) -> Optimizer:
    """An optimizer as `build_optimizer` makes it, but of a few small parameters, to try it out.

    Each group has a parameter of each number of dimensions that occurs in it, with the same normal
    values at every call, on the network's device; and one more where a parameter is frozen.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    groups = _build_groups(model, recipe.optimizer)
    for group in groups:
        kinds = {(parameter.ndim, parameter.requires_grad) for parameter in group["params"]}
        group["params"] = []
        for ndim, requires_grad in sorted(kinds):
            value = torch.randn(_TINY_SHAPES.get(ndim, (2,) * ndim), generator=generator)
            group["params"].append(nn.Parameter(value.to(device), requires_grad=requires_grad))

    optimizer = _make_optimizer(groups, recipe.optimizer)
    if with_lr_dropout and recipe.lr_dropout is not None:
        _attach_lr_dropout(optimizer, recipe.lr_dropout, recipe.mask_seed)
    return optimizer


# The optimizer's class and its arguments


def _make_optimizer(groups: list[Group], section: recipes.Optimizer) -> Optimizer:
    return _call("optimizer", section.name, groups, {"lr": section.lr, **_arguments(section)})


def _call(key: str, name: str, groups: list[Any], arguments: dict[str, Any]) -> Optimizer:
    """Call the optimizer's class; what it refuses becomes a line.

    Args:
        key: of the section that the arguments are from.
        name: the recipe's `optimizer.name`.
        groups: parameter groups, or parameters.
        arguments: name -> value.
    """
    function = _find_optimizer(name)
    check_arguments(name, key, function, arguments, num_positional=1)
    if not is_own(name):
        check_argument_types(key, function, arguments)
    _check_numbers(key, arguments)
    if is_own(name):
        key = "optimizer.name" if key == "optimizer" else key
        optimizer = call_named(name, key, lambda: function(groups, **arguments))
        if not isinstance(optimizer, Optimizer):
            kind = type(optimizer).__name__
            raise UserError(f"{key}: {name} returns a {kind}, not a torch.optim.Optimizer")
        if not hasattr(optimizer, "param_groups"):
            raise UserError(f"{key}: {name} does not call super().__init__(params, defaults)")
        return optimizer

    try:
        stock_optimizer: Optimizer = function(groups, **arguments)
    except _REFUSALS as error:
        raise UserError(f"{key}: {name} refuses: {first_line(error)}") from None
    return stock_optimizer


def _find_optimizer(name: str) -> Callable[..., Any]:
    """The class that a recipe names, or a function that returns an optimizer."""
    if name in UNSUPPORTED:
        raise UserError(f"optimizer.name: {name} cannot be used here: {UNSUPPORTED[name]}")
    if name in NAMES:
        stock: type[Any] = getattr(torch.optim, name)
        return stock
    if not is_own(name):
        hint = did_you_mean(name, NAMES)
        raise UserError(
            f"optimizer.name: is {name!r}, may be {', '.join(NAMES)}, or module:class{hint}"
        )

    function = import_callable(name, "optimizer.name")
    if inspect.isclass(function) and not issubclass(function, Optimizer):
        raise UserError(f"optimizer.name: {name} is not a subclass of torch.optim.Optimizer")
    for unsupported, reason in UNSUPPORTED.items():
        if function is getattr(torch.optim, unsupported):
            raise UserError(f"optimizer.name: {unsupported} cannot be used here: {reason}")
    return function


def _arguments(section: recipes.Optimizer) -> dict[str, Any]:
    """The arguments for all groups, without the lr. What is not given is left to the default."""
    arguments = {
        "momentum": section.momentum,
        "nesterov": section.nesterov,
        "weight_decay": section.weight_decay,
        "betas": None if section.betas is None else tuple(section.betas),
        "eps": section.eps,
    }
    given = {key: value for key, value in arguments.items() if value is not None}
    return given | section.arguments


def _check_numbers(key: str, arguments: dict[str, Any]) -> None:
    """Refuse numbers that are too large for float32: torch fails with them in the first step."""
    for argument, value in arguments.items():
        if not _fits_float32(value):
            raise UserError(
                f"{key}.{argument}: is {value}, but the largest number of float32 is "
                f"{FLOAT32_MAX:.1e}"
            )


def _fits_float32(value: Any) -> bool:
    """Whether a number can be used with float32 parameters; infinity can."""
    if isinstance(value, list | tuple):
        return all(_fits_float32(item) for item in value)
    if not isinstance(value, int | float):
        return True
    return abs(value) <= FLOAT32_MAX or abs(value) == math.inf


# Learning rate dropout


def _attach_lr_dropout(optimizer: Optimizer, section: recipes.LRDropout, seed: int) -> None:
    cls: type[LRDropout] = LRDropout
    if section.kind == "magma":
        _require_momentum(optimizer)
        cls = Magma

    try:
        cls(optimizer, seed=seed, **section.arguments)
    except (ValueError, TypeError) as error:
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


# Parameter groups


def _build_groups(model: nn.Module, section: recipes.Optimizer) -> list[Group]:
    """The parameter groups of a recipe, as torch's optimizers take them.

    A parameter belongs to the first group with a pattern that matches its name; what is left over
    is `group0`.

    Args:
        model: the network whose parameters are divided.
        section: the recipe's `optimizer`.
    """
    stock_weight_decay = _try_settings("optimizer", section, {}).get("weight_decay")

    rest: Group = {"name": "group0", "params": []}
    groups: list[Group] = []
    for i, group_section in enumerate(section.groups):
        settings = _group_settings(group_section)
        # torch checks only the values that are given for all groups. Those of one group would fail
        # at the first step, or never, so an optimizer is built that has them for all.
        _try_settings(f"optimizer.groups.{i}", section, settings)
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
    if not section.decay_norms_and_biases:
        groups = _split_weight_decay(groups, section, stock_weight_decay)

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


def _try_settings(key: str, section: recipes.Optimizer, settings: dict[str, Any]) -> Group:
    """Let the optimizer's class check settings, by an optimizer of one parameter.

    Args:
        key: of the section that the settings are from.
        section: the recipe's `optimizer`.
        settings: of one group, in place of those for all.

    Returns:
        The parameter group that it makes of them.
    """
    for_torch = {name: value for name, value in settings.items() if name != "keep_prob"}
    tiny_group = {"params": [nn.Parameter(torch.zeros(2, 2))]}
    arguments = {"lr": section.lr, **_arguments(section), **for_torch}
    group: Group = _call(key, section.name, [tiny_group], arguments).param_groups[0]
    return group


def _find_group(
    name: str, groups: list[Group], sections: list[recipes.OptimizerGroup]
) -> Group | None:
    """The first group with a pattern that matches a parameter's name."""
    for group, section in zip(groups, sections, strict=True):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in section.patterns):
            return group
    return None


def _split_weight_decay(
    groups: list[Group], section: recipes.Optimizer, stock_weight_decay: float | None
) -> list[Group]:
    """Take the weight decay from parameters with fewer than two dimensions.

    A group without weight decay, or with one of its own, stays as it is.

    Args:
        groups: with their parameters. A shard has as many dimensions as the whole parameter.
        section: the recipe's `optimizer`.
        stock_weight_decay: that of a group which has none of its own; None: the optimizer has none.
    """
    if stock_weight_decay is None:
        raise UserError(
            f"optimizer.decay_norms_and_biases: is false, but {section.name} has no weight_decay"
        )

    split_groups = []
    for group in groups:
        if "weight_decay" in group or stock_weight_decay == 0.0:
            split_groups.append(group)
            continue

        decayed = [parameter for parameter in group["params"] if parameter.ndim >= 2]
        others = [parameter for parameter in group["params"] if parameter.ndim < 2]
        if decayed:
            split_groups.append({**group, "params": decayed})
        if others:
            without_decay = {
                "name": f"{group['name']}_no_decay",
                "split_from": group["name"],
                "params": others,
                "weight_decay": 0.0,
            }
            split_groups.append({**group, **without_decay})
    return split_groups
