"""A small network, its data, and a plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.clients.reference import values

N_FEATURES = 12
N_CLASSES = 4
BATCH_SIZE = 8


def make_model() -> nn.Sequential:
    """A network of 344 elements, always with the same weights."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(N_FEATURES, 20), nn.ReLU(), nn.Linear(20, N_CLASSES))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step.

    Returns:
        Features, float32 (BATCH_SIZE, N_FEATURES), and labels, int64 (BATCH_SIZE,).
    """
    generator = torch.Generator().manual_seed(100 + step)
    features = torch.randn(BATCH_SIZE, N_FEATURES, generator=generator)
    labels = torch.randint(0, N_CLASSES, (BATCH_SIZE,), generator=generator)
    return features, labels


def loss_of(model: nn.Module, step: int) -> Tensor:
    features, labels = make_batch(step)
    return nn.functional.cross_entropy(model(features), labels)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    steps: Iterable[int],
    take_step: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Train a model in a plain loop.

    Args:
        model: the model.
        optimizer: steps after each backward pass.
        steps: numbers of the batches.
        take_step: takes the step of a number instead of ``optimizer.step()``.

    Returns:
        Copies of the parameters' values after the last step.
    """
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if take_step is None:
            optimizer.step()
        else:
            take_step(step)

    return values(list(model.parameters()))
