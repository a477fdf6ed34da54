"""A few steps of a tiny network whose learning rates are recorded for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lrd import recipe as recipes
from lrd.parts.optimizers import build_optimizer
from lrd.tracking.tracker import Tracker

GROUPS = ["group0", "head"]
LRS = [0.25, 0.5]  # of each group
STEPS_PER_EPOCH = 5


def make_recipe(
    keep_prob: float | None = 0.5, probes: int = 4, histograms_every: int = 0
) -> recipes.Recipe:
    """A recipe with a parameter group for each of the network's two layers."""
    head = {"match": "2.*", "name": "head", "lr": LRS[1]}
    settings = {
        "optimizer": {"lr": LRS[0], "momentum": 0.9, "groups": [head]},
        "lr_dropout": None if keep_prob is None else {"keep_prob": keep_prob},
        "tracking": {"probes": probes, "histograms_every": histograms_every},
    }
    return recipes.parse(settings, "test")


def make_network() -> nn.Sequential:
    """Two linear layers; their parameters are `0.weight`, `0.bias`, `2.weight` and `2.bias`."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class TrackedRun:
    """A network with its optimizer and tracker; each step has random gradients."""

    def __init__(self, run_dir: Path, step: int = 0, recipe: recipes.Recipe | None = None) -> None:
        torch.manual_seed(0)
        self.recipe = recipe or make_recipe()
        self.network = make_network()
        self.optimizer = build_optimizer(self.network, self.recipe)
        self.tracker = Tracker(
            run_dir, step, STEPS_PER_EPOCH, self.recipe, self.network, self.optimizer
        )

    def update(self, step: int, loss: float = 0.0) -> list[torch.Tensor]:
        """Do and record one step.

        Returns:
            For each parameter, which of its elements moved: bool, of the parameter's shape.
        """
        before = [parameter.detach().clone() for parameter in self.network.parameters()]
        for parameter in self.network.parameters():
            parameter.grad = torch.randn_like(parameter)

        lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.step()
        self.tracker.record_probes(step, lrs)
        self.tracker.record_step(step, lrs, {"train/loss": loss})

        after = [parameter.detach() for parameter in self.network.parameters()]
        return [new != old for new, old in zip(after, before, strict=True)]
