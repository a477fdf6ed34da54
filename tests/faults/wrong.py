"""Wrong numbers on one rank; recipes, data and ranks that are others than before; restarts by the launcher."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lrd import checkpoint

from .jobs import End, Failure, Job
from .lab import Lab, Outcome, Trial

RUN_ERROR, USER_ERROR, STOPPED = 1, 2, 75
AT = 33  # the step of the fault; the checkpoint before it is that of step 30
SKIP = "trainer.on_nonfinite=skip"


def numbers(lab: Lab) -> Iterator[Trial]:
    at_once, seldom = f"step {AT}", "step 35"
    for rank in (0, 1, 2):
        words = (at_once, f"rank {rank} ", "the replicas differ")
        yield Trial("J one bit of a weight flipped, rank of 3", partial(stops, lab, 3, "bit", f"{AT}:{rank}", words))
    words, overrides = (seldom, "the replicas differ", "cannot be told"), ("trainer.fingerprint_every=100",)
    flipped = partial(stops, lab, 2, "bit", f"{AT}:1", words, overrides=overrides)
    yield Trial("J one bit of a weight flipped, found at the next checkpoint", flipped)
    for ranks in (1, 2, 3):
        for fault in ("nan_gradient", "nan_loss"):
            words = (at_once, f"rank {ranks - 1} ", "finite")
            yield Trial(f"J {fault} on one rank", partial(stops, lab, ranks, fault, f"{AT}:{ranks - 1}", words))
    words = ("step 1:", "mask_seed", "rank 1 ")
    yield Trial("J another mask seed on one rank", partial(stops, lab, 3, "mask_seed", "1", words, before=0))
    for ranks in (1, 2):
        for fault in ("nan_gradient", "nan_loss"):
            yield Trial(f"J {fault}, on_nonfinite=skip", partial(skips, ranks, fault, f"{AT}:{ranks - 1}"))


def stops(
    lab: Lab, ranks: int, fault: str, argument: str, words: tuple[str, ...], folder: Path, *,
    before: int = AT, overrides: tuple[str, ...] = (),
) -> Outcome:  # fmt: skip
    """It stops, with a line that has the words, and with no checkpoint after the fault; without it the run goes on."""
    job = Job(folder, ranks)
    job.start(fault, argument, *overrides).expect(RUN_ERROR, *words)
    later = [step for step in checkpoint.steps(job.run_dir) if step >= before]
    if later:
        raise Failure(f"there are checkpoints of steps {later}, after the fault")
    return lab.compared(job, Outcome(expected="stopped", starts=job.finish(most_starts=1)))


def skips(ranks: int, fault: str, argument: str, folder: Path) -> Outcome:
    """The step is skipped and counted; killed soon after it and started again, the run ends the same."""
    whole, parts = (Job(folder / name, ranks, SKIP) for name in ("whole", "parts"))
    for job in (whole, parts):
        start = job.start(fault, argument)
        if job is parts:
            start.reach(AT + 1)
            start.signal("all")
            start.wait()
            start = job.start(fault, argument)
        if start.wait():
            raise Failure(start.tail())
        if json.loads((job.run_dir / "status.json").read_text())["skipped"] != 1:
            raise Failure(f"status.json of {job.run_dir} does not say that a step was skipped")
    ends = End.of(whole.run_dir), End.of(parts.run_dir)
    outcome = Outcome(expected="skipped", lost=parts.steps_lost(), seconds=parts.seconds_to_running())
    outcome.state_equal, outcome.records_equal = ends[0].state == ends[1].state, ends[0].records == ends[1].records
    outcome.problem = "" if ends[0] == ends[1] else "the run in two parts differs from the run in one"
    return outcome


def changes(lab: Lab) -> Iterator[Trial]:
    refusals = {
        "K optimizer.lr changed": ("none", "optimizer.lr=0.01", "optimizer.lr: "),
        "K data.augment changed": ("none", "data.augment=none", "data.augment: "),
        "K another data set under the same name": ("relabel", "seed=0", "data.fingerprint: "),
    }
    for row, (fault, override, word) in refusals.items():
        for ranks in (1, 2):
            yield Trial(row, partial(refused, lab, ranks, fault, override, word))
    yield Trial("K a batch that the ranks cannot share", partial(not_shared, lab))
    yield Trial("K another number of ranks, 2, 1, 2", other_ranks)


def refused(lab: Lab, ranks: int, fault: str, override: str, word: str, folder: Path) -> Outcome:
    """In a line that names the key, and one that says how to go on; the run goes on when the cause is gone."""
    job = Job(folder, ranks)
    start = job.start()
    start.reach(20)
    start.signal("all")
    start.wait()
    job.start(fault, "-", override).expect(USER_ERROR, word, lines=2)
    return lab.compared(job, Outcome(expected="refused", starts=job.finish(most_starts=1)))


def not_shared(lab: Lab, folder: Path) -> Outcome:
    job = Job(folder, 3)
    job.start("none", "-", "data.batch_size=50").expect(USER_ERROR, "data.batch_size: is 50", "48 or 51")
    return lab.compared(job, Outcome(expected="refused", starts=job.finish(most_starts=1)))


def other_ranks(folder: Path) -> Outcome:
    """The numbers are others in the last bits, for the sums are taken otherwise; no step is lost or done twice."""
    job = Job(folder, 2)
    for ranks, until in ((2, 20), (1, 40)):
        start = job.start(ranks=ranks)
        start.reach(until)
        start.signal("ranks", signal.SIGTERM)
        start.expect(STOPPED)
    job.finish(most_starts=1)
    outcome = Outcome(lost=job.steps_lost(), seconds=job.seconds_to_running())
    outcome.records_equal = End.of(job.run_dir).has_every_step_once()
    outcome.problem = "" if outcome.records_equal and not any(outcome.lost) else f"steps lost: {outcome.lost}"
    return outcome


def launcher_restarts(lab: Lab) -> Iterator[Trial]:
    for ranks, rank in ((2, 0), (2, 1), (3, 1)):
        yield Trial("L SIGKILL of a rank under --max_restarts 3", partial(restarted, lab, ranks, rank))


def restarted(lab: Lab, ranks: int, rank: int, folder: Path) -> Outcome:
    """The launcher starts the ranks anew: no second command."""
    job = Job(folder, ranks)
    start = job.start(launcher=("--max_restarts", "3"))
    start.reach(lab.draw("restart", ranks, rank).randint(6, 45))
    start.signal(f"rank {rank}")
    if start.wait():
        raise Failure(start.tail())
    job.refuse_orphans()
    if len(start.lives()) < 2:
        raise Failure(f"the ranks were not started again: {start.tail()}")
    return lab.compared(job, Outcome())
