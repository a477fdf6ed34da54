"""Training: the loop and `main()`. What `accelerate launch -m lrd.train RECIPE [section.key=value ...]` starts."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext, suppress

import torch
from torch import Tensor, nn

from lrd import checkpoint, console, distributed
from lrd import recipe as recipes
from lrd.errors import EXIT_OK, EXIT_STOPPED, RunError, UserError, describe
from lrd.evaluate import evaluate
from lrd.job import Job, set_up
from lrd.progress import Progress


def train(job: Job) -> int:
    """The loop. Returns the exit status."""
    if job.step >= job.total_steps:
        console.say(f"nothing left to do: {job.step} of {job.total_steps} steps are done")
    with distributed.StopSignals() as signals:
        stop_signal = 0
        with Progress(job) as progress:
            while job.step < job.total_steps and not stop_signal:
                loss = forward_backward(job)
                grad_norm = clip(job)
                if is_boundary(job):
                    losses, stop_signal = distributed.exchange(loss, signals.received)
                    refuse_non_finite(losses, job.step + 1)
                    progress.loss = sum(losses) / len(losses)
                lrs = [float(group["lr"]) for group in job.optimizer.param_groups]
                job.prepared_optimizer.step()  # the mask decides which elements move
                job.prepared_optimizer.zero_grad()
                job.schedule.step()
                job.step += 1
                progress.step(lrs, grad_norm)

                with progress.pause():
                    epoch_ends, run_ends = job.step % job.batches.steps_per_epoch == 0, job.step == job.total_steps
                    if epoch_ends:
                        job.schedule.end_epoch()
                    is_new_best = run_evaluation(job) if is_evaluation_due(job) else False
                    if is_fingerprint_due(job):
                        distributed.compare_replicas(job.network, job.optimizer, job.step)
                    if run_ends or stop_signal or is_checkpoint_due(job, epoch_ends, is_new_best):
                        save_checkpoint(job)
        return finish(job, progress, stop_signal)


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


def clip(job: Job) -> Tensor | None:
    """Clip the gradient's norm. Returns the norm before, in steps that want it."""
    max_norm = job.recipe.trainer.clip_norm
    if max_norm is not None:
        norm: Tensor = job.accelerator.clip_grad_norm_(job.network.parameters(), max_norm)
        return norm
    if is_tracked(job):
        return nn.utils.get_total_norm([p.grad for p in job.network.parameters() if p.grad is not None])
    return None


def is_tracked(job: Job) -> bool:
    return (job.step + 1) % job.recipe.tracking.every_steps == 0


def is_boundary(job: Job) -> bool:
    """Whether the ranks look at losses and signals in this step: a CPU-GPU sync point, so not in each on a GPU."""
    step, every = job.step + 1, job.recipe.checkpoint.every_steps
    ends_here = step % job.batches.steps_per_epoch == 0 or step == job.total_steps
    return job.accelerator.device.type == "cpu" or ends_here or is_tracked(job) or bool(every and step % every == 0)


def refuse_non_finite(losses: list[float], step: int) -> None:
    bad = [f"rank {rank} ({loss})" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise RunError(f"step {step}: the loss is not finite on {', '.join(bad)}; nothing is saved after it")


def is_evaluation_due(job: Job) -> bool:
    epochs, rest = divmod(job.step, job.batches.steps_per_epoch)
    return job.step == job.total_steps or (rest == 0 and epochs % job.recipe.trainer.eval_every == 0)


def run_evaluation(job: Job) -> bool:
    """Evaluate and let the schedule know. Returns whether the accuracy is the best so far."""
    job.latest = evaluate(
        job.accelerator, job.network, job.dataset.test, job.batches.normalized, job.batches.batch_size
    )
    if job.step % job.batches.steps_per_epoch == 0:
        job.schedule.end_evaluation(job.latest)
    if job.tracker is not None:
        job.tracker.evaluation(job.step, job.latest)
    if job.best is not None and job.latest["accuracy"] <= job.best["accuracy"]:
        return False
    job.best = {"step": job.step, **job.latest}
    return True


def is_fingerprint_due(job: Job) -> bool:
    every = job.recipe.trainer.fingerprint_every
    return bool(every) and (job.step % every == 0 or job.step == job.total_steps)


def is_checkpoint_due(job: Job, epoch_ends: bool, is_new_best: bool) -> bool:
    every = job.recipe.checkpoint.every_steps
    due = epoch_ends if every is None else bool(every) and job.step % every == 0
    return due or (is_new_best and job.recipe.checkpoint.keep_best)


def save_checkpoint(job: Job) -> None:
    """Write the state after `job.step` steps; the event files first, so that they hold all it says is done."""

    def write() -> None:
        assert job.run_dir is not None
        assert job.tracker is not None
        if job.step >= job.total_steps:
            job.tracker.hyper_parameters(job.step, job.latest)
        job.tracker.flush()
        checkpoint.save(job.run_dir.path, job.state())
        section = job.recipe.checkpoint
        best_step = job.best["step"] if section.keep_best and job.best is not None else None
        checkpoint.retain(job.run_dir.path, section.keep_last, best_step)
        job.report("running")

    distributed.on_main(write)


def finish(job: Job, progress: Progress, stop_signal: int) -> int:
    """Close the books. Returns the exit status."""
    finished = job.step >= job.total_steps
    if job.tracker is not None:
        job.tracker.close()
    job.report("finished" if finished else "stopped")
    if finished:
        progress.summary()
        return EXIT_OK
    console.say(f"stopped by signal {stop_signal} after step {job.step}, saved; the same command goes on from here")
    return EXIT_STOPPED


def run(recipe_path: str, overrides: list[str]) -> int:
    """One run from recipe to exit status; what a user or a disk got wrong is one line each, on the main process."""
    job = None
    try:
        recipe = recipes.load(recipe_path, overrides)
        job = set_up(recipe)
        return train(job)
    except (UserError, OSError) as error:
        message = describe(error) if isinstance(error, OSError) else str(error)
        if job is not None:
            with suppress(UserError):  # what went wrong may be that nothing can be written
                job.report("failed", message=message)
        if distributed.speaks():
            for line in message.splitlines():
                console.complain(f"lrd: {line}")
        return UserError.status if isinstance(error, OSError) else error.status


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-"):
        console.complain("usage: python -m lrd.train RECIPE.yaml [section.key=value ...]")
        sys.exit(UserError.status)
    distributed.follow_launcher()
    distributed.leave(run(arguments[0], arguments[1:]))


if __name__ == "__main__":
    main()
