"""Training: the loop and `main()`.

accelerate launch -m lrd.train RECIPE [section.key=value ...]

`take_step` and `end_step` also take the steps of a replay (`lrd.replay`), which has neither writer
nor tracker: what writes must look for them. A replay calls `save_checkpoint` too, where training
did, because momentum is averaged and replicas are compared there.
"""

from __future__ import annotations

from lrd import startup  # first, see there

# isort: split
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lrd import console
from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.mirror.uploader import UPLOAD_SECONDS_AT_END
from lrd.distributed import communication, roll_call
from lrd.distributed.accelerator import check_launch_variables, exit_process
from lrd.distributed.replica_check import compare_replicas
from lrd.distributed.roll_call import RollCall
from lrd.distributed.signals import StopSignals, end_with_launcher
from lrd.errors import (
    EXIT_OK,
    EXIT_STOPPED,
    RankError,
    RunError,
    UserError,
    describe_error,
    describe_os_error,
    first_line,
)
from lrd.host import is_out_of_memory
from lrd.job import sharding
from lrd.job.evaluation import evaluate_parts
from lrd.job.nonfinite import NonfiniteGuard
from lrd.job.profiler import profile_steps
from lrd.job.progress import Progress
from lrd.job.setup import set_up
from lrd.job.state import Job
from lrd.job.survivor import reason_to_save_nothing, save_state, saving_in_background
from lrd.recipe import named

startup.imports_are_done()

USAGE = "usage: python -m lrd.train RECIPE.yaml [section.key=value ...]"


def train(job: Job, signals: StopSignals) -> int:
    """Train until the last step or until a signal asks to stop.

    Returns:
        The exit status.
    """
    guard = NonfiniteGuard(job)

    job.write_status("running")

    # Left in reverse order: the trace is written, then the records, then the last checkpoint.
    with job.writer or nullcontext(), Progress(job) as progress, profile_steps(job) as profile_step:
        stop_signal = 0
        if job.is_evaluation_due:  # a signal ended the run before in the middle of it
            stop_signal = end_step(job, progress, signals, stop_signal)
        elif job.step >= job.total_steps:
            console.info(f"nothing left to do: {job.step} of {job.total_steps} steps are done")

        while job.step < job.total_steps and not stop_signal:
            stop_signal = take_step(job, guard, progress, signals)
            stop_signal = end_step(job, progress, signals, stop_signal)
            profile_step()

        return finish(job, progress, signals, stop_signal)


def take_step(job: Job, guard: NonfiniteGuard, progress: Progress, signals: StopSignals) -> int:
    """Take one optimizer step: batch, forward, backward, clip, masked update, schedule.

    Returns:
        A stop signal that a rank has received; 0: none.
    """
    job.compute_timer.begin_step()
    job.buffers.take(job.step)
    loss, accuracy = forward_backward(job)
    grad_norm = clip_gradients(job)

    stop_signal = 0
    is_skipped = False
    if exchanges_statistics(job):
        statistics = communication.gather_step_statistics(
            loss,
            grad_norm,
            accuracy,
            signals.received,
            has_checkpoint_error(job),
            job.batches.num_replaced,
            job.compute_timer.take(),
        )
        stop_signal = statistics.stop_signal
        if statistics.has_checkpoint_error:
            handle_checkpoint_error(job)
        is_skipped = not guard.may_step(statistics)
        job.replaced_images = job.replaced_before + statistics.num_replaced
        progress.take_statistics(statistics)

    # The lr of this step, before the schedule changes it.
    lrs = [float(group["lr"]) for group in job.raw_optimizer.param_groups]
    job.is_updating = True
    if not is_skipped:
        progress.before_update()
        with job.compute_timer.measure():
            job.accelerated_optimizer.step()  # the mask decides which elements move
        if job.weight_average is not None:
            job.weight_average.update(job.raw_model)
    job.accelerated_optimizer.zero_grad()

    job.schedule.step()
    job.step += 1
    job.roll_call.step = job.step
    if job.step % job.batches.steps_per_epoch == 0:
        job.schedule.end_epoch()
    job.is_updating = False

    progress.after_step(lrs, grad_norm, is_skipped)
    return stop_signal


