"""What a run records for TensorBoard.

Tags, by step:

| tag | value |
| --- | --- |
| `lr/<group>` | the learning rate of a parameter group |
| `lr_effective/<group>` | the learning rate times the fraction of elements that kept it |
| `lr_dropout/kept/<group>` | that fraction |
| `train/loss` | mean loss of the global batch |
| `train/grad_norm` | norm of the gradient before clipping |
| `train/images_per_second` | speed |
| `train/skipped` | steps so far whose gradient was not finite, if the recipe skips such steps |
| `probes/<parameter>[<index>]` | the learning rate of one element: its group's, or zero |

Tags, by evaluation: `test/loss` and `test/accuracy`.
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
from lrd.optim.dropout import get_lr_dropout
from lrd.tracking.event_file import EventFile, read_scalars


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


class Tracker:
    """Writes the event file of one start of a run. Only the main process has one.

    Args:
        run_dir: folder of the event files; `tensorboard --logdir` on its parent shows all runs.
        step: steps done so far. Records of later steps, which an interrupted start left, are
            dropped.
        recipe: recorded as text and as hyper-parameters.
        network: the network whose elements are recorded.
        optimizer: the optimizer whose parameter groups are recorded.
        recorded_tags: tags that have a record of `step` already, because the last start was killed
            after an evaluation and before the checkpoint that contains its result.

    Attributes:
        events: the event file.
        probes: the elements whose learning rates are recorded.

    Raises:
        OSError: the event file could not be written.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        recipe: recipes.Recipe,
        network: nn.Module,
        optimizer: Optimizer,
        recorded_tags: AbstractSet[str] = frozenset(),
    ) -> None:
        self.recipe = recipe
        self.optimizer = optimizer
        self.probes = choose_probes(network, optimizer, recipe.tracking.probes)
        self.events = EventFile(run_dir, purge_step=step + 1 if step else 0)
        self._already_recorded = {(tag, step) for tag in recorded_tags}

        if step == 0:
            # Markdown shows lines that are indented by four spaces as they are.
            indented = "    " + recipe.dump().replace("\n", "\n    ")
            self.events.add(text("recipe", indented), step=0)  # type: ignore[no-untyped-call]
        self.flush()

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

    def record_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of an evaluation after `step`."""
        for name, value in metrics.items():
            self._add_scalar(f"test/{name}", value, step)

    def record_hparams(self, step: int, metrics: dict[str, float]) -> None:
        """Record the recipe's settings with the final metrics, for TensorBoard's HParams tab."""
        settings = {}
        for key, value in self.recipe.result_settings().items():
            if value is not None:
                is_plain = isinstance(value, (bool, int, float, str))
                settings[key] = value if is_plain else str(value)
        final_metrics = {f"hparam/test_{name}": value for name, value in metrics.items()}

        for summary in hparams(settings, final_metrics):  # type: ignore[no-untyped-call]
            self.events.add(summary, step)
        for tag, value in final_metrics.items():
            self._add_scalar(tag, value, step)

    def flush(self) -> None:
        """Hand all records to the file system.

        This comes before a checkpoint: the event files must contain every step that it counts.

        Raises:
            OSError: they could not be written. The records are kept, and the next flush tries
                again.
        """
        self.events.flush()

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        if (tag, step) not in self._already_recorded:
            self.events.add(scalar(tag, value), step)  # type: ignore[no-untyped-call]


def tags_recorded_at(run_dir: Path, step: int) -> set[str]:
    """Find the tags that have a record of a step.

    This reads all event files of the run, which is too slow to do at each start.
    """
    recorded = set()
    for tag, points in read_scalars(run_dir).items():
        if any(recorded_step == step for recorded_step, _ in points):
            recorded.add(tag)
    return recorded


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
