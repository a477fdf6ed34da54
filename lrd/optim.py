"""torch's optimizers with learning rate dropout as drop-in classes; recipe -> optimizer with its parameter groups.

    optimizer = lrd.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, keep_prob=0.5, seed=0)

Each class is torch's own with `LRDropout` attached: its arguments are torch's and, by keyword, LRDropout's. The classes
need torch and NumPy alone.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lrd.dropout import LRDropout
from lrd.errors import UserError, first_line

if TYPE_CHECKING:
    from lrd import recipe as recipes


class _Masked:
    r"""
    .. math::
        \begin{aligned}
            &\textbf{for} \: t=0 \: \textbf{to} \: \ldots \: \textbf{do} \\
            &\hspace{5mm} \theta' \leftarrow \text{one step of {name} from } \theta, \text{ its state with it} \\
            &\hspace{5mm} m_i \leftarrow \mathbb{1}[u_i(\text{seed}, t, \text{parameter}) < \text{keep\_prob}]
                \quad \text{for each element } i \\
            &\hspace{5mm} \textbf{if} \: \text{rescale}: \quad
                \theta' \leftarrow \theta + (\theta' - \theta) / \text{keep\_prob} \\
            &\hspace{5mm} \theta_i \leftarrow \theta'_i \: \textbf{if} \: m_i = 1 \: \textbf{else} \: \theta_i
        \end{aligned}

    Args:
        params, ...: those of :class:`torch.optim.{name}`, in its order.
        keep_prob (float, optional): probability that an element moves in a step, in (0, 1]; also by parameter group
            (default: 0.5, the paper's; 1: {name} itself, bit for bit)
        seed (int, optional): of the masks, the same on every rank (default: 0)
        granularity (str, optional): what shares one draw: 'element', 'row', 'column', 'tensor' (default: 'element')
        rescale (bool, optional): divide a kept element's update by keep_prob (default: False, as in the paper)
        masks (str, optional): what is masked, see :class:`lrd.LRDropout` (default: 'update')

    Departs from the authors' code (arXiv 1912.00144): keep_prob has no default of 0, at which nothing moves;
    momentum, Nesterov and weight decay are torch's, in every combination; weight decay is not written into the
    gradient. A dropped element does not move at all, by weight decay neither, be it coupled or decoupled.
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        keep_prob: float = 0.5,
        seed: int = 0,
        granularity: str = "element",
        rescale: bool = False,
        masks: str = "update",
        **kwargs: Any,
    ) -> None:
        super().__init__(params, *args, **kwargs)  # type: ignore[call-arg]
        assert isinstance(self, Optimizer)
        LRDropout(self, keep_prob, seed, granularity, rescale, masks)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        theirs = list(inspect.signature(cls.__mro__[2]).parameters.values())
        ours = [p for p in inspect.signature(_Masked.__init__).parameters.values() if p.default is not p.empty]
        cls.__signature__ = inspect.Signature([*theirs, *ours])  # type: ignore[attr-defined]
        assert _Masked.__doc__ is not None
        cls.__doc__ = f"{cls.__doc__}\n{_Masked.__doc__.replace('{name}', cls.__name__)}"


class SGD(_Masked, torch.optim.SGD):
    """SGD with learning rate dropout. The momentum buffer goes on in dropped elements, with Nesterov too."""


class Adam(_Masked, torch.optim.Adam):
    """Adam with learning rate dropout. Both moments go on in dropped elements, AMSGrad's maximum too."""


class AdamW(_Masked, torch.optim.AdamW):
    """AdamW with learning rate dropout. Decoupled weight decay is part of the update: it spares dropped elements."""


class Adamax(_Masked, torch.optim.Adamax):
    """Adamax with learning rate dropout. Moment and infinity norm go on in dropped elements."""


class NAdam(_Masked, torch.optim.NAdam):
    """NAdam with learning rate dropout. Both moments go on in dropped elements."""


class RAdam(_Masked, torch.optim.RAdam):
    """RAdam with learning rate dropout. Both moments go on in dropped elements."""


class Adagrad(_Masked, torch.optim.Adagrad):
    """Adagrad with learning rate dropout. The sum of squares goes on in dropped elements."""


class Adadelta(_Masked, torch.optim.Adadelta):
    """Adadelta with learning rate dropout. Its average of squared updates takes in updates that were dropped."""


class RMSprop(_Masked, torch.optim.RMSprop):
    """RMSprop with learning rate dropout. Square average, momentum buffer and mean go on in dropped elements."""


class Rprop(_Masked, torch.optim.Rprop):
    """Rprop with learning rate dropout. Step sizes answer to the signs of gradients, in dropped elements too."""


class ASGD(_Masked, torch.optim.ASGD):
    """ASGD with learning rate dropout. Its average `ax` is of the iterates before dropped elements are put back."""


class SparseAdam(_Masked, torch.optim.SparseAdam):
    """SparseAdam with learning rate dropout. Rows without gradient do not move anyway; the mask is on all elements."""


class Adafactor(_Masked, torch.optim.Adafactor):
    """Adafactor with learning rate dropout. Its factored moments go on in dropped elements."""


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
        own = recipe.lr_dropout
        try:
            LRDropout(optimizer, own.keep_prob, recipe.mask_seed, own.granularity, own.rescale, own.masks)
        except ValueError as error:
            raise UserError(f"lr_dropout: {error}") from None
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
