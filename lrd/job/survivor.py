"""What a rank saves when another one is lost: the state after the last step that it has completed.

With data-parallel training every rank has the whole state in its memory, so the steps since the
newest checkpoint need not be lost (Gupta et al., Just-In-Time Checkpointing, EuroSys 2024).

A collective that fails does so before the optimizer's step: weights, momentum and schedule are
those of the last step's end. Only the network's buffers may have changed by then, in the forward
pass, and they are put back. If some of the ranks have completed the step and others have not, each
of them has a whole state, and the next start takes the newest.

Of each host one rank writes, into `run_dir` there; `lrd.checkpoint.transfer` brings the newest
checkpoint to rank 0.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lrd import console
from lrd.checkpoint import store
from lrd.checkpoint.run_dir import SURVIVORS_LOCK
from lrd.distributed.communication import describe_rank
from lrd.errors import UserError, describe_os_error
from lrd.job.state import Job

# A launcher gives its ranks 30 s to end. The write needs a part of it.
_SECONDS_TO_WAIT = 15.0
_SECONDS_BETWEEN_TRIES = 0.05


@contextmanager
def saving_in_background(job: Job | None, reason: str) -> Iterator[None]:
    """Call `save_state` in a thread that has ended when this context is left."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="survivor") as executor:
        saved = None if job is None else executor.submit(save_state, job, reason)
        yield
    if saved is not None:
        saved.result()


def save_state(job: Job, reason: str) -> None:
    """Save the state after `job.step` steps, unless there is such a checkpoint already.

    A line says why, if it cannot be saved.

    Args:
        reason: why the run ends, for the checkpoint.
    """
    if job.step == job.first_step:  # this start has completed no step
        return
    problem = _reason_to_save_nothing(job)
    if problem is not None:
        console.error(f"{describe_rank()}: the state after step {job.step} is not saved: {problem}")
        return

    if job.buffers.step == job.step:
        job.buffers.restore()
    state = job.train_state()
    rescued = {"rank": job.accelerator.process_index, "reason": reason}
    rescued["scalars"] = job.recorder.latest_scalars()
    state = replace(state, trainer={**state.trainer, "rescued": rescued})

    run_dir = Path(job.recipe.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with _one_rank_at_a_time(run_dir):
            if max(store.list_steps(run_dir), default=-1) < job.step:
                store.save(run_dir, state)
    except (UserError, OSError) as error:
        message = describe_os_error(error) if isinstance(error, OSError) else str(error)
        console.error(
            f"{describe_rank()}: the state after step {job.step} could not be saved: {message}"
        )
        return

    with suppress(OSError):
        section = job.recipe.checkpoint
        best_step = job.best["step"] if section.keep_best and job.best is not None else None
        store.delete_old(run_dir, section.keep_last, best_step)


def _reason_to_save_nothing(job: Job) -> str | None:
    """Why this rank cannot save the state; None if it can."""
    if job.is_sharded:
        return "each rank has a shard of it"
    if job.accelerator.device.type != "cpu":
        return "on a GPU a step may have failed before this is known"
    if job.is_updating:
        return "an update has failed in the middle"
    return None


@contextmanager
def _one_rank_at_a_time(run_dir: Path) -> Iterator[None]:
    """A context for one rank of a host, or of all hosts that share the folder.

    If another rank does not leave it in time, it is entered all the same: that rank may be stopped.
    A checkpoint is published by a rename, so each of them is whole.
    """
    deadline = time.monotonic() + _SECONDS_TO_WAIT
    with (run_dir / SURVIVORS_LOCK).open("a") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_SECONDS_BETWEEN_TRIES)
            except OSError:  # a file system without locks
                break
        yield
