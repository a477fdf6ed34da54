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

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lrd import console
from lrd.checkpoint import store
from lrd.checkpoint.run_dir import SURVIVORS_LOCK, take_lock
from lrd.distributed.communication import describe_rank
from lrd.errors import UserError, describe_os_error
from lrd.job.state import Job

# A launcher gives its ranks 30 s to end. The write needs a part of it.
_SECONDS_TO_WAIT = 15.0


@contextmanager
def saving_in_background(job: Job | None, reason: str) -> Iterator[None]:
    """Call `save_state` in a thread that has ended when this context is left."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="survivor") as executor:
        saved = None if job is None else executor.submit(save_state, job, reason)
        yield
    if saved is not None:
        saved.result()


def save_state(job: Job, reason: str) -> None:
    """Save the state after `job.step` steps, if it is new, and there is no reason against it.

    A line says so if it could not be written.

    Args:
        reason: why the run ends, for the checkpoint.
    """
    if job.step == job.first_step or reason_to_save_nothing(job) is not None:
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
        store.delete_old(run_dir, job.recipe.checkpoint.keep_last, job.kept_best_step)


def reason_to_save_nothing(job: Job) -> str | None:
    """Why the ranks that are left cannot save the state; None if they can."""
    if job.is_sharded:
        return "each rank has a shard of it"
    if job.accelerator.device.type != "cpu":
        return "on a GPU a step may have failed before this is known"
    if job.has_local_momentum:
        return "the momentum of the lost rank's own gradients is lost with it"
    if job.is_updating:
        return "an update has failed in the middle"
    return None


@contextmanager
def _one_rank_at_a_time(run_dir: Path) -> Iterator[None]:
    """A context for one rank of a host, or of all hosts that share the folder.

    If another rank does not leave it in time, it is entered all the same: that rank may be stopped.
    A checkpoint is published by a rename, so each of them is whole.
    """
    with (run_dir / SURVIVORS_LOCK).open("a") as lock:
        take_lock(lock, _SECONDS_TO_WAIT)
        yield
