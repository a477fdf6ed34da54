"""TensorBoard: tags, lr trajectories, going on after a resume.

Tags, by step: `lr/<group>`, `lr_effective/<group>` (lr times the fraction really kept), `lr_dropout/kept/<group>`,
`train/loss`, `train/grad_norm`, `train/images_per_second`, `train/skipped` (steps so far whose gradient was not
finite, where the recipe skips such), `probes/<parameter>[<index>]` (the lr of one single element: the group's or zero);
by evaluation: `test/loss`, `test/accuracy`.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import hparams, scalar, text

from lrd import recipe as recipes
from lrd.dropout import attached
from lrd.events import EventFile


@dataclass(frozen=True)
class Probe:
    """One element of one parameter."""

    tag: str
    group: int  # number of the parameter group
    index: int  # of the parameter in the optimizer
    element: int  # of the flattened parameter


class Tracker:
    """Writes the event files of one run. For one rank only.

    Args:
        run_dir: where the event files lie; `tensorboard --logdir` on its parent shows all runs side by side.
        step: steps done so far. Records of later steps, by a run that was interrupted, are purged.
        recipe: written as text and as hyper-parameters.
        network, optimizer: whose groups and elements are recorded.
        known: tags that have their record of `step` already, by a run that was killed between an evaluation and the
            checkpoint that knew of it.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        recipe: recipes.Recipe,
        network: nn.Module,
        optimizer: Optimizer,
        known: AbstractSet[str] = frozenset(),
    ) -> None:
        self._known = {(tag, step) for tag in known}
        self.recipe = recipe
        self.optimizer = optimizer
        self.probes = choose_probes(network, optimizer, recipe.tracking.probes)
        self.events = EventFile(run_dir, purge_step=step + 1 if step else 0)
        if step == 0:
            summary = text("recipe", "    " + recipe.dump().replace("\n", "\n    "))  # type: ignore[no-untyped-call]
            self.events.add(summary, 0)
        self.flush()

    def step(self, step: int, lrs: list[float], scalars: dict[str, float], moved: bool = True) -> None:
        """Record one step. `lrs` is what each group's lr was in it; `step` counts from 1, one skipped moved nothing."""
        dropout = attached(self.optimizer)
        kept = [float(moved)] * len(lrs) if dropout is None or not moved else dropout.kept_fractions()
        for group, lr, fraction in zip(self.optimizer.param_groups, lrs, kept, strict=True):
            self._scalar(f"lr/{group['name']}", lr, step)
            self._scalar(f"lr_effective/{group['name']}", lr * fraction, step)
            self._scalar(f"lr_dropout/kept/{group['name']}", fraction, step)
        for tag, value in scalars.items():
            self._scalar(tag, value, step)

    def probe(self, step: int, lrs: list[float], moved: bool = True) -> None:
        """Record the lr that single elements had in one step."""
        dropout = attached(self.optimizer)
        for probe in self.probes:
            kept = moved and (dropout is None or dropout.keeps(probe.index, probe.element))
            self._scalar(probe.tag, lrs[probe.group] * kept, step)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._scalar(f"test/{key}", value, step)

    def hyper_parameters(self, step: int, metrics: dict[str, float]) -> None:
        """Hyper-parameters with the final metrics, for the HParams tab."""
        values = self.recipe.mathematics().items()
        plain = (bool, int, float, str)
        flat = {key: value if isinstance(value, plain) else str(value) for key, value in values if value is not None}
        named = {f"hparam/test_{key}": value for key, value in metrics.items()}
        for summary in hparams(flat, named):  # type: ignore[no-untyped-call]
            self.events.add(summary, step)
        for key, value in named.items():
            self._scalar(key, value, step)

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if (tag, step) not in self._known:
            self.events.add(scalar(tag, value), step)  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Hand everything to the file system: what a checkpoint says is done must be in the files.

        Raises:
            OSError: it could not be written; nothing is lost, the next flush tries again.
        """
        self.events.flush()


def recorded_at(run_dir: Path, step: int) -> set[str]:
    """The tags of which `run_dir` has a record of a step. Reads all its event files, so not for every start."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag for tag in events.Tags()["scalars"] if any(point.step == step for point in events.Scalars(tag))}


def choose_probes(network: nn.Module, optimizer: Optimizer, count: int) -> list[Probe]:
    """`count` single elements spread evenly over the optimizer's parameters."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    parameters = [(i, parameter) for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]]
    probes = []
    for i in range(min(count, len(parameters))):
        index = (2 * i + 1) * len(parameters) // (2 * min(count, len(parameters)))
        group, parameter = parameters[index]
        element = parameter.numel() // 2
        place = ",".join(str(at) for at in np.unravel_index(element, parameter.shape))
        probes.append(Probe(f"probes/{names[id(parameter)]}[{place}]", group, index, element))
    return probes
