"""`trainer.profile`: torch's profiler over a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import profiler

from lrd import console
from lrd.errors import describe
from lrd.job import Job

WARM_UP = 3  # steps before those that are recorded


@contextmanager
def profiled(job: Job) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step. Each rank writes its own trace, on its own host."""
    steps, rank = job.recipe.trainer.profile, job.accelerator.process_index
    if steps is None:
        yield lambda: None
        return
    path = Path(job.recipe.run_dir) / "profile" / f"rank{rank}.json.gz"
    began = job.step

    def write(profile: profiler.profile) -> None:
        if job.step - began <= WARM_UP:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
        except OSError as error:  # a full disk is no reason to end the run
            console.complain(f"lrd: trainer.profile: {describe(error)}; training goes on")
        else:
            console.say(f"trace of {steps} step(s) at most: {path}; open it at https://ui.perfetto.dev")

    schedule = profiler.schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
    with profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
    if job.step - began <= WARM_UP:
        console.say(f"trainer.profile: no trace: {job.step - began} step(s), and the first {WARM_UP} are not recorded")
