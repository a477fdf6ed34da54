"""What each rank of a replay runs: the steps of a plan, again.

    python -m lrd.replay.computing.ranks PLAN.json

The steps are taken by the functions of the training loop. Nothing is written but the results.
"""

from __future__ import annotations

from lrd import startup  # noqa: F401  (first, see there; lrd.train says when it is done)

# isort: split
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch

from lrd import console
from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.distributed.communication import all_gather_values
from lrd.distributed.roll_call import RollCall
from lrd.distributed.signals import StopSignals
from lrd.errors import EXIT_OK, EXIT_STOPPED, RunError, UserError
from lrd.job.nonfinite import NonfiniteGuard
from lrd.job.profiler import profile_steps
from lrd.job.progress import Progress
from lrd.job.setup import load_checkpoint, set_up_replay
from lrd.job.state import Job, describe_changes
from lrd.replay.computing import state as states
from lrd.replay.computing.observers import (
    DigestObserver,
    DumpObserver,
    NonfiniteObserver,
    NormObserver,
    ObservedRecorder,
    Observer,
    RecordObserver,
    Results,
    read_values,
)
from lrd.replay.computing.plan import SAVED, Leg, Plan
from lrd.replay.computing.samples import save_samples
from lrd.train import end_step, report_failure, run_evaluation, run_rank, take_step

USAGE = "usage: python -m lrd.replay.computing.ranks PLAN.json, as `lrd replay` starts it"


def run_plan(path: Path) -> int:
    """Compute all legs of a plan.

    Returns:
        The exit status.
    """
    plan = Plan.read(path)
    calls = RollCall()
    job = None
    with ExitStack() as stack:
        stack.enter_context(console.keep_log())
        try:
            job = build_job(plan, calls)
            stack.callback(job.close)
            signals = stack.enter_context(StopSignals())
            return run_legs(job, plan, signals)
        except (Exception, SystemExit) as error:  # parts of the user's own may raise anything
            return report_failure(job, calls, error)


def build_job(plan: Plan, calls: RollCall) -> Job:
    """The job of a plan's legs, with the state in which the first one begins."""
    leg = plan.legs[0]
    _require_ranks(leg)
    recipe = parse_recipe(leg, Path(plan.out), plan.watch.profile)
    checkpoint = find_checkpoint(leg, Path(plan.out))

    job = set_up_replay(recipe, calls, checkpoint)
    if leg.threads is not None:
        torch.set_num_threads(leg.threads)
    return job


