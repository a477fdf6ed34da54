"""Training: the loop and `main()`. What `accelerate launch -m lrd.train RECIPE [section.key=value ...]` starts."""

from __future__ import annotations

import signal
import sys
import traceback
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from lrd import checkpoint, console, distributed, peers
from lrd import recipe as recipes
from lrd.errors import EXIT_OK, EXIT_STOPPED, RunError, UserError, describe
from lrd.evaluate import evaluate
from lrd.guard import Guard
from lrd.job import Job, set_up
from lrd.peers import RollCall
from lrd.profile import profiled
from lrd.progress import Progress
from lrd.replicas import compare_replicas
from lrd.signals import StopSignals, follow_launcher


def train(job: Job, signals: StopSignals) -> int:
    """The loop. Returns the exit status."""
    guard = Guard(job)
    with job.writer or nullcontext(), Progress(job) as progress, profiled(job) as profile_step:
        stop_signal = end_step(job, progress, signals, 0) if job.is_evaluation_due else 0  # one that was cut short
        if job.step >= job.total_steps and not progress.steps:
            console.say(f"nothing left to do: {job.step} of {job.total_steps} steps are done")
        while job.step < job.total_steps and not stop_signal:
            guard.remember()
            loss = forward_backward(job)
            grad_norm = clip(job)
            is_good = True
            if is_boundary(job):
                seen = distributed.exchange(loss, grad_norm, signals.received, has_fault(job))
                stop_signal = seen.stop_signal
                progress.loss = sum(seen.losses) / len(seen.losses)
                is_good = guard.allows(seen)
                if seen.has_fault:
                    answer_fault(job)
            lrs = [float(group["lr"]) for group in job.optimizer.param_groups]
            if is_good:
                job.prepared_optimizer.step()  # the mask decides which elements move
            job.prepared_optimizer.zero_grad()
            job.schedule.step()
            job.step += 1
            if job.step % job.batches.steps_per_epoch == 0:
                job.schedule.end_epoch()
            progress.step(lrs, grad_norm, is_good)
            stop_signal = end_step(job, progress, signals, stop_signal)
            profile_step()
        return finish(job, progress, stop_signal)


def end_step(job: Job, progress: Progress, signals: StopSignals, stop_signal: int) -> int:
    """What every so often comes after a step: evaluation, comparison of the replicas, checkpoint.

    Returns the signal that ends the run, 0: none. An evaluation that a signal cut short is made up for at the next
    start, before the first step.
    """
    is_new_best = False
    if job.is_evaluation_due and not stop_signal:
        with progress.pause("evaluation"):
            stop_signal, is_new_best = run_evaluation(job, signals)
    if stop_signal or is_checkpoint_due(job, is_new_best):
        with progress.pause("checkpoints"):
            save_checkpoint(job)
    elif is_fingerprint_due(job):
        compare_replicas(job.network, job.optimizer, job.step)
    return stop_signal


def forward_backward(job: Job) -> Tensor:
    """All micro steps of one step. Leaves the gradient of the global batch's mean loss; returns this rank's loss."""
    count = job.recipe.trainer.accumulation_steps
    loss = torch.zeros((), device=job.accelerator.device)
    for micro_step in range(count):
        inputs, labels = job.batches(job.step, micro_step)
        if job.recipe.trainer.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        is_last = micro_step == count - 1
        with nullcontext() if is_last else job.accelerator.no_sync(job.model):
            micro_loss = nn.functional.cross_entropy(job.model(inputs), labels) / count
            job.accelerator.backward(micro_loss)
        loss += micro_loss.detach()
    return loss


def clip(job: Job) -> Tensor:
    """Clip the gradient's norm, where the recipe says so. Returns the norm before, zero in steps that need none."""
    max_norm = job.recipe.trainer.clip_norm
    if max_norm is not None:
        norm: Tensor = job.accelerator.clip_grad_norm_(job.network.parameters(), max_norm)
        return norm
    if is_boundary(job):
        return nn.utils.get_total_norm([p.grad for p in job.network.parameters() if p.grad is not None])
    return torch.zeros((), device=job.accelerator.device)


def is_boundary(job: Job) -> bool:
    """Whether the ranks look at losses, norms and signals in this step: a CPU-GPU sync point, so seldom on a GPU."""
    step, every = job.step + 1, job.recipe.checkpoint.every_steps
    is_cheap = job.accelerator.device.type == "cpu"
    is_last = step % job.batches.steps_per_epoch == 0 or step == job.total_steps
    is_looked_at = step % job.recipe.tracking.every_steps == 0 or job.recipe.trainer.on_nonfinite == "skip"
    return is_cheap or is_last or is_looked_at or bool(every and step % every == 0)


def has_fault(job: Job) -> bool:
    return job.writer is not None and bool(job.writer.faults)


def answer_fault(job: Job) -> None:
    """A checkpoint could not be written: say so and go on, or stop on all ranks, as the recipe says."""
    lines = distributed.from_main([] if job.writer is None else job.writer.take_faults())
    if job.recipe.checkpoint.on_error == "stop":
        raise UserError("\n".join(lines))
    if job.writer is not None:
        for line in lines:
            console.complain(f"lrd: {line}; training goes on")


