"""What a run records for TensorBoard and in `metrics.csv`.

Tags, by step:

| tag | value |
| --- | --- |
| `lr/<group>` | the learning rate of a parameter group |
| `lr_effective/<group>` | the learning rate times the fraction of elements that kept it |
| `lr_dropout/kept/<group>` | that fraction |
| `train/loss`, `train/accuracy` | mean loss and accuracy of the global batch, in training |
| `train/grad_norm` | norm of the gradient before clipping |
| `train/images_per_second` | speed |
| `train/skipped` | steps so far whose gradient was not finite, if the recipe skips such steps |
| `train/replaced` | images so far that could not be decoded, with `data.skip_corrupt` |
| `probes/<parameter>[<index>]` | the learning rate of one element: its group's, or zero |
| `updates/<parameter>` | histogram of the update, on request (`tracking.histograms_every`) |

Tags, by evaluation: `test/loss` and `test/accuracy`; with held-out images `validation/loss` and
`validation/accuracy`; with an average of the weights the same with `ema_` before `loss` and
`accuracy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import scalar

from lrd import recipe as recipes
from lrd.optim.dropout import get_lr_dropout
from lrd.tracking import pages
from lrd.tracking.event_file import EventFile, read_scalars
from lrd.tracking.metrics_file import MetricsFile


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
    """Writes the records of one start of a run. Only the main process has one.

    Args:
        run_dir: folder of the event files; `tensorboard --logdir` on its parent shows all runs.
        step: steps done so far. Records of later steps, which an interrupted start left, are
            dropped.
        steps_per_epoch: from which the epoch of a step follows.
        recipe: recorded as text and as hyper-parameters.
        network: the network whose elements are recorded.
        optimizer: the optimizer whose parameter groups are recorded.
        recorded: tags that have a record of `step` already, with its value, because the last start
            was killed after an evaluation and before the checkpoint that contains its result.

    Attributes:
        events: the event file.
        metrics: the same scalars as a table.
        probes: the elements whose learning rates are recorded.

    Raises:
        OSError: a file could not be written.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        steps_per_epoch: int,
        recipe: recipes.Recipe,
        network: nn.Module,
        optimizer: Optimizer,
        recorded: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.recipe = recipe
        self.network = network
        self.optimizer = optimizer
        self.probes = choose_probes(network, optimizer, recipe.tracking.probes)
        self._old_weights: dict[str, Tensor] = {}  # by parameter, in a step with histograms

        self.metrics = MetricsFile(run_dir, step, steps_per_epoch)
        self._already_recorded = {(tag, step) for tag in recorded}
        for tag, value in recorded.items():
            self.metrics.add(tag, value, step)

        self.events = EventFile(run_dir, purge_step=step + 1 if step else 0)
        if step == 0:
            self.events.add(pages.recipe_text(recipe), step)
            self.events.add(pages.charts(), step)
        # TensorBoard takes the first of these. Runs of earlier versions had them at their end.
        for summary in pages.hparams(recipe):
            self.events.add(summary, step)
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
            self._add_scalar(evaluation_tag(name), value, step)

    def copy_weights(self, step: int) -> None:
        """Keep a copy of the weights until `record_updates`, where histograms of `step` are due."""
        every = self.recipe.tracking.histograms_every
        if every and step % every == 0:
            for name, parameter in self.network.named_parameters():
                self._old_weights[name] = parameter.detach().clone()

    @torch.no_grad()
    def record_updates(self, step: int) -> None:
        """Record a histogram of each parameter's update, if `copy_weights` has kept a copy."""
        if not self._old_weights:
            return

        for name, parameter in self.network.named_parameters():
            update = parameter - self._old_weights[name]
            summary = pages.update_histogram(f"updates/{name}", update)
            if summary is not None:
                self.events.add(summary, step)
        self._old_weights.clear()

    def record_summary(self, rows: list[tuple[str, str]]) -> None:
        """Record what the run is, as a table for TensorBoard's Text page."""
        self.events.add(pages.table_text("about", rows), step=0)

    def record_end(self, step: int) -> None:
        """Record that the run is done, for TensorBoard's HParams page."""
        self.events.add(pages.hparams_end(), step)

    def flush(self) -> None:
        """Hand all records to the file system.

        This comes before a checkpoint: the files must contain every step that it counts.

        Raises:
            OSError: they could not be written. The records are kept, and the next flush tries
                again.
        """
        self.events.flush()
        self.metrics.flush()

    def sync(self) -> None:
        """Wait until all flushed records are on the disk. Another thread may call it."""
        self.events.sync()
        self.metrics.sync()

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        if (tag, step) in self._already_recorded:
            return

        summary = scalar(tag, value)  # type: ignore[no-untyped-call]
        self.events.add(summary, step)
        self.metrics.add(tag, summary.value[0].simple_value, step)


def evaluation_tag(name: str) -> str:
    """The tag of a metric of an evaluation: `ema_loss` -> `test/ema_loss`.

    Metrics of held-out images have names that say so: `validation_loss` -> `validation/loss`.
    """
    prefix = "validation_"
    if name.startswith(prefix):
        return f"validation/{name.removeprefix(prefix)}"
    return f"test/{name}"


def scalars_recorded_at(run_dir: Path, step: int) -> dict[str, float]:
    """Find the tags that have a record of a step, and its values.

    This reads all event files of the run, which is too slow to do at each start.
    """
    recorded = {}
    for tag, points in read_scalars(run_dir).items():
        for recorded_step, value in points:
            if recorded_step == step:
                recorded[tag] = value
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