def forward_backward(job: Job) -> tuple[Tensor, Tensor]:
    """Run all micro steps of one step.

    Leaves the gradient of the global batch's mean loss in the parameters.

    Returns:
        This rank's mean loss and its accuracy on its part of the batch, both float32 ().
    """
    accumulation_steps = job.recipe.trainer.accumulation_steps
    loss = torch.zeros((), device=job.accelerator.device)
    accuracy = torch.zeros((), device=job.accelerator.device)
    for micro_step in range(accumulation_steps):
        inputs, labels = job.load_micro_batch(job.step, micro_step)
        job.seed_layers(job.step, micro_step)

        # The gradients' mean over the ranks is taken in the last micro step alone.
        is_last = micro_step == accumulation_steps - 1
        with nullcontext() if is_last else job.no_sync():
            logits = job.ddp_model(inputs)  # (micro_batch, classes)
            scaled_loss = job.loss_function(logits, labels) / accumulation_steps
            if is_last:
                job.compute_timer.end_with_backward(scaled_loss)
            job.accelerator.backward(scaled_loss)
        loss += scaled_loss.detach()
        accuracy += measure_accuracy(logits.detach(), labels) / accumulation_steps

    # All ranks then have the state that a checkpoint has, also if rank 0 is lost.
    communication.broadcast_buffers(job.raw_model)
    return loss, accuracy


def measure_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The part of a batch in which the largest logit is that of the label, float32 ().

    Args:
        logits: float (micro_batch, classes).
        labels: int64 (micro_batch,); or of mixed images the probabilities of the classes, float32
            (micro_batch, classes), of which the largest counts.
    """
    if labels.is_floating_point():
        labels = labels.argmax(1)  # int64 (micro_batch,)
    is_correct = logits.argmax(1) == labels  # bool (micro_batch,)
    return is_correct.float().mean()


def clip_gradients(job: Job) -> Tensor:
    """Clip the gradient's norm, where the recipe asks for it.

    Returns:
        The norm before clipping, float32 (); zero in a step whose norm is not used.
    """
    max_norm = job.recipe.trainer.clip_norm
    if max_norm is None and not exchanges_statistics(job):
        return torch.zeros((), device=job.accelerator.device)

    if job.is_sharded:
        return sharding.clip_gradients(job.raw_model, max_norm)
    if max_norm is not None:
        norm: Tensor = job.accelerator.clip_grad_norm_(job.raw_model.parameters(), max_norm)
        return norm

    parameters = job.raw_model.parameters()
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def end_step(job: Job, progress: Progress, signals: StopSignals, stop_signal: int) -> int:
    """Do what is due after a step: evaluation, checkpoint, comparison of the replicas.

    Args:
        stop_signal: a signal that has been received already; 0: none. There is then no evaluation;
            it is made up for at the next start, before the first step.

    Returns:
        The signal that ends the run; 0: none. It may come during the evaluation.
    """
    is_new_best = False
    if job.is_evaluation_due and not stop_signal:
        with progress.pause("evaluation"):
            stop_signal, is_new_best = run_evaluation(job, signals)
    progress.show_epoch()

    if stop_signal or is_checkpoint_due(job, is_new_best):
        with progress.pause("checkpoints"):
            save_checkpoint(job)
    elif is_replica_check_due(job):
        compare_replicas(job.raw_model, job.raw_optimizer, job.step, job.has_local_momentum)

    return stop_signal


def run_evaluation(job: Job, signals: StopSignals) -> tuple[int, bool]:
    """Evaluate the network and let the schedule know the result.

    Returns:
        The signal that cut it short, 0: none; and whether the accuracy is the best so far.
    """
    metrics = evaluate_parts(job, stop_signal=lambda: signals.received)
    if metrics is None:
        return communication.gather_stop_signal(job.accelerator, signals.received), False

    job.last_eval_metrics = metrics
    job.last_eval_step = job.step
    # Not after a last step in the middle of an epoch: a longer run would not be evaluated there.
    if job.step % job.batches.steps_per_epoch == 0:
        job.schedule.end_evaluation(metrics)
    job.recorder.record_evaluation(job.step, metrics)

    if job.best_accuracy is not None and metrics[job.best_metric] <= job.best_accuracy:
        return 0, False
    job.best = {"step": job.step, "metric": job.best_metric, **metrics}
    return 0, True


def save_checkpoint(job: Job) -> None:
    """Compare the replicas and hand the state after `job.step` steps to the writer.

    The writer flushes the event file first: it must hold all that the checkpoint says is done.
    Where each rank has momentum of its own, training goes on from the mean that is saved, so a run
    that is resumed from it has the same bits.
    """
    if job.exchange is not None:
        job.exchange.average_momentum()
    if job.recipe.trainer.fingerprint_every:
        compare_replicas(job.raw_model, job.raw_optimizer, job.step)
    state = job.train_state()
    if job.writer is None or job.tracker is None:  # this is not the main process
        return

    if job.step == job.last_eval_step == job.total_steps:
        job.tracker.record_end(job.step)

    job.writer.save(state, job.kept_best_step)
    job.write_status("running")


def exchanges_statistics(job: Job) -> bool:
    """Whether the ranks exchange losses, norms and signals in the step that is being taken.

    Each exchange makes the CPU wait for the GPU, so on a GPU there are few.
    """
    step = job.step + 1  # `job.step` counts those that are done

    is_cheap = job.accelerator.device.type == "cpu"
    is_last = step == job.total_steps or is_multiple(step, job.batches.steps_per_epoch)
    is_tracked = is_multiple(step, job.recipe.tracking.every_steps)
    is_saved = is_multiple(step, job.recipe.checkpoint.every_steps)
    may_be_skipped = job.recipe.trainer.on_nonfinite == "skip"
    return is_cheap or is_last or is_tracked or is_saved or may_be_skipped


def is_multiple(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is done in this one. None and 0: never."""
    return bool(every) and step % (every or 1) == 0


