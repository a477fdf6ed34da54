"""Losses and gradients that are not finite: the run stops, or skips the step.

They are found before the optimizer's step, in a step in which the ranks exchange statistics (see
`lrd.train.exchanges_statistics`). That is every step on a CPU and with `on_nonfinite: skip`. On a
GPU with `on_nonfinite: stop` it is every `tracking.every_steps`-th: there they may have begun some
steps earlier. Nothing is saved in between.
"""

from __future__ import annotations

import math

import torch

from lrd.distributed.communication import StepStatistics, all_gather_values, describe_rank
from lrd.errors import RunError
from lrd.job import sharding
from lrd.job.state import Job

MAX_SKIPPED_IN_A_ROW = 10
_MAX_SAMPLES_NAMED = 8


class NonfiniteGuard:
    """Decides whether the optimizer may take a step.

    A skipped step leaves weights, momentum, the masks' update count and BatchNorm's running
    statistics as they were. The schedule and the position in the data go on.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._skips = job.recipe.trainer.on_nonfinite == "skip"
        self._num_in_a_row = 0

    def may_step(self, statistics: StepStatistics) -> bool:
        """Whether the optimizer may take this step; the same on every rank.

        Raises:
            RunError: it may not, and the recipe says stop, or too many steps in a row were skipped.
                The message names step, ranks and samples.
        """
        if statistics.is_finite:
            self._num_in_a_row = 0
            return True

        self._num_in_a_row += 1
        if not self._skips or self._num_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise RunError(self._describe(statistics))

        self._job.buffers.restore()
        self._job.skipped_steps += 1
        return False

    def _describe(self, statistics: StepStatistics) -> str:
        """One line for the user. All ranks must call this together."""
        rank = self._job.accelerator.process_index

        # What is not finite, and whose part of it on this rank.
        if statistics.has_finite_losses:
            norm = next(norm for norm in statistics.grad_norms if not math.isfinite(norm))
            what = f"the gradient's norm is not finite ({norm}), though the losses are:"
            problem = self._find_nonfinite_gradient()
        else:
            what = "the loss is not finite"
            loss = statistics.losses[rank]
            problem = None if math.isfinite(loss) else str(loss)

        reports = all_gather_values([describe_rank(), problem, self._describe_samples()])
        named = [
            f"{rank_name} ({rank_problem}; {samples})"
            for rank_name, rank_problem, samples in reports
            if rank_problem
        ]
        if named:
            origin = f"on {', '.join(named)}"
        elif len(reports) == 1 or self._job.exchange is not None:
            origin = "every element of the gradient is finite, its norm is too large"
        else:
            origin = "each rank's own gradient is finite, their sum is too large"

        where = f"step {self._job.step + 1}: "
        if self._num_in_a_row > 1:
            where += f"{self._num_in_a_row} steps in a row are not finite, the last: "
        return (
            f"{where}{what} {origin}; "
            "stopped before the optimizer's step, nothing is saved after it"
        )

    def _find_nonfinite_gradient(self) -> str | None:
        """This rank's first gradient that is not finite, by a second backward pass.

        The gradients in the parameters are the sums over all ranks, which do not tell whose is not
        finite. Inputs are a function of the position, so this pass sees what the first one saw.
        """
        job = self._job
        accumulation_steps = job.recipe.trainer.accumulation_steps
        job.raw_model.zero_grad()
        if job.is_sharded:
            sharding.keep_local_gradients(job.raw_model)
        for micro_step in range(accumulation_steps):
            inputs, labels = job.load_micro_batch(job.step, micro_step)
            job.seed_layers(job.step, micro_step)
            with job.accelerator.autocast():
                logits = job.raw_model(inputs)
            loss = job.loss_function(logits.float(), labels) / accumulation_steps
            loss.backward()  # type: ignore[no-untyped-call]

        for name, parameter in job.raw_model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"first in the gradient of {name}"
        return None

    def _describe_samples(self) -> str:
        """This rank's samples of the step, by their index in the training set."""
        micro_steps = range(self._job.recipe.trainer.accumulation_steps)
        indices = torch.cat(
            [self._job.batches.indices(self._job.step, micro_step) for micro_step in micro_steps]
        )

        text = ", ".join(str(int(index)) for index in indices[:_MAX_SAMPLES_NAMED])
        if len(indices) > _MAX_SAMPLES_NAMED:
            text += f", ... {len(indices)} in all"
        return f"training samples {text}"
