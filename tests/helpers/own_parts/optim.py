"""Optimizers of the user's own: Lion, a function that makes one, and some with a fault each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import SGD, Optimizer


class Lion(Optimizer):
    """The sign of an interpolation between gradient and momentum (Chen et al., arXiv 2302.06675).

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: of the interpolation, and of the momentum.
        weight_decay: decoupled from the gradient, times the lr.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not 0.0 <= betas[0] < 1.0:
            raise ValueError(f"betas must be in [0, 1), not {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))

                update = torch.lerp(param.grad, momentum, beta1).sign()
                param.mul_(1.0 - group["lr"] * group["weight_decay"])
                param.sub_(group["lr"] * update)
                momentum.lerp_(param.grad, 1.0 - beta2)


def make_sgd(params: Iterable[Any], lr: float, **arguments: Any) -> Optimizer:
    return SGD(params, lr=lr, **arguments)


def make_nothing(params: Iterable[Any], lr: float) -> None:
    """Returns no optimizer."""


class NoOptimizer:
    """Something else that has a step."""

    def step(self) -> None:
        """Do nothing."""


# With a fault each


class ForgetfulSGD(SGD):
    """Counts its steps where no state_dict has them, and slows down by the count."""

    count = 0

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad /= 1 + self.count
        super().step()
        self.count += 1


class RandomSGD(SGD):
    """Adds noise from torch's global generator to the gradients."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad += torch.randn_like(param)
        super().step()


class FixedSGD(SGD):
    """Keeps the lr that it was made with."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.first_lr = lr

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr"] = self.first_lr
        super().step()


class Bookkeeper:
    """Something that no checkpoint holds."""


class UnsavableSGD(SGD):
    """Has an object of its own class in its state."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for param in self.param_groups[0]["params"]:
            self.state[param]["bookkeeper"] = Bookkeeper()


class CountingSGD(SGD):
    """Has state that belongs to no parameter."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.state["count"] = {"steps": 1}


class LazySGD(SGD):
    """Moves nothing."""

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class ClosureSGD(SGD):
    """Needs a closure, as SAM does."""

    def step(self, closure: Any) -> None:
        closure()
        super().step()


class CarelessSGD(SGD):
    """Takes it for granted that each parameter has a gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)


class LateSGD(SGD):
    """Moves the parameters once more after its step, where no hook sees it."""

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"])
        super().zero_grad(set_to_none)


class AveragingSGD(SGD):
    """Wants to be told when the network is evaluated, as schedule-free optimizers do."""

    def eval(self) -> None:
        """Put the average in the place of the parameters."""


class WrappedSGD(Optimizer):
    """A wrapper that does not call Optimizer.__init__, so that it runs no hooks."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        self.inner = SGD(params, lr=lr)
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class BareSGD(Optimizer):
    """Forgets to call Optimizer.__init__."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        self.lr = lr