def is_replica_check_due(job: Job) -> bool:
    """Whether the replicas' fingerprints are to be compared after this step."""
    return is_multiple(job.step, job.recipe.trainer.fingerprint_every)


def is_checkpoint_due(job: Job, is_new_best: bool) -> bool:
    """Whether the state after this step is to be saved."""
    if job.step == job.total_steps:
        return True
    if is_new_best and job.recipe.checkpoint.keep_best:
        return True

    every = job.recipe.checkpoint.every_steps
    interval = job.batches.steps_per_epoch if every is None else every
    return is_multiple(job.step, interval)


def has_checkpoint_error(job: Job) -> bool:
    """Whether a checkpoint could not be written since this was last handled."""
    return job.writer is not None and bool(job.writer.errors)


def handle_checkpoint_error(job: Job) -> None:
    """Report that a checkpoint could not be written, and stop on all ranks if the recipe says so.

    Raises:
        UserError: `checkpoint.on_error` is `stop`.
    """
    errors = communication.broadcast_from_main(
        [] if job.writer is None else job.writer.take_errors()
    )
    if job.recipe.checkpoint.on_error == "stop":
        raise UserError("\n".join(errors))

    if job.writer is not None:
        for line in errors:
            console.error(f"{line}; training goes on")


def finish(job: Job, progress: Progress, signals: StopSignals, stop_signal: int) -> int:
    """Wait for the last checkpoint and report how the run ended.

    Returns:
        The exit status.

    Raises:
        UserError: the last checkpoint could not be written, or not be uploaded and
            `checkpoint.on_error` is `stop`.
    """
    with progress.pause("checkpoints"):
        result: list[Any] = [[], True] if job.writer is None else list(job.writer.finish())
        errors, is_saved = communication.broadcast_from_main(result)
    if not is_saved:
        advice = f"the state after step {job.step} is not saved; start the same command again"
        raise UserError("\n".join([*errors, advice]))

    if job.writer is not None:
        for line in errors:
            console.error(line)

    wait_for_upload(job, signals, stop_signal)

    if job.step >= job.total_steps and not job.is_evaluation_due:
        job.write_status("finished")
        progress.print_summary()
        return EXIT_OK

    job.write_status("stopped")
    console.info(
        f"stopped by signal {stop_signal} after step {job.step}, saved; "
        "the same command goes on from here"
    )
    return EXIT_STOPPED


def wait_for_upload(job: Job, signals: StopSignals, stop_signal: int) -> None:
    """Wait a limited time until the last checkpoint is in the mirror, on all ranks.

    A rank that left earlier would make the launcher end the one that uploads.

    Raises:
        UserError: it is not there, and `checkpoint.on_error` is `stop`.
    """
    if job.recipe.checkpoint.mirror is None:
        return

    line = None
    if job.writer is not None and job.writer.uploader is not None:
        # The others wait in a collective, which fails after the recipe's timeout.
        limit = min(UPLOAD_SECONDS_AT_END, 30.0 * job.recipe.trainer.timeout_minutes)
        line = job.writer.uploader.finish(limit, lambda: bool(stop_signal or signals.received))
    line = communication.broadcast_from_main(line)
    if line is None:
        return
    if job.recipe.checkpoint.on_error == "stop":
        raise UserError(line)
    if job.writer is not None:
        console.error(line)


