"""The scalars that a run records. Every rank computes them; only the main process writes files.

The other ranks keep the latest ones in memory: if the main process dies, what it had not written
yet is in the checkpoint that a survivor saves (`lrd.job.survivor`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.optim import Optimizer

from lrd.optim.dropout import get_lr_dropout

# The main process flushes its records at most every five seconds, see `event_file`.
_SECONDS_KEPT = 15.0

SKIPPED_TAG = "train/skipped"


@dataclass(frozen=True)
class Probe:
    """One element of one parameter, whose learning rate is recorded.

    Attributes:
        tag: the tag of its records.
        group: index of the parameter group.
        index: index of the parameter in the optimizer, counted over all groups.
        element: index of the element in the flattened parameter.
    """

    tag: str
    group: int
    index: int
    element: int


class Recorder:
    """Computes the scalars of each step, and keeps those of the last seconds.

    Args:
        network: the network whose elements are recorded.
        optimizer: the optimizer whose parameter groups are recorded.
        num_probes: number of elements whose learning rates are recorded.

    Attributes:
        probes: these elements.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, num_probes: int) -> None:
        self.network = network
        self.optimizer = optimizer
        self.probes = choose_probes(network, optimizer, num_probes)
        self._recent: dict[int, _Row] = {}  # by step

    def latest_scalars(self) -> dict[int, dict[str, float]]:
        """The scalars of the last seconds: step -> tag -> value."""
        return {step: row.scalars for step, row in self._recent.items()}

    def record_step(
        self, step: int, lrs: list[float], scalars: dict[str, float], moved: bool = True
    ) -> None:
        """Record one step.

        Args:
            step: the number of the step, from 1.
            lrs: the learning rate that each parameter group had in the step.
            scalars: further values by their tags.
            moved: False if the step was skipped, so that no element moved.
        """
        dropout = get_lr_dropout(self.optimizer)
        if moved and dropout is not None:
            kept_fractions = dropout.kept_fractions()
        else:
            kept_fractions = [float(moved)] * len(lrs)

        groups = self.optimizer.param_groups
        for group, lr, kept in zip(groups, lrs, kept_fractions, strict=True):
            self._add_scalar(f"lr/{group['name']}", lr, step)
            self._add_scalar(f"lr_effective/{group['name']}", lr * kept, step)
            self._add_scalar(f"lr_dropout/kept/{group['name']}", kept, step)

        for tag, value in scalars.items():
            self._add_scalar(tag, value, step)

    def record_probes(self, step: int, lrs: list[float], moved: bool = True) -> None:
        """Record the learning rates that the probed elements had in one step.

        Args:
            step: the number of the step, from 1.
            lrs: the learning rate that each parameter group had in the step.
            moved: False if the step was skipped, so that no element moved.
        """
        dropout = get_lr_dropout(self.optimizer)
        for probe in self.probes:
            is_kept = moved and (dropout is None or dropout.keeps(probe.index, probe.element))
            self._add_scalar(probe.tag, lrs[probe.group] * is_kept, step)

    def before_update(self, step: int) -> None:
        """Called before the optimizer's step, when the gradients are those it will see."""

    def record_update(self, step: int) -> None:
        """Called after the optimizer's step."""

    def record_skipped(self, step: int, num_skipped: int) -> None:
        """Record that a step was skipped.

        Args:
            step: the number of the step, from 1.
            num_skipped: the steps that were skipped so far.
        """
        self._add_scalar(SKIPPED_TAG, num_skipped, step)

    def record_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of an evaluation after `step`."""
        for name, value in metrics.items():
            self._add_scalar(evaluation_tag(name), value, step)

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        now = time.monotonic()
        if step not in self._recent:
            # A step whose scalars are older than this has been flushed when later ones were added.
            first_time = now - _SECONDS_KEPT
            self._recent = {
                earlier: row for earlier, row in self._recent.items() if row.time >= first_time
            }
            self._recent[step] = _Row({}, now)
        self._recent[step].scalars[tag] = value
        self._recent[step].time = now


@dataclass
class _Row:
    """The scalars of a step.

    Attributes:
        scalars: by their tags.
        time: when the last of them was added, on the clock of `time.monotonic`.
    """

    scalars: dict[str, float]
    time: float


def evaluation_tag(name: str) -> str:
    """The tag of a metric of an evaluation: `ema_loss` -> `test/ema_loss`.

    Metrics of held-out images have names that say so: `validation_loss` -> `validation/loss`.
    """
    prefix = "validation_"
    if name.startswith(prefix):
        return f"validation/{name.removeprefix(prefix)}"
    return f"test/{name}"


def choose_probes(network: nn.Module, optimizer: Optimizer, count: int) -> list[Probe]:
    """Choose the elements whose learning rates are recorded.

    Each is the middle element of a parameter, and the parameters are spread evenly over the
    optimizer's.

    Args:
        network: the network, from which the parameters have their names.
        optimizer: the optimizer of its parameters.
        count: the number of probes; there are fewer if there are fewer parameters.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    parameters = []
    for group_index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            parameters.append((group_index, parameter))

    count = min(count, len(parameters))
    probes = []
    for i in range(count):
        # The middle of the i-th of `count` equal parts.
        index = (2 * i + 1) * len(parameters) // (2 * count)
        group_index, parameter = parameters[index]
        element = parameter.numel() // 2

        position = np.unravel_index(element, parameter.shape)
        place = ",".join(str(coordinate) for coordinate in position)
        tag = f"probes/{names[id(parameter)]}[{place}]"
        probes.append(Probe(tag, group_index, index, element))
    return probes
