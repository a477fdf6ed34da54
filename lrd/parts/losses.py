"""`trainer.loss` -> the function of logits and labels that is minimized."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lrd import recipe as recipes


def build_loss(section: recipes.Trainer) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss that a recipe names: of logits, float (N, C), and labels, int64 (N,), its mean ()."""
    return partial(nn.functional.cross_entropy, label_smoothing=section.label_smoothing)