def run(recipe_path: str, overrides: list[str]) -> int:
    """Run one recipe from its file to the exit status.

    An error of a user, a disk or another rank is reported in one line each.
    """
    job = None
    calls = RollCall()
    with ExitStack() as stack:
        stack.enter_context(console.keep_log())
        try:
            job = set_up(recipes.load(recipe_path, overrides), calls)
            stack.callback(job.close)
            # Until the end of the run: a launcher sends SIGTERM when another rank dies.
            signals = stack.enter_context(StopSignals())
            return train(job, signals)
        except (Exception, SystemExit) as error:  # parts of the user's own may raise anything
            return report_failure(job, calls, error)


def report_failure(job: Job | None, calls: RollCall, error: Exception | SystemExit) -> int:
    """Report what went wrong, once among the ranks.

    Returns:
        The exit status.

    Raises:
        Exception: the error is a fault of lrd; it is raised again.
    """
    is_reporter = communication.should_report_errors()
    is_of_this_rank = False  # the others only see that this rank is gone
    status = UserError.status
    if isinstance(error, RankError):
        message = f"{describe_place(job)}: {error}"
        status = RunError.status
        is_of_this_rank = True
        if job is not None:
            save_state(job, reason=message)
    elif isinstance(error, UserError):
        message = str(error)
        status = error.status
    elif isinstance(error, OSError):
        message = describe_os_error(error)
        if job is not None and job.accelerator.num_processes > 1:
            message = f"{communication.describe_rank()}: {message}"
        is_of_this_rank = True
    elif is_out_of_memory(error):
        message = (
            f"{describe_place(job)}: out of memory ({first_line(error)}); "
            "a smaller data.batch_size, or more trainer.accumulation_steps, needs less"
        )
        status = RunError.status
        is_of_this_rank = True
    elif isinstance(error, RuntimeError) and roll_call.is_lost_rank(error):
        with saving_in_background(job, reason=first_line(error)):
            result = calls.call()
        missing = result.text or "a rank is lost, another one reports which"
        message = describe_lost_rank(job, error, missing)
        status = RunError.status
        is_reporter = result.is_reporter
    elif where := named.last_line_in_file(error):
        # Each rank reports it: what the user's code does may depend on the rank.
        console.log("".join(traceback.format_exception(error)))
        message = f"{describe_place(job)}: {describe_error(error)}{where}"
        status = RunError.status
        is_of_this_rank = True
    else:
        raise error

    if is_of_this_rank:
        calls.announce_end(message)
        is_reporter = True
    if job is not None:
        job.write_status("failed", message=message)
        for line in [] if job.writer is None else job.writer.take_errors():
            console.error(line)
    if is_reporter:
        console.error(message)
    else:
        console.log(f"error: {message}")
    return status


def describe_place(job: Job | None) -> str:
    """This rank, and what it is doing, for messages."""
    rank = communication.describe_rank()
    if job is None:
        return f"{rank}: before the first step"
    if job.is_evaluation_due:
        return f"{rank}: evaluation after step {job.step}"
    return f"{rank}: step {job.step + 1}"


def describe_lost_rank(job: Job | None, error: RuntimeError, missing: str) -> str:
    """Say which rank is lost, in which step, and where the same command goes on."""
    reason = roll_call.failure_reason(error)
    if job is None:
        return f"the ranks could not start together: {missing} ({reason})"

    steps = store.list_steps(Path(job.recipe.run_dir))
    if steps:
        start = f"from step {steps[-1]}"
    elif job.run_dir is not None:
        start = "from the beginning"
    else:
        start = "from rank 0's newest checkpoint"
    unsaved = reason_to_save_nothing(job)
    if unsaved is not None and job.step > job.first_step:
        start += f", because the state after step {job.step} is not saved: {unsaved}"
    return f"step {job.step + 1}: {missing} ({reason}); the same command goes on {start}"


def main(arguments: list[str] | None = None) -> None:
    """What each rank runs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help"):
        console.info(USAGE)
        sys.exit(EXIT_OK)
    if not arguments or arguments[0].startswith("-"):
        console.error(USAGE)
        sys.exit(UserError.status)

    run_rank(lambda: run(arguments[0], arguments[1:]))


def run_rank(action: Callable[[], int]) -> NoReturn:
    """Run what a rank does and end its process with the status that this returns.

    What goes wrong before there is a job is reported here.
    """
    startup.exempt_what_was_imported()
    try:
        check_launch_variables()
        end_with_launcher()
        status = action()
    except UserError as error:
        console.error(f"{error}")
        status = error.status
    except KeyboardInterrupt:  # while the job is set up; later StopSignals handles it
        status = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        status = RunError.status
    exit_process(status)


if __name__ == "__main__":
    main()
