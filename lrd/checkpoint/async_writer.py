"""Checkpoints written in the background.

The state is copied at the end of a step; a thread writes the copy to disk while training goes on.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from lrd import console
from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.mirror.claim import Claim
from lrd.checkpoint.mirror.uploader import UPLOAD_SECONDS_AT_ERROR, Uploader
from lrd.errors import UserError, describe_os_error


class Records(Protocol):
    """What a run has recorded, in files that must not know less than a checkpoint."""

    def flush(self) -> None:
        """Hand all records to the file system; an OSError says that they could not be written."""

    def sync(self) -> None:
        """Wait until all flushed records are on the disk."""


class AsyncWriter:
    """Writes the checkpoints of one run, one at a time. Rank 0 makes one; the others must not.

    Old checkpoints are deleted after each write. If that fails, or if an old checkpoint is found to
    be damaged, a line is printed; it is no error, because the newest checkpoint was published.

    Args:
        run_dir: the run directory that the checkpoints are written to.
        section: the recipe's `checkpoint`.
        records: of the run. Those up to a step are on the disk before the checkpoint of that step
            is.
        claim: the right to write to the mirror; None if the recipe names none.

    Attributes:
        uploader: copies what was published to the mirror; None without one.
        errors: a line for each write that failed; `take_errors` removes them.
        last_requested_step: the step of the latest `save`; None before the first.
        last_published_step: the step of the latest checkpoint that was published; None before the
            first.
        num_written: number of checkpoints that were published.
        seconds_writing: seconds that writing took, in the background or not.
    """

    def __init__(
        self,
        run_dir: Path,
        section: recipes.Checkpoint,
        records: Records,
        claim: Claim | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.section = section
        self.records = records

        self.errors: list[str] = []
        self.last_requested_step: int | None = None
        self.last_published_step: int | None = None
        self.num_written = 0
        self.seconds_writing = 0.0

        self._copy: Any = None  # reused by the next save: fresh memory costs more than the copying
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending_write: Future[None] | None = None

        self.uploader: Uploader | None = None
        if claim is not None:
            self.uploader = Uploader(claim, run_dir, section, self._report_upload)

    def __enter__(self) -> AsyncWriter:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish the write that is pending, whatever ended the run: its copy is complete."""
        self.wait()
        if self.uploader is None:
            return

        if error is not None:
            line = self.uploader.finish(UPLOAD_SECONDS_AT_ERROR, is_stopping=lambda: False)
            if line is not None:
                console.info(line)
        self.uploader.close()

    def save(self, state: store.TrainState, best_step: int | None) -> None:
        """Copy a state and have it written. Waits for the previous write if that is still pending.

        Args:
            state: what to save. It may change as soon as this method returns.
            best_step: the step of the best checkpoint, which is not deleted; None if there is none.
        """
        # The pending write reads the copy whose memory this save overwrites.
        self.wait()
        self.last_requested_step = state.step

        try:
            self.records.flush()
        except OSError as error:
            self.errors.append(
                f"{describe_os_error(error)}: "
                f"no checkpoint of step {state.step} without its records"
            )
            return

        self._copy = copy_to_cpu([state.model, state.optimizer, state.ema], self._copy)
        model, optimizer, ema = self._copy

        # Copies from a GPU are asynchronous; the next step must not change what they read.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()

        copied_state = store.TrainState(model, optimizer, state.trainer, ema, state.config)
        self._pending_write = self._executor.submit(self._write, copied_state, best_step)
        if not self.section.background:
            self.wait()

    def wait(self) -> None:
        """Wait until no write is pending."""
        pending_write = self._pending_write
        self._pending_write = None

        if pending_write is not None:
            pending_write.result()

    def finish(self) -> tuple[list[str], bool]:
        """Wait until no write is pending.

        Returns:
            The lines of `take_errors`, and whether the last state to be saved was published.
        """
        self.wait()
        return self.take_errors(), self.last_requested_step == self.last_published_step

    def take_errors(self) -> list[str]:
        """Return a line for each write that failed, and forget those lines."""
        lines = self.errors[:]
        del self.errors[: len(lines)]  # the writing thread may have added more meanwhile
        return lines

    def _write(self, state: store.TrainState, best_step: int | None) -> None:
        """Write and publish one checkpoint, then delete old ones. Runs in the thread."""
        start = time.perf_counter()
        try:
            self.records.sync()  # records first: a checkpoint says that its steps were recorded
            store.save(self.run_dir, state)
            self.last_published_step = state.step
            self.num_written += 1
        except UserError as error:
            self.errors.append(str(error))
        except OSError as error:
            self.errors.append(describe_os_error(error))
        else:
            if self.uploader is not None:
                self.uploader.offer(state.step, best_step)
            self._delete_old(best_step)
        self.seconds_writing += time.perf_counter() - start

    def _report_upload(self, line: str) -> None:
        """Report an upload that failed; it is an error of the run only if the recipe says so."""
        if self.section.on_error == "stop":
            self.errors.append(line)
        else:
            console.error(line)

    def _delete_old(self, best_step: int | None) -> None:
        """Delete old checkpoints and print what goes wrong. Runs in the thread."""
        try:
            notices = store.delete_old(self.run_dir, self.section.keep_last, best_step)
        except OSError as error:
            notices = [f"old checkpoints could not be deleted: {describe_os_error(error)}"]

        # The progress bar redraws from a thread of its own too: rich locks the console.
        for line in notices:
            console.info(line)


def copy_to_cpu(value: Any, older_copy: Any = None) -> Any:
    """Copy nested dicts, lists and tuples with each of their tensors on the CPU.

    Args:
        value: what to copy. Values that are neither a tensor nor a container are kept as they are.
        older_copy: a copy that is no longer needed. A tensor in it is overwritten and becomes part
            of the new copy if it is in the same place and has the same shape, dtype and strides.

    Returns:
        The copy. Tensors that come from a GPU are in pinned memory and may still be on their way.
    """
    if isinstance(value, Tensor):
        if not isinstance(older_copy, Tensor) or _layout(older_copy) != _layout(value):
            older_copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return older_copy.copy_(value.detach(), non_blocking=True)

    if isinstance(value, dict):
        older_dict = older_copy if isinstance(older_copy, dict) else {}
        return {key: copy_to_cpu(item, older_dict.get(key)) for key, item in value.items()}

    if isinstance(value, list | tuple):
        older_items: Any = [None] * len(value)
        if isinstance(older_copy, list | tuple) and len(older_copy) == len(value):
            older_items = older_copy
        pairs = zip(value, older_items, strict=True)
        return type(value)(copy_to_cpu(item, older_item) for item, older_item in pairs)

    return value


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors must have in common to share their memory."""
    return tensor.shape, tensor.dtype, tensor.stride()
