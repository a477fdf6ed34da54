"""`trainer.profile`: torch's profiler over a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import profiler

from lrd import console
from lrd.errors import describe_os_error
from lrd.job.state import Job

WARM_UP_STEPS = 3  # before those that are recorded


@contextmanager
def profile_steps(job: Job, first: int | None = None) -> Iterator[Callable[[], None]]:
    """Record `trainer.profile` steps. Each rank writes its own trace, on its own host.

    Args:
        first: the number of the first one; None, and always: at least WARM_UP_STEPS are not
            recorded.

    Yields:
        A function to call after each step.
    """
    num_steps = job.recipe.trainer.profile
    if num_steps is None:
        yield lambda: None
        return

    rank = job.accelerator.process_index
    path = Path(job.recipe.run_dir) / "profile" / f"rank{rank}.json.gz"
    first_step = job.step
    num_unrecorded = WARM_UP_STEPS
    if first is not None:
        num_unrecorded = max(WARM_UP_STEPS, first - 1 - first_step)

    def has_recorded() -> bool:
        return job.step - first_step > num_unrecorded

    def write_trace(profile: profiler.profile) -> None:
        if not has_recorded():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
        except OSError as error:  # a full disk is no reason to end the run
            console.error(f"trainer.profile: {describe_os_error(error)}; training goes on")
        else:
            console.info(
                f"trace of at most {num_steps} step(s): {path}; open it at https://ui.perfetto.dev"
            )

    schedule = profiler.schedule(wait=num_unrecorded - 1, warmup=1, active=num_steps, repeat=1)
    with profiler.profile(schedule=schedule, on_trace_ready=write_trace) as profile:
        yield profile.step

    if not has_recorded():
        console.info(
            f"trainer.profile: no trace: the run took {job.step - first_step} step(s), "
            f"and the first {num_unrecorded} are not recorded"
        )
