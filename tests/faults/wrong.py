"""Wrong numbers on one rank; changed recipes, data and ranks; restarts by the launcher."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lrd.checkpoint import store
from lrd.errors import EXIT_STOPPED, RunError, UserError

from .jobs import End, Failure, Job
from .lab import Lab, Outcome, Trial

AT = 33  # the step of the fault; the checkpoint before it is that of step 30
SKIP = "trainer.on_nonfinite=skip"


def numbers(lab: Lab) -> Iterator[Trial]:
    for rank in (0, 1, 2):
        words = (f"step {AT}", f"rank {rank} ", "the replicas differ")
        act = partial(stops, lab, 3, "bit", f"{AT}:{rank}", words)
        yield Trial("J one bit of a weight flipped on one rank of 3", act)

    # The replicas are compared before a checkpoint, and of two ranks none is in the majority.
    words = ("step 35", "the replicas differ", "cannot be told")
    overrides = ("trainer.fingerprint_every=100",)
    act = partial(stops, lab, 2, "bit", f"{AT}:1", words, overrides=overrides)
    yield Trial("J one bit of a weight flipped, found at the next checkpoint", act)

    for ranks in (1, 2, 3):
        for fault in ("nan_gradient", "nan_loss"):
            words = (f"step {AT}", f"rank {ranks - 1} ", "finite")
            act = partial(stops, lab, ranks, fault, f"{AT}:{ranks - 1}", words)
            yield Trial(f"J {fault} on one rank", act)

    words = ("step 1:", "mask_seed", "rank 1 ")
    act = partial(stops, lab, 3, "mask_seed", "1", words, fault_step=0)
    yield Trial("J another mask seed on one rank", act)

    for ranks in (1, 2):
        for fault in ("nan_gradient", "nan_loss"):
            act = partial(skips, ranks, fault, f"{AT}:{ranks - 1}")
            yield Trial(f"J {fault}, on_nonfinite=skip", act)


def stops(
    lab: Lab,
    ranks: int,
    fault: str,
    argument: str,
    words: tuple[str, ...],
    folder: Path,
    *,
    fault_step: int = AT,
    overrides: tuple[str, ...] = (),
) -> Outcome:
    """The run stops, and without the fault it goes on.

    Args:
        fault: see rank.py.
        argument: of the fault.
        words: that the line with the error contains.
        fault_step: no checkpoint may be of this step or a later one.
        overrides: of the recipe, in the start with the fault.
    """
    job = Job(folder, ranks)
    job.start(fault, argument, *overrides).wait_for_error(RunError.status, *words)
    late_steps = [step for step in store.list_steps(job.run_dir) if step >= fault_step]
    if late_steps:
        raise Failure(f"there are checkpoints of steps {late_steps}, after the fault")
    return lab.finish_and_compare(job, "stopped")


def skips(ranks: int, fault: str, argument: str, folder: Path) -> Outcome:
    """The step is skipped and counted, also by a run that is killed soon after it."""
    whole = Job(folder / "whole", ranks, SKIP)
    require_one_skipped_step(whole, fault, argument)

    parts = Job(folder / "parts", ranks, SKIP)
    start = parts.start(fault, argument)
    start.wait_for_step(AT + 1)
    start.signal("all")
    start.wait()
    require_one_skipped_step(parts, fault, argument)

    whole_end = End.read(whole.run_dir)
    parts_end = End.read(parts.run_dir)
    is_equal = whole_end == parts_end
    return Outcome(
        expected="skipped",
        lost=parts.steps_lost(),
        seconds=parts.seconds_to_running(),
        state_equal=whole_end.state == parts_end.state,
        records_equal=whole_end.records == parts_end.records,
        problem="" if is_equal else "the run in two parts differs from the run in one",
    )


def require_one_skipped_step(job: Job, fault: str, argument: str) -> None:
    """Run a job with a fault to its end, and raise Failure unless it skipped one step."""
    job.start(fault, argument).wait_for_success()
    if json.loads((job.run_dir / "status.json").read_text())["skipped"] != 1:
        raise Failure(f"status.json of {job.run_dir} does not count one skipped step")


def changes(lab: Lab) -> Iterator[Trial]:
    # Row -> fault, override, and what the error must name.
    refusals = {
        "K optimizer.lr changed": ("none", "optimizer.lr=0.01", "optimizer.lr: "),
        "K data.augment changed": ("none", "data.augment=none", "data.augment: "),
        "K another data set under the same name": ("relabel", "seed=0", "data.fingerprint: "),
    }
    for row, (fault, override, word) in refusals.items():
        for ranks in (1, 2):
            yield Trial(row, partial(refused, lab, ranks, fault, override, word))
    yield Trial("K a batch that the ranks cannot share", partial(batch_not_shared, lab))
    yield Trial("K another number of ranks, 2, 1, 2", other_ranks)


def refused(lab: Lab, ranks: int, fault: str, override: str, word: str, folder: Path) -> Outcome:
    """The start is refused, and the run goes on when the cause is removed.

    One line names what has changed, another tells the user how to go on.
    """
    job = Job(folder, ranks)
    start = job.start()
    start.wait_for_step(20)
    start.signal("all")
    start.wait()

    changed_start = job.start(fault, "-", override)
    changed_start.wait_for_error(UserError.status, word, num_lines=2)
    return lab.finish_and_compare(job, "refused")


def batch_not_shared(lab: Lab, folder: Path) -> Outcome:
    job = Job(folder, 3)
    start = job.start("none", "-", "data.batch_size=50")
    start.wait_for_error(UserError.status, "data.batch_size: is 50", "48 or 51")
    return lab.finish_and_compare(job, "refused")


def other_ranks(folder: Path) -> Outcome:
    """No step is lost or done twice.

    The final state is not compared: sums over other ranks differ in their last bits.
    """
    job = Job(folder, 2)
    for ranks, last_step in ((2, 20), (1, 40)):
        start = job.start(ranks=ranks)
        start.wait_for_step(last_step)
        start.signal("ranks", signal.SIGTERM)
        start.wait_for_error(EXIT_STOPPED)
    job.finish(max_starts=1)

    lost = job.steps_lost()
    has_every_step_once = End.read(job.run_dir).has_every_step_once()
    is_good = has_every_step_once and not any(lost)
    return Outcome(
        lost=lost,
        seconds=job.seconds_to_running(),
        records_equal=has_every_step_once,
        problem="" if is_good else f"steps lost: {lost}",
    )


def launcher_restarts(lab: Lab) -> Iterator[Trial]:
    for ranks, rank in ((2, 0), (2, 1), (3, 1)):
        row = "L SIGKILL of a rank under --max_restarts 3"
        yield Trial(row, partial(restarted, lab, ranks, rank))


def restarted(lab: Lab, ranks: int, rank: int, folder: Path) -> Outcome:
    """The launcher starts the ranks again, without a second command."""
    job = Job(folder, ranks)
    start = job.start(launcher_options=("--max_restarts", "3"))
    start.wait_for_step(lab.draw("restart", ranks, rank).randint(6, 45))
    start.signal(f"rank {rank}")
    start.wait_for_success()
    job.require_no_orphans()
    if len(start.lives()) < 2:
        raise Failure(f"the ranks were not started again: {start.tail()}")
    return lab.compare(job, Outcome())
