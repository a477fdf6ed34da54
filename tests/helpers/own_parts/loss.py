"""Losses of the user's own, and some with a fault each."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with less weight on easy images (Lin et al., arXiv 1708.02002).

    Args:
        logits: float (N, C).
        labels: int64 (N,).
    """
    log_probs = -nn.functional.cross_entropy(logits, labels, reduction="none")  # (N,)
    return -((1.0 - log_probs.exp()) ** 2 * log_probs).mean()


class WeightedLoss(nn.Module):
    """Cross-entropy in which each class has its own weight, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 1.5, 10))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return (self.weight[labels] * losses).mean()


ready_made_loss = nn.CrossEntropyLoss()


def sum_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """No mean over the batch."""
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def soft_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of probabilities, float (N, C); it takes no classes, int64 (N,)."""
    return -(labels * logits.log_softmax(1)).sum(1).mean()


# With a fault each


class LearnedTemperature(nn.Module):
    """Has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits / self.temperature, labels)


class NeedsArgument(nn.Module):
    """Cannot be made without arguments."""

    def __init__(self, weight: float) -> None:
        super().__init__()


class NotAModule:
    """A class that is no module."""


def per_sample(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def number(logits: Tensor, labels: Tensor) -> float:
    return nn.functional.cross_entropy(logits, labels).item()


def detached(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.detach(), labels)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """A constant times the logits: it has a gradient, of zeros."""
    is_wrong = (logits.argmax(1) != labels).float()
    return is_wrong.mean() + 0.0 * logits.sum()


def infinite(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.sum() / 0.0


def noisy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits + torch.randn_like(logits), labels)


def breaking(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels[:-1])


def one_argument(logits: Tensor) -> Tensor:
    return logits.mean()
