"""What a mask can be laid on: the update, which is learning rate dropout, and two controls to compare it with."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch.optim import Optimizer

MASKS = ("update", "gradient", "momentum_buffer")
FORGETS = (
    "masks='momentum_buffer' is the fault of the first public implementation of LRD, kept for comparisons: it masks "
    "the momentum buffer itself, which so forgets its history (constant gradient, momentum 0.9, keep_prob 0.5: mean "
    "step 0.91 where LRD has 5.0 and SGD 10)"
)
_LBFGS = (
    "LBFGS cannot take learning rate dropout: its step evaluates the loss several times along a line and keeps "
    "differences of iterates, and neither has a meaning when elements are put back afterwards"
)


def check(optimizer: Optimizer, masks: str) -> None:
    """Raise ValueError where an optimizer cannot take such masks; warn of the one that is a fault."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(_LBFGS)
    for group in optimizer.param_groups:
        check_group(optimizer, group, masks)
    if masks == "momentum_buffer":
        frame, level = sys._getframe(), 1  # up to the line outside of lrd that asked for it
        while frame.f_back is not None and frame.f_globals["__name__"].startswith("lrd."):
            frame, level = frame.f_back, level + 1
        warnings.warn(FORGETS, stacklevel=level)


def check_group(optimizer: Optimizer, group: dict[str, Any], masks: str) -> None:
    """Raise ValueError where a parameter group cannot take such masks."""
    if masks not in MASKS:
        raise ValueError(f"masks must be one of {', '.join(MASKS)}, not {masks!r}")
    if masks == "momentum_buffer":
        is_sgd = isinstance(optimizer, torch.optim.SGD)
        if not is_sgd or not group["momentum"] or group["nesterov"]:
            raise ValueError(f"{FORGETS}; it needs torch.optim.SGD with momentum and without Nesterov")