def run_evaluation(job: Job, signals: StopSignals) -> tuple[int, bool]:
    """Evaluate and let the schedule know. Returns a signal that cut it short, and whether the accuracy is the best."""
    metrics = evaluate(
        *(job.accelerator, job.network, job.dataset.test, job.batches.normalized, job.batches.batch_size),
        received=lambda: signals.received,
    )
    if metrics is None:
        return distributed.any_signal(job.accelerator, signals.received), False
    job.latest, job.evaluated = metrics, job.step
    if job.step % job.batches.steps_per_epoch == 0:
        job.schedule.end_evaluation(metrics)
    if job.tracker is not None:
        job.tracker.evaluation(job.step, metrics)
    if job.best is not None and metrics["accuracy"] <= job.best["accuracy"]:
        return 0, False
    job.best = {"step": job.step, **metrics}
    return 0, True


def is_fingerprint_due(job: Job) -> bool:
    every = job.recipe.trainer.fingerprint_every
    return bool(every) and job.step % every == 0


def is_checkpoint_due(job: Job, is_new_best: bool) -> bool:
    every = job.recipe.checkpoint.every_steps
    interval = job.batches.steps_per_epoch if every is None else every
    due = bool(interval) and job.step % interval == 0
    return due or job.step == job.total_steps or (is_new_best and job.recipe.checkpoint.keep_best)


def save_checkpoint(job: Job) -> None:
    """Have the state after `job.step` steps written; the event files first, so that they hold all it says is done."""
    if job.recipe.trainer.fingerprint_every:
        compare_replicas(job.network, job.optimizer, job.step)
    if job.writer is None or job.tracker is None:
        return
    if job.step == job.evaluated == job.total_steps:
        job.tracker.hyper_parameters(job.step, job.latest)
    best_step = job.best["step"] if job.recipe.checkpoint.keep_best and job.best is not None else None
    job.writer.save(job.state(), best_step)
    job.report("running")


def finish(job: Job, progress: Progress, stop_signal: int) -> int:
    """Wait for what is being written and close the books. Returns the exit status.

    Raises:
        UserError: the last checkpoint could not be written.
    """
    with progress.pause("checkpoints"):
        lines, is_saved = distributed.from_main(([], True) if job.writer is None else job.writer.finish())
    if not is_saved:
        raise UserError(
            "\n".join([*lines, f"the state after step {job.step} is not saved; start the same command again"])
        )
    if job.writer is not None:
        for line in lines:
            console.complain(f"lrd: {line}")
    if job.step >= job.total_steps and not job.is_evaluation_due:
        job.report("finished")
        progress.summary()
        return EXIT_OK
    job.report("stopped")
    console.say(f"stopped by signal {stop_signal} after step {job.step}, saved; the same command goes on from here")
    return EXIT_STOPPED


def run(recipe_path: str, overrides: list[str]) -> int:
    """One run from recipe to exit status; what a user, a disk or a peer got wrong is one line each."""
    job = None
    with ExitStack() as stack:
        try:
            job = set_up(recipes.load(recipe_path, overrides))
            stack.callback(job.close)
            signals = stack.enter_context(StopSignals())  # until the end: a launcher sends one when a peer dies
            return train(job, signals)
        except (UserError, OSError, RuntimeError) as error:
            return fail(job, error)


def fail(job: Job | None, error: UserError | OSError | RuntimeError) -> int:
    """Say what went wrong, once among the ranks. Returns the exit status; a fault of the program is raised again."""
    speaks, status = distributed.speaks(), UserError.status
    if isinstance(error, UserError):
        message, status = str(error), error.status
    elif isinstance(error, OSError):
        message = describe(error)
    elif peers.is_lost_peer(error):
        missing = (RollCall() if job is None else job.roll_call).call()
        message, status, speaks = describe_loss(job, error, missing or ""), RunError.status, missing is not None
    else:
        raise error
    if job is not None:
        job.report("failed", message=message)
    for line in [] if job is None or job.writer is None else job.writer.take_faults():
        console.complain(f"lrd: {line}")
    for line in message.splitlines() if speaks else []:
        console.complain(f"lrd: {line}")
    return status


def describe_loss(job: Job | None, error: RuntimeError, missing: str) -> str:
    """A peer is gone or silent: which, when, and from where the same command goes on."""
    if job is None:
        return f"the ranks could not start together: {missing or 'no roll call yet'} ({peers.reason(error)})"
    steps = checkpoint.steps(Path(job.recipe.run_dir))
    nothing = "from the beginning" if job.run_dir is not None else "from rank 0's newest checkpoint"
    newest = f"from step {steps[-1]}" if steps else nothing
    return f"step {job.step + 1}: {missing} ({peers.reason(error)}); the same command goes on {newest}"


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-"):
        console.complain("usage: python -m lrd.train RECIPE.yaml [section.key=value ...]")
        sys.exit(UserError.status)
    try:
        follow_launcher()
        status = run(arguments[0], arguments[1:])
    except RunError as error:
        console.complain(f"lrd: {error}")
        status = error.status
    except KeyboardInterrupt:  # before the first step
        status = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        status = RunError.status
    distributed.leave(status)


if __name__ == "__main__":
    main()