def _require_ranks(leg: Leg) -> None:
    """Refuse the ranks of a launcher of the user's own if there are more or fewer than in the run.

    Raises:
        UserError: the same on every rank.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != leg.ranks:
        raise UserError(
            f"the launcher has started {started} rank(s); steps {leg.first + 1} to {leg.last} are "
            f"computed on {leg.ranks}"
        )


def parse_recipe(leg: Leg, out: Path, profile: bool) -> recipes.Recipe:
    """The recipe of a leg. What a replay writes goes to `out`."""
    values = {**leg.recipe, "run_dir": str(out)}
    trainer = {**values["trainer"], "device": "cpu" if leg.on_cpu else "cuda"}
    checkpoint = {**values.get("checkpoint", {}), "mirror": None}
    checkpoint["allow_changed"] = True  # what differs is refused by `_require_same_settings`
    num_observed = leg.last - leg.observes_from + 1
    trainer["profile"] = max(1, num_observed) if profile else None
    values |= {"trainer": trainer, "checkpoint": checkpoint}
    return recipes.parse(values, "the run's recipe")


def find_checkpoint(leg: Leg, out: Path) -> Path | None:
    """The checkpoint that a leg begins with; None before the first step."""
    if leg.checkpoint == SAVED:
        return store.checkpoint_path(out, leg.first)
    return None if leg.checkpoint is None else Path(leg.checkpoint)


def run_legs(job: Job, plan: Plan, signals: StopSignals) -> int:
    """Take the steps of all legs and write what was observed.

    Returns:
        The exit status.
    """
    out = Path(plan.out)
    is_main = job.accelerator.is_main_process
    results = Results(out, writes=is_main)
    num_steps = sum(leg.last - leg.first for leg in plan.legs)
    meter = console.ProgressMeter(f"replaying {plan.name}", num_steps, has_last_line=False)
    start = time.perf_counter()
    if plan.watch.samples and is_main:
        save_samples(job, plan.watch.samples, out)
    first_profiled = plan.legs[0].observes_from if plan.watch.profile else None
    with closing(results), meter, profile_steps(job, first_profiled) as profile_step:
        progress = _ShownProgress(meter, profile_step)
        for number, leg in enumerate(plan.legs):
            if number:
                begin_leg(job, leg, out)
            _require_same_settings(job, leg, out, plan.name)

            observers = make_observers(job, plan, leg, results)
            try:
                if not replay_steps(
                    job,
                    leg.last,
                    signals,
                    [*observers, progress],
                    ends_early=plan.watch.nonfinite,
                    evaluates_last=not leg.skips_last_evaluation,
                ):
                    return EXIT_STOPPED
            except RunError as error:
                if not plan.watch.nonfinite:
                    raise
                write_nonfinite(observers, results, str(error))
                break
            if plan.watch.nonfinite and write_nonfinite(observers, results):
                break
            if leg.evaluates_at_end and job.last_eval_step != job.step:
                run_evaluation(job, signals)
            end_leg(job, leg, out, results)
        results.write("time", steps=progress.num_steps, seconds=time.perf_counter() - start)
    return EXIT_OK


def write_nonfinite(
    observers: Sequence[Observer], results: Results, message: str | None = None
) -> bool:
    """Write the first value that was not finite, of all ranks. They call it together.

    Args:
        message: what the run itself says of it, if that ended the step.

    Returns:
        Whether there was one.
    """
    (observer,) = (each for each in observers if isinstance(each, NonfiniteObserver))
    found = [values for values in all_gather_values(observer.found) if values is not None]
    if not found and message is None:
        return False
    first = min(found, key=lambda values: int(values["step"])) if found else {}
    results.write("nonfinite", message=message, **first)
    return True


class _ShownProgress(Observer):
    """Shows how many steps are done, and tells the profiler."""

    def __init__(self, meter: console.ProgressMeter, profile_step: Callable[[], None]) -> None:
        self._meter = meter
        self._profile_step = profile_step
        self.num_steps = 0

    def after_evaluation(self, job: Job) -> None:
        self.num_steps += 1
        self._meter.update(self.num_steps, f"step {job.step}")
        self._profile_step()


def begin_leg(job: Job, leg: Leg, out: Path) -> None:
    """Go on with the state in which a leg begins."""
    checkpoint = find_checkpoint(leg, out)
    assert checkpoint is not None  # see Leg.can_follow
    load_checkpoint(job, checkpoint)


def _require_same_settings(job: Job, leg: Leg, out: Path, run_name: str) -> None:
    """Refuse to compute with other data, or with a recipe that was edited.

    Args:
        run_name: of the run.

    Raises:
        UserError: a setting that affects the results is not that of the checkpoint.
    """
    now = job.result_settings
    saved = leg.settings
    checkpoint = find_checkpoint(leg, out)
    if saved is None and checkpoint is not None and not leg.has_other_recipe:
        saved = store.read_trainer(checkpoint).get("identity")
    changes = describe_changes(saved or now, now, run_name)
    if changes:
        raise UserError("\n".join([*changes, "a replay needs what the run had"]))


def make_observers(job: Job, plan: Plan, leg: Leg, results: Results) -> list[Observer]:
    """The observers that a plan asks for."""
    watch = plan.watch
    first = leg.observes_from
    observers: list[Observer] = []
    if watch.records:
        observers.append(RecordObserver(results, first))
    if watch.digests:
        observers.append(DigestObserver(results, first))
    if watch.dump_at is not None:
        observers.append(DumpObserver(watch.dump_at, Path(plan.out)))
    if watch.norms:
        observers.append(NormObserver(results, first))
    if watch.nonfinite:
        observers.append(NonfiniteObserver(job, first))
    return observers


def replay_steps(
    job: Job,
    last: int,
    signals: StopSignals,
    observers: Sequence[Observer] = (),
    ends_early: bool = False,
    evaluates_last: bool = True,
) -> bool:
    """Take steps until `last` are done, as training takes them.

    Args:
        observers: look at each step.
        ends_early: whether an observer of any rank may end it.
        evaluates_last: whether an evaluation that is due after the last step is made.

    Returns:
        Whether all were taken; False if a signal asked to stop.
    """
    job.recorder = ObservedRecorder(job, observers)
    guard = NonfiniteGuard(job)
    progress = Progress(job)

    # An evaluation that a checkpoint did not contain was made up for by the next start.
    stop_signal = 0
    if job.is_evaluation_due and job.step > 0:
        stop_signal = end_step(job, progress, signals, stop_signal)

    while job.step < last and not stop_signal:
        stop_signal = take_step(job, guard, progress, signals)
        if job.step == last and not evaluates_last and not stop_signal:
            end_step(job, progress, signals, signal.SIGTERM)  # as a run that is asked to stop
        else:
            stop_signal = end_step(job, progress, signals, stop_signal)
        for observer in observers:
            observer.after_evaluation(job)
        if ends_early and any(all_gather_values(any(observer.is_done() for observer in observers))):
            break
    return not stop_signal


def end_leg(job: Job, leg: Leg, out: Path, results: Results) -> None:
    """Compare the state with that of the run, and save it for what comes next."""
    if job.exchange is not None:  # as it is done at each checkpoint
        job.exchange.average_momentum()
    if leg.expected is not None:
        values = read_values(job)
        if job.accelerator.is_main_process:
            compare_with_checkpoint(job, values, Path(leg.expected), leg, results)
    if leg.saves:
        state = job.train_state()
        if job.accelerator.is_main_process:
            state = replace(state, trainer={**state.trainer, "starts": []})
            store.save(out, state)


def compare_with_checkpoint(
    job: Job, values: dict[str, object], path: Path, leg: Leg, results: Results
) -> None:
    """Write whether the state is that of a checkpoint, and where it first differs."""
    names = states.parameter_names(job.raw_model, job.raw_optimizer)
    expected = states.name_values(store.read(path), names)
    difference = states.find_difference(values, expected)
    results.write(
        "compared",
        step=job.step,
        first=leg.first,
        difference=None if difference is None else difference.as_json(),
        text=None if difference is None else difference.describe(),
    )


def main(arguments: list[str] | None = None) -> None:
    """What each rank runs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        console.error(USAGE)
        sys.exit(UserError.status)
    if not Path(arguments[0]).is_file():
        console.error(
            f"{arguments[0]}: no such file; the hosts of a replay share the run directory"
        )
        sys.exit(UserError.status)

    run_rank(lambda: run_plan(Path(arguments[0])))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no trace-back for a Ctrl-C
    main()
