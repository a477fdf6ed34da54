"""Schedules of the user's own, and some with a fault each."""

from __future__ import annotations

import random
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau


class WarmupHoldDecay(LRScheduler):
    """Linear warm-up, a constant lr, then a linear decay to zero at the end of the run.

    Args:
        optimizer: the optimizer.
        total: length of the run; lrd passes it.
        warmup: part of the run with a rising lr.
        decay: part of the run with a falling lr.
    """

    def __init__(
        self, optimizer: Optimizer, total: int, warmup: float = 0.2, decay: float = 0.4
    ) -> None:
        self.total = total
        self.warmup = warmup
        self.decay = decay
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        done = self.last_epoch / self.total
        rise = (self.last_epoch + 1) / max(1.0, self.warmup * self.total)
        fall = (1.0 - done) / self.decay
        return [lr * max(0.0, min(1.0, rise, fall)) for lr in self.base_lrs]


class Halving(LRScheduler):
    """Halves the lr and the momentum of each group at every position."""

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0:
            return [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["momentum"] = group["momentum"] * 0.5
        return [group["lr"] * 0.5 for group in self.optimizer.param_groups]


def make_inverse_sqrt(optimizer: Optimizer, offset: int = 1) -> LambdaLR:
    return LambdaLR(optimizer, lambda t: (offset / (t + offset)) ** 0.5)


class NoSchedule:
    """Something else that has a step."""


class Plateau(ReduceLROnPlateau):
    """Needs a metric."""


# With a fault each


class Dice(LRScheduler):
    """Draws its lr."""

    def get_lr(self) -> list[float]:
        return [lr * random.random() for lr in self.base_lrs]


class Forgetful(LRScheduler):
    """Its state_dict has the position alone, and the lr depends on more."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.factor = 1.0
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.factor *= 0.9
        return [lr * self.factor for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs}


class Unsavable(LRScheduler):
    """Its state_dict has a function."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.shape = lambda t: 1.0 / (1 + t)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [lr * self.shape(self.last_epoch) for lr in self.base_lrs]


class Negative(LRScheduler):
    """Falls below zero."""

    def get_lr(self) -> list[float]:
        return [lr * (1 - self.last_epoch) for lr in self.base_lrs]


class Breaking(LRScheduler):
    """Raises an error at its third position."""

    def get_lr(self) -> list[float]:
        return [lr * {0: 1.0, 1: 0.5}[self.last_epoch] for lr in self.base_lrs]


class Bare(LRScheduler):
    """Forgets to call LRScheduler.__init__."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.count = 0
