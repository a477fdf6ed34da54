"""Networks, good and bad, as users of lrd write them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """A good one: a convolution with batch normalization, dropout, and a linear layer."""

    def __init__(self, num_classes: int, channels: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, num_classes)
        logits: Tensor = self.fc(self.dropout(self.features(images).flatten(1)))
        return logits


def build_with_all_generators(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Draws weights from the global generators of torch, NumPy and Python."""
    model = SmallNet(num_classes, dropout=dropout)
    with torch.no_grad():
        model.fc.weight[0, 0] = np.random.rand()
        model.fc.weight[0, 1] = random.random()
    return model


def pass_on(num_classes: int, **arguments: Any) -> nn.Module:
    return SmallNet(num_classes, **arguments)


def no_module(num_classes: int) -> str:
    return "a network"


def raises(num_classes: int) -> nn.Module:
    raise ValueError(f"{num_classes} classes are too many\nand this is a second line")


def without_num_classes(channels: int) -> nn.Module:
    return SmallNet(10, channels)


_generator = torch.Generator().manual_seed(0)


def running_generator(num_classes: int) -> nn.Module:
    """Draws from a generator of its own, which goes on from call to call."""
    model = SmallNet(num_classes)
    nn.init.normal_(model.fc.weight, generator=_generator)
    return model


_calls: list[int] = []


def other_layers(num_classes: int) -> nn.Module:
    """Has one layer more at each call."""
    _calls.append(0)
    return nn.Sequential(nn.Flatten(), *(nn.Linear(192, 192) for _ in _calls))


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def frozen(num_classes: int) -> nn.Module:
    return SmallNet(num_classes).requires_grad_(False)


def wrong_size(num_classes: int) -> nn.Module:
    return SmallNet(num_classes // 2)


class Tuple(SmallNet):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images), images


class TupleInTraining(SmallNet):
    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class Unused(SmallNet):
    """Has a layer that its forward pass does not use."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.aux = nn.Linear(3, 3)


class Integers(SmallNet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).long()


class Counting(SmallNet):
    """Replaces and changes its buffers in each forward pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("changed", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.replaced = self.replaced + 1
        self.changed += 1
        return super().forward(images)


def needs_depth(num_classes: int, depth: int) -> nn.Module:
    return SmallNet(num_classes, channels=depth)


class _NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("no way back")


class FailsInBackward(SmallNet):
    def forward(self, images: Tensor) -> Any:
        return _NoWayBack.apply(super().forward(images))


class RandomInEval(SmallNet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.rand(1)
