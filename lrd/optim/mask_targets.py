"""What can be masked: the update (learning rate dropout), or a control to compare it with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim import Optimizer

from lrd.errors import stacklevel_of_user

MASK_TARGETS = ("update", "gradient", "momentum_buffer")

MOMENTUM_BUFFER_WARNING = (
    "masks='momentum_buffer' is the fault of the first public implementation of LRD and is kept "
    "for comparisons only: it masks the momentum buffer itself, which therefore forgets its "
    "history (constant gradient, momentum 0.9, keep_prob 0.5: mean step 0.91 where LRD has 5.0 "
    "and SGD 10)"
)


def warn_of_momentum_buffer() -> None:
    """Warn that ``masks='momentum_buffer'`` is a known fault."""
    warnings.warn(MOMENTUM_BUFFER_WARNING, stacklevel=stacklevel_of_user())


def check_target(optimizer: Optimizer, group: dict[str, Any], masks: str) -> None:
    """Check that a parameter group can take such masks.

    Raises:
        ValueError: it cannot.
    """
    if masks not in MASK_TARGETS:
        raise ValueError(f"masks must be one of {', '.join(MASK_TARGETS)}, not {masks!r}")

    if masks == "momentum_buffer":
        is_sgd = isinstance(optimizer, torch.optim.SGD)
        if not is_sgd or not group["momentum"] or group["nesterov"]:
            raise ValueError(
                f"{MOMENTUM_BUFFER_WARNING}; "
                "it needs torch.optim.SGD with momentum and without Nesterov"
            )
