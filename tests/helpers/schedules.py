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

OWN = "tests.helpers.own_parts.schedule"


def _sequential(optimizer: Optimizer, total: int) -> lr_scheduler.SequentialLR:
    """A rise, a hold, a fall that begins anew, and one to the end of the run."""
    schedulers = [
        lr_scheduler.LinearLR(optimizer, 0.25, total_iters=1),
        lr_scheduler.ConstantLR(optimizer, 1.0),
        lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 - t / 2),
        lr_scheduler.CosineAnnealingLR(optimizer, total - 4),
    ]
    return lr_scheduler.SequentialLR(optimizer, schedulers, [1, 2, 4])


# The same for schedules that tests of other things do not need.
FURTHER_SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[Optimizer, int], Any]]] = {
    "CosineAnnealingWarmRestarts": (
        {"T_0": 2, "T_mult": 2, "eta_min": 0.01},
        lambda optimizer, total: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 2, 0.01),
    ),
    "OneCycleLR": (
        {"max_lr": 0.9, "cycle_momentum": False},
        lambda optimizer, total: lr_scheduler.OneCycleLR(
            optimizer, 0.9, total, cycle_momentum=False
        ),
    ),
    "OneCycleLR max_lr of each group": (
        {
            "max_lr": [0.9, 0.4],
            "total_steps": 25,
            "pct_start": 0.25,
            "three_phase": True,
            "anneal_strategy": "linear",
            "div_factor": 5,
            "final_div_factor": 10,
            "cycle_momentum": False,
        },
        lambda optimizer, total: lr_scheduler.OneCycleLR(
            optimizer,
            [0.9, 0.4],
            25,
            pct_start=0.25,
            three_phase=True,
            anneal_strategy="linear",
            div_factor=5,
            final_div_factor=10,
            cycle_momentum=False,
        ),
    ),
    "PolynomialLR": (
        {"power": 0.9},
        lambda optimizer, total: lr_scheduler.PolynomialLR(optimizer, total, 0.9),
    ),
    "LinearLR": (
        {"start_factor": 1.0, "end_factor": 0.0},
        lambda optimizer, total: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total),
    ),
    "ConstantLR": (
        {"factor": 0.5, "total_iters": 3},
        lambda optimizer, total: lr_scheduler.ConstantLR(optimizer, 0.5, 3),
    ),
    "LambdaLR of each group": (
        {"lr_lambda": ["1 - t / total", "0.5 ** t"]},
        lambda optimizer, total: lr_scheduler.LambdaLR(
            optimizer, [lambda t: 1 - t / total, lambda t: 0.5**t]
        ),
    ),
    "SequentialLR": (
        {
            "schedules": [
                {"name": "LinearLR", "start_factor": 0.25},
                {"name": "constant"},
                {"name": "LambdaLR", "lr_lambda": "1 - t / total"},
                {"name": "CosineAnnealingLR"},
            ],
            "milestones": [1, 2, 4],
        },
        _sequential,
    ),
    "SequentialLR of restarts and powers": (
        {
            "schedules": [
                {"name": "CosineAnnealingWarmRestarts", "T_0": 1, "T_mult": 2},
                {"name": "ExponentialLR", "gamma": 0.5},
                {"name": "MultiStepLR", "milestones": [1]},
            ],
            "milestones": [2, 3],
        },
        lambda optimizer, total: lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1, 2),
                lr_scheduler.ExponentialLR(optimizer, 0.5),
                lr_scheduler.MultiStepLR(optimizer, [1]),
            ],
            [2, 3],
        ),
    ),
    "torch.optim.lr_scheduler:CyclicLR": (
        {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
        lambda optimizer, total: lr_scheduler.CyclicLR(
            optimizer, 0.01, 0.1, 3, cycle_momentum=False
        ),
    ),
    f"{OWN}:make_inverse_sqrt": (
        {"offset": 2},
        lambda optimizer, total: lr_scheduler.LambdaLR(optimizer, lambda t: (2 / (t + 2)) ** 0.5),
    ),
    f"{OWN}:WarmupHoldDecay": (
        {"warmup": 0.4},
        lambda optimizer, total: lr_scheduler.LambdaLR(
            optimizer,
            lambda t: max(0.0, min(1.0, (t + 1) / max(1.0, 0.4 * total), (1 - t / total) / 0.4)),
        ),
    ),
}
ALL_SCHEDULES = SCHEDULES | FURTHER_SCHEDULES


def section(name: str, **settings: Any) -> recipe.Schedule:
    """The `schedule` section of a recipe; what follows a space in the name is left out."""
    values = {"name": name.partition(" ")[0], **settings}
    return recipe.parse({"schedule": values}, "test").schedule
