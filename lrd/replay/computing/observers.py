"""What looks at the steps of a replay. The steps are those of `lrd.train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from lrd.job.state import Job
from lrd.optim import placement
from lrd.replay.computing import state as states
from lrd.tracking.recorder import Recorder


class Observer:
    """Looks at each step of a replay. Each rank has its own."""

    def before_update(self, job: Job) -> None:
        """Called before the optimizer's step, when the gradients are those it will see."""

    def after_update(self, job: Job) -> None:
        """Called after the optimizer's step, when `job.step` counts it, or where it was skipped."""

    def after_evaluation(self, job: Job) -> None:
        """Called after the evaluation and all else that is due after a step, at its very end."""

    def take_scalar(self, step: int, tag: str, value: float) -> None:
        """Called for each scalar that the run records."""

    def is_done(self) -> bool:
        """Whether what was looked for is found, so that the replay may end after this step."""
        return False


class ObservedRecorder(Recorder):
    """Computes the scalars that the run records, and hands them to observers.

    The training loop tells its recorder of each update; so the observers learn of it.
    """

    def __init__(self, job: Job, observers: Sequence[Observer]) -> None:
        super().__init__(job.raw_model, job.raw_optimizer, job.recipe.tracking.probes)
        self._job = job
        self._observers = observers

    def before_update(self, step: int) -> None:
        for observer in self._observers:
            observer.before_update(self._job)

    def record_update(self, step: int) -> None:
        for observer in self._observers:
            observer.after_update(self._job)

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        super()._add_scalar(tag, value, step)
        for observer in self._observers:
            observer.take_scalar(step, tag, value)


class Results:
    """The file in which rank 0 writes what a replay finds: a JSON object a line.

    Other ranks have one that writes nothing.
    """

    NAME = "results.jsonl"

    def __init__(self, out: Path, writes: bool) -> None:
        self._stream: IO[str] | None = None
        if writes:
            self._stream = (out / self.NAME).open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Write one result.

        Args:
            kind: what it is.
            **values: JSON.
        """
        if self._stream is not None:
            self._stream.write(json.dumps({"kind": kind, **values}) + "\n")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class DigestObserver(Observer):
    """Writes a digest of each tensor after each step."""

    def __init__(self, results: Results, first: int) -> None:
        self._results = results
        self._first = first

    def after_evaluation(self, job: Job) -> None:
        if job.step < self._first:
            return
        values = read_values(job)
        if job.accelerator.is_main_process:
            self._results.write("digests", step=job.step, digests=states.digest_tensors(values))


class RecordObserver(Observer):
    """Writes the scalars that the run records, as the float32 that a record has."""

    def __init__(self, results: Results, first: int) -> None:
        self._results = results
        self._first = first

    def take_scalar(self, step: int, tag: str, value: float) -> None:
        if step >= self._first:
            self._results.write("record", step=step, tag=tag, value=float(np.float32(value)))


class DumpObserver(Observer):
    """Saves all that a step has changed."""

    NAME = "state.pt"

    def __init__(self, step: int, out: Path) -> None:
        self._step = step
        self._out = out

    def after_evaluation(self, job: Job) -> None:
        if job.step != self._step:
            return
        values = read_values(job)
        if job.accelerator.is_main_process:
            torch.save(values, self._out / self.NAME)


class NormObserver(Observer):
    """Writes the norms of each parameter's gradient, update and weights, of each step."""

    def __init__(self, results: Results, first: int) -> None:
        self._results = results
        self._first = first
        self._old: dict[str, Tensor] = {}
        self._gradients: dict[str, float] = {}

    @torch.no_grad()
    def before_update(self, job: Job) -> None:
        if job.step + 1 < self._first:
            return
        for name, parameter in job.raw_model.named_parameters():
            self._old[name] = parameter.detach().clone()
            if parameter.grad is not None:
                self._gradients[name] = _norm(parameter.grad)

    @torch.no_grad()
    def after_update(self, job: Job) -> None:
        if not self._old:  # not observed, or skipped
            return
        norms = {
            name: {
                "gradient": self._gradients.get(name),
                "update": _norm(parameter.detach() - self._old[name]),
                "weights": _norm(self._old[name]),
            }
            for name, parameter in job.raw_model.named_parameters()
        }
        self._results.write("norms", step=job.step, norms=norms)
        self._old.clear()
        self._gradients.clear()


class NonfiniteObserver(Observer):
    """Finds the first value that is not finite, in the order in which a step computes them.

    Each rank looks at its own: inputs, weights and outputs of each module in the forward pass, its
    own gradients in the backward pass, and the weights after the update.

    Attributes:
        found: `step`, `rank`, `where`, and how many `elements` `of` how many are not finite; None:
            there was none so far.
    """

    def __init__(self, job: Job, first: int) -> None:
        self.found: dict[str, Any] | None = None
        self._job = job
        self._first = first
        for name, module in job.raw_model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._make_forward_hook(name))
        for name, parameter in job.raw_model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._make_gradient_hook(name))  # type: ignore[no-untyped-call]

    def _make_forward_hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not module.training:  # an evaluation
                return
            kind = type(module).__name__
            for value in inputs:
                self._look_at(value, f"the input of {name} ({kind})")
            for parameter_name, parameter in module.named_parameters(recurse=False):
                self._look_at(parameter, f"the weights {name}.{parameter_name}")
            self._look_at(output, f"the output of {name} ({kind})")

        return look

    def _make_gradient_hook(self, name: str) -> Any:
        def look(gradient: Tensor) -> None:
            self._look_at(gradient, f"the gradient of {name}")

        return look

    def after_update(self, job: Job) -> None:
        for name, parameter in job.raw_model.named_parameters():
            self._look_at(parameter, f"{name} after its update", step=job.step)

    def is_done(self) -> bool:
        return self.found is not None

    def _look_at(self, value: Any, where: str, step: int | None = None) -> None:
        step = self._job.step + 1 if step is None else step
        if placement.is_dtensor(value):
            value = value.to_local()  # each rank looks at its shard
        if self.found is not None or step < self._first or not _is_nonfinite(value):
            return
        self.found = {
            "step": step,
            "rank": self._job.accelerator.process_index,
            "where": where,
            "elements": int((~value.isfinite()).sum()),
            "of": value.numel(),
        }


def _is_nonfinite(value: Any) -> bool:
    is_float = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return is_float and not bool(value.isfinite().all())


def _norm(tensor: Tensor) -> float:
    """The norm of a whole tensor; all ranks call it together where it is sharded."""
    norm: Any = torch.linalg.vector_norm(tensor.float())
    return float(norm.full_tensor() if placement.is_dtensor(norm) else norm)


def read_values(job: Job) -> dict[str, Any]:
    """All that a step changes, by name. All ranks call it together where the network is sharded."""
    if job.has_local_momentum:  # between two checkpoints it is each rank's own
        return {name: tensor.detach() for name, tensor in job.raw_model.state_dict().items()}

    names = states.parameter_names(job.raw_model, job.raw_optimizer)
    return states.name_values(job.train_state(), names)
