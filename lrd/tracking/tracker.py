"""What a run records for TensorBoard and in `metrics.csv`.

Tags, by step:

| tag | value |
| --- | --- |
| `lr/<group>` | the learning rate of a parameter group |
| `lr_effective/<group>` | the learning rate times the fraction of elements that kept it |
| `lr_dropout/kept/<group>` | that fraction |
| `train/loss`, `train/accuracy` | mean loss and accuracy of the global batch, in training |
| `train/grad_norm` | norm of the gradient before clipping |
| `train/grad_norm_of_rank_0` | the same of rank 0's own gradient (`gradient_exchange: kept`) |
| `train/images_per_second` | speed |
| `ranks/compute_seconds/max`, `.../median` | how long ranks computed in a step, without waiting |
| `ranks/slowest` | the rank that computed longest |
| `train/skipped` | steps so far that were not finite, if the recipe skips such steps |
| `train/replaced` | images so far that could not be decoded, with `data.skip_corrupt` |
| `probes/<parameter>[<index>]` | the learning rate of one element: its group's, or zero |
| `updates/<parameter>` | histogram of the update, on request (`tracking.histograms_every`) |

Tags, by evaluation: `test/loss` and `test/accuracy`; with held-out images `validation/loss` and
`validation/accuracy`; with an average of the weights the same with `ema_` before `loss` and
`accuracy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import scalar

from lrd import recipe as recipes
from lrd.tracking import pages
from lrd.tracking.event_file import EventFile, read_scalars_since
from lrd.tracking.metrics_file import MetricsFile
from lrd.tracking.recorder import Recorder


class Tracker(Recorder):
    """Writes the records of one start of a run. Only the main process has one.

    Args:
        run_dir: folder of the event files; `tensorboard --logdir` on its parent shows all runs.
        step: steps done so far. Records of later steps, which an interrupted start left, are
            dropped.
        steps_per_epoch: from which the epoch of a step follows.
        recipe: recorded as text and as hyper-parameters.
        network: the network whose elements are recorded.
        optimizer: the optimizer whose parameter groups are recorded.
        rescued: scalars of the last steps up to `step` that a survivor of the last start had in
            memory, by step and tag. The main process may have died before it wrote them.
        looks_for_evaluation: whether `step` may have records of an evaluation already, because the
            last start was killed after it and before the checkpoint that contains its result.

    Attributes:
        events: the event file.
        metrics: the same scalars as a table.

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
        rescued: Mapping[int, Mapping[str, float]] = MappingProxyType({}),
        looks_for_evaluation: bool = False,
    ) -> None:
        super().__init__(network, optimizer, recipe.tracking.probes)
        self.recipe = recipe
        self._old_weights: dict[str, Tensor] = {}  # by parameter, in a step with histograms

        # These steps are written to the table anew; what the event files have of them counts.
        first_step = min(rescued, default=step if looks_for_evaluation else step + 1)
        recorded: dict[int, dict[str, float]] = {}
        if first_step <= step:
            recorded = read_scalars_since(run_dir, first_step)
        self.metrics = MetricsFile(
            run_dir, step if not rescued else first_step - 1, steps_per_epoch
        )
        self._already_recorded = {
            (tag, recorded_step)
            for recorded_step, scalars in recorded.items()
            if recorded_step <= step
            for tag in scalars
        }

        self.events = EventFile(run_dir, purge_step=step + 1 if step else 0)
        if step == 0:
            self.events.add(pages.recipe_text(recipe), step)
            self.events.add(pages.charts(), step)
        # TensorBoard takes the first of these. Runs of earlier versions had them at their end.
        for summary in pages.hparams(recipe):
            self.events.add(summary, step)

        for earlier_step in sorted({*rescued, *recorded}):
            in_files = recorded.get(earlier_step, {})
            for tag, value in in_files.items():
                self.metrics.add(tag, value, earlier_step)
            for tag, value in rescued.get(earlier_step, {}).items():
                if tag not in in_files:
                    self._add_scalar(tag, value, earlier_step)
                    self._already_recorded.add((tag, earlier_step))
        self.flush()

    def before_update(self, step: int) -> None:
        """Keep a copy of the weights until `record_update`, where a histogram of it is due."""
        every = self.recipe.tracking.histograms_every
        if every and step % every == 0:
            for name, parameter in self.network.named_parameters():
                self._old_weights[name] = parameter.detach().clone()

    @torch.no_grad()
    def record_update(self, step: int) -> None:
        """Record a histogram of each parameter's update, if `before_update` has kept a copy."""
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
        super()._add_scalar(tag, value, step)
        if (tag, step) in self._already_recorded:
            return

        summary = scalar(tag, value)  # type: ignore[no-untyped-call]
        self.events.add(summary, step)
        self.metrics.add(tag, summary.value[0].simple_value, step)
