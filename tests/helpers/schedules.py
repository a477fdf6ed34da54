"""The schedules that a recipe may name, each with torch's own scheduler to compare it with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from lrd import recipe

# Name -> the settings in the recipe, and torch's scheduler for an optimizer and the number of
# positions of the whole run.
SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[Optimizer, int], Any]]] = {
    "StepLR": (
        {"step_size": 3, "gamma": 0.5},
        lambda optimizer, total: lr_scheduler.StepLR(optimizer, 3, 0.5),
    ),
    "MultiStepLR": (
        {"milestones": [2, 4, 13]},
        lambda optimizer, total: lr_scheduler.MultiStepLR(optimizer, [2, 4, 13]),
    ),
    "ExponentialLR": (
        {"gamma": 0.9},
        lambda optimizer, total: lr_scheduler.ExponentialLR(optimizer, 0.9),
    ),
    "CosineAnnealingLR": (
        {},
        lambda optimizer, total: lr_scheduler.CosineAnnealingLR(optimizer, total),
    ),
    "CosineAnnealingLR T_max": (
        {"T_max": 3, "eta_min": 0.01},
        lambda optimizer, total: lr_scheduler.CosineAnnealingLR(optimizer, 3, 0.01),
    ),
    "LambdaLR": (
        {"lr_lambda": "0.5 * (1 + cos(pi * t / total))"},
        lambda optimizer, total: lr_scheduler.LambdaLR(
            optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / total))
        ),
    ),
}


def section(name: str, **settings: Any) -> recipe.Schedule:
    """The `schedule` section of a recipe; what follows a space in the name is left out."""
    values = {"name": name.partition(" ")[0], **settings}
    return recipe.parse({"schedule": values}, "test").schedule
