"""Checkpoints in the background: the state is copied at a step's end and written while training goes on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lrd import checkpoint
from lrd import recipe as recipes
from lrd.errors import UserError, describe
from lrd.events import EventFile


class Writer:
    """Writes the checkpoints of one run, one at a time. For one rank only.

    Args:
        run_dir: where they lie.
        section: the recipe's `checkpoint`.
        events: what it says is done must be on the disk when a checkpoint is.

    Attributes:
        faults: a line for each write that failed, until they are taken.
        requested, published: the step that was last to be saved, and the one that last was; None: none yet.
        written: how many were published.
        working: seconds that the writing took, in the background or not.
    """

    def __init__(self, run_dir: Path, section: recipes.Checkpoint, events: EventFile) -> None:
        self.run_dir, self.section, self.events = run_dir, section, events
        self.faults: list[str] = []
        self.requested: int | None = None
        self.published: int | None = None
        self.written = 0
        self.working = 0.0
        self._copy: Any = None  # kept from write to write: fresh memory costs more than the copying
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """What is under way is whole, whatever ended the run, and gets written."""
        self.wait()

    def save(self, state: checkpoint.State, best_step: int | None) -> None:
        """Copy the state and have it written; waits for the write before, where that is still under way.

        Args:
            best_step: the checkpoint that retention spares.
        """
        self.wait()
        self.requested = state.step
        try:
            self.events.flush()
            model, optimizer = self._copy = copied([state.model, state.optimizer], self._copy)
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()
            copy = checkpoint.State(model, optimizer, state.trainer)
            self._under_way = self._thread.submit(self._write, copy, best_step)
            if not self.section.background:
                self.wait()
        except OSError as error:
            self.faults.append(f"{describe(error)}: no checkpoint of step {state.step} without TensorBoard's records")

    def wait(self) -> None:
        """Until nothing is under way."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def finish(self) -> tuple[list[str], bool]:
        """Wait; then the faults, and whether the step that was last to be saved is."""
        self.wait()
        return self.take_faults(), self.requested == self.published

    def take_faults(self) -> list[str]:
        taken = self.faults[:]  # the writing thread may add more
        del self.faults[: len(taken)]
        return taken

    def _write(self, state: checkpoint.State, best_step: int | None) -> None:
        began = time.perf_counter()
        try:
            self.events.sync()
            checkpoint.save(self.run_dir, state)
            self.published = state.step
            self.written += 1
            self.faults += checkpoint.retain(self.run_dir, self.section.keep_last, best_step)
        except UserError as error:
            self.faults.append(str(error))
        except OSError as error:
            self.faults.append(describe(error))
        self.working += time.perf_counter() - began


def copied(value: Any, into: Any = None) -> Any:
    """A copy of nested dicts and lists with each tensor on the CPU, in the memory of an older copy where that fits."""
    if isinstance(value, Tensor):
        if not isinstance(into, Tensor) or _layout(into) != _layout(value):
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return into.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        older = into if isinstance(into, dict) else {}
        return {key: copied(item, older.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        older_items = into if isinstance(into, list | tuple) and len(into) == len(value) else [None] * len(value)
        return type(value)(copied(item, older) for item, older in zip(value, older_items, strict=True))
    return value


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()
