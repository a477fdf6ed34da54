"""Losses and gradients that are not finite: found before the optimizer's step, which then stops or skips."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrd.distributed import Boundary, describe_rank, gather
from lrd.errors import RunError
from lrd.job import Job

MOST_SKIPPED_IN_A_ROW = 10
_SAMPLES_NAMED = 8


class Guard:
    """Decides whether the optimizer takes a step.

    A skipped step leaves the weights, momentum, masks' count and BatchNorm's running statistics as they were; the
    schedule and the position in the data go on.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.skips = job.recipe.trainer.on_nonfinite == "skip"
        self.in_a_row = 0
        self._buffers: list[Tensor] = []

    def remember(self) -> None:
        """Before the forward pass, which changes BatchNorm's running statistics."""
        if self.skips:
            self._buffers = [buffer.clone() for buffer in self.job.network.buffers()]

    def allows(self, seen: Boundary) -> bool:
        """Whether the step may be taken; the same on every rank.

        Raises:
            RunError: it may not, and the recipe says stop, or too many in a row were skipped. Names step, ranks and
                samples.
        """
        if seen.is_finite:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        if not self.skips or self.in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise RunError(self._describe(seen))
        for buffer, before in zip(self.job.network.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        self.job.skipped += 1
        return False

    def _describe(self, seen: Boundary) -> str:
        step, rank = self.job.step + 1, self.job.accelerator.process_index
        where = f"step {step}: "
        if self.in_a_row > 1:
            where += f"{self.in_a_row} steps in a row are not finite, the last: "
        if seen.has_finite_losses:
            what = f"the gradient's norm is not finite ({seen.grad_norms[rank]}), though the losses are:"
            faults = gather((describe_rank(), self._own_fault(), self._samples()))
        else:
            what = "the loss is not finite"
            own = seen.losses[rank]
            fault = None if torch.isfinite(torch.tensor(own)) else str(own)
            faults = gather((describe_rank(), fault, self._samples()))
        named = [f"{who} ({fault}; {samples})" for who, fault, samples in faults if fault]
        origin = f"on {', '.join(named)}" if named else "each rank's own gradient is finite, their sum is too large"
        return f"{where}{what} {origin}; stopped before the optimizer's step, nothing is saved after it"

    def _own_fault(self) -> str | None:
        """This rank's first gradient that is not finite, from a second backward pass: the ranks' sum tells not whose.

        Inputs are a function of the position, so it sees what the first pass saw.
        """
        job = self.job
        job.network.zero_grad()
        for micro_step in range(job.recipe.trainer.accumulation_steps):
            inputs, labels = job.batches(job.step, micro_step)
            with job.accelerator.autocast():
                logits = job.network(inputs)
            nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        for name, parameter in job.network.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"first in the gradient of {name}"
        return None

    def _samples(self) -> str:
        """This rank's samples of the step, by their index in the training set."""
        count = self.job.recipe.trainer.accumulation_steps
        indices = torch.cat([self.job.batches.indices(self.job.step, micro_step) for micro_step in range(count)])
        named = ", ".join(str(int(index)) for index in indices[:_SAMPLES_NAMED])
        rest = f", ... {len(indices)} in all" if len(indices) > _SAMPLES_NAMED else ""
        return f"training samples {named}{rest}"
