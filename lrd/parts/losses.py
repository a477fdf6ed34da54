"""`trainer.loss` -> the function of logits and labels that is minimized."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrd import console
from lrd import recipe as recipes
from lrd.errors import UserError, first_line
from lrd.recipe.named import call_named, import_callable
from lrd.recipe.schema import is_own

# Of logits, float (N, C), and labels, int64 (N,): the mean over the batch, float (). If the samples
# are mixed, the labels are the probabilities of the classes, float (N, C).
LossFunction = Callable[[Tensor, Tensor], Tensor]

_KEY = "trainer.loss"
_CHECKED_SAMPLES = 8


def build_loss(section: recipes.Trainer, device: torch.device | None = None) -> LossFunction:
    """The loss that a recipe names.

    Args:
        section: the recipe's `trainer`.
        device: where an own `nn.Module` has its buffers, such as weights of the classes.

    Raises:
        UserError: it cannot be imported, or has parameters of its own.
    """
    if not is_own(section.loss):
        return partial(nn.functional.cross_entropy, label_smoothing=section.label_smoothing)

    name = section.loss
    function: Any = import_callable(name, _KEY)
    if inspect.isclass(function):
        if not issubclass(function, nn.Module):
            raise UserError(f"{_KEY}: {name} is a class, but not a torch.nn.Module")
        _refuse_arguments(name, function)
        function = call_named(name, _KEY, function)
    if isinstance(function, nn.Module):
        _refuse_parameters(name, function)
        function = function.to(device)

    loss_function: LossFunction = function
    return loss_function


def _refuse_arguments(name: str, cls: type[nn.Module]) -> None:
    """Refuse a class that cannot be made without arguments: no key of a recipe gives it any."""
    try:
        inspect.signature(cls).bind()
    except TypeError as error:
        raise UserError(
            f"{_KEY}: {name} is made without arguments: {first_line(error)}; give it a default, "
            "or name a function that returns the loss's value"
        ) from None
    except ValueError:  # written in C, without a signature
        return


def _refuse_parameters(name: str, module: nn.Module) -> None:
    for parameter, _ in module.named_parameters():
        raise UserError(
            f"{_KEY}: {name} has a parameter, {parameter}, which would be neither trained nor "
            "saved; make it part of the network, or a buffer"
        )


def check_loss(
    section: recipes.Trainer,
    loss_function: LossFunction,
    num_classes: int,
    device: torch.device | None = None,
    data: recipes.Data | None = None,
) -> None:
    """Try a loss of the user's own on a few logits, with labels of the kind that training has.

    If it is no mean over the batch, a line says so: the ranks' gradients are averaged, so that it
    would be another loss on another number of ranks.

    Args:
        section: the recipe's `trainer`.
        loss_function: as `build_loss` has made it.
        num_classes: size of the network's output.
        device: of the logits.
        data: the recipe's `data`, which says whether samples are mixed; None: they are not.

    Raises:
        UserError: it fails, is not a finite number, has no gradient in the logits, or two calls
            differ.
    """
    if not is_own(section.loss):
        return

    mixing_keys = [] if data is None else _mixing_keys(data)
    try:
        _try_loss(section, loss_function, num_classes, device, mixes=bool(mixing_keys))
    except UserError as error:
        if not mixing_keys:
            raise
        raise UserError(
            f"{error}; with {' and '.join(mixing_keys)} it gets labels as probabilities of the "
            "classes, float (N, C)"
        ) from None


def _mixing_keys(data: recipes.Data) -> list[str]:
    """The keys of a recipe that turn labels into probabilities."""
    return [f"data.{key}" for key in ("mixup", "cutmix") if getattr(data, key)]


def _try_loss(
    section: recipes.Trainer,
    loss_function: LossFunction,
    num_classes: int,
    device: torch.device | None,
    mixes: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(_CHECKED_SAMPLES, num_classes, generator=generator).to(device)  # (N, C)
    labels = torch.randint(num_classes, (_CHECKED_SAMPLES,), generator=generator).to(device)  # (N,)
    logits.requires_grad_()
    if mixes:
        one_hot = nn.functional.one_hot(labels, num_classes).float()  # (N, C)
        labels = torch.lerp(one_hot, one_hot.roll(1, 0), 0.25)  # (N, C)

    def call(logits: Tensor, labels: Tensor) -> Any:
        return call_named(section.loss, _KEY, lambda: loss_function(logits, labels))

    loss = call(logits, labels)
    gradient = _check_value(section.loss, loss, logits)

    again = call(logits, labels)
    gradient_again = _check_value(section.loss, again, logits)
    if not (torch.equal(loss, again) and torch.equal(gradient, gradient_again)):
        raise UserError(f"{_KEY}: {section.loss}: two calls with the same batch differ")

    # Both halves of this batch are the same, so that the mean of each is the mean of both.
    twice = call(torch.cat([logits, logits]), torch.cat([labels, labels]))
    if not torch.allclose(twice, loss, rtol=1e-3):
        console.info(
            f"{_KEY}: {section.loss} is not a mean over the batch ({loss.item():.4g}, and "
            f"{twice.item():.4g} for a batch of the same images twice): the gradient depends on "
            "the number of ranks and of accumulation steps"
        )


def _check_value(name: str, loss: Any, logits: Tensor) -> Tensor:
    """Refuse what is not a finite scalar with a gradient; return the gradient, of `logits`' shape.

    Raises:
        UserError: the line says what it is.
    """
    if not isinstance(loss, Tensor) or loss.shape != ():
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise UserError(
            f"{_KEY}: {name} returns a {type(loss).__name__}{shape}, not a tensor of shape (); "
            "take the mean over the batch"
        )
    if not loss.isfinite():
        raise UserError(f"{_KEY}: {name} is {loss.item()} for logits near 0")
    if not loss.requires_grad:
        raise UserError(f"{_KEY}: {name} has no gradient: it does not depend on the logits")

    gradients = call_named(name, _KEY, lambda: torch.autograd.grad(loss, logits, allow_unused=True))
    gradient: Tensor | None = gradients[0]
    if gradient is None or not gradient.any():
        raise UserError(f"{_KEY}: {name} has no gradient: it does not depend on the logits")
    if not gradient.isfinite().all():
        raise UserError(f"{_KEY}: the gradient of {name} is not finite for logits near 0")
    return gradient
