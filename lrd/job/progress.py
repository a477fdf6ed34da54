"""What a run shows: the live line, TensorBoard's records, and the table at the end."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from lrd import console
from lrd.checkpoint import store
from lrd.job.state import Job
from lrd.optim.dropout import get_lr_dropout


class Progress:
    """Counts and shows what this start of the run does.

    Attributes:
        loss: the latest global mean loss.
        accuracy: the latest accuracy over a global batch.
        num_steps: steps that this start has taken.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loss = float("nan")
        self.accuracy = float("nan")
        self.num_steps = 0

        self._began = time.perf_counter()
        self._paused = {
            "evaluation": 0.0,
            "checkpoints": 0.0,
        }  # seconds in which training stood still
        self._speed = _Speed(job.batches.batch_size, self._began)
        self._meter = console.ProgressMeter("training", job.total_steps, job.step)

    def __enter__(self) -> Progress:
        self._meter.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._meter.__exit__(*exception)
        if self.job.tracker is not None:
            with suppress(OSError):  # a full disk has been reported
                self.job.tracker.flush()

    @contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Count the time in this context as `reason` and not as training."""
        start = time.perf_counter()
        yield
        self._paused[reason] += time.perf_counter() - start

    def before_step(self) -> None:
        """Keep what a record of the step needs of the state before it."""

    def after_step(self, lrs: list[float], grad_norm: Tensor, is_skipped: bool) -> None:
        """Record and show a step.

        Args:
            lrs: the lr that each parameter group had in it.
            grad_norm: float32 ().
            is_skipped: whether the optimizer did not take the step.
        """
        job = self.job
        self.num_steps += 1
        if job.tracker is None:  # this is not the main process
            return

        job.tracker.record_probes(job.step, lrs, moved=not is_skipped)
        if job.step % job.recipe.tracking.every_steps != 0:
            return

        images_per_second = self._speed.measure(self.num_steps, sum(self._paused.values()))
        scalars = {
            "train/loss": self.loss,
            "train/accuracy": self.accuracy,
            "train/images_per_second": images_per_second,
            "train/grad_norm": float(grad_norm),
        }
        if job.recipe.trainer.on_nonfinite == "skip":
            scalars["train/skipped"] = job.skipped_steps
        job.tracker.record_step(job.step, lrs, scalars, moved=not is_skipped)
        self._show(lrs[0], images_per_second)

    def _show(self, lr: float, images_per_second: float) -> None:
        job = self.job
        accuracy = f"acc {job.last_eval_metrics['accuracy']:.4f}" if job.last_eval_metrics else ""
        figures = f"loss {self.loss:.4f} {accuracy} lr {lr:.3g} {images_per_second:.0f} images/s"
        if job.skipped_steps:
            figures += f" {job.skipped_steps} skipped"

        epochs = job.recipe.trainer.epochs
        epoch = min(epochs, 1 + job.step // job.batches.steps_per_epoch)
        self._meter.update(job.step, figures, f"epoch {epoch}/{epochs} step")

    def print_summary(self) -> None:
        """Print a table of what the run did, and the command to look at it."""
        job = self.job
        if job.run_dir is None:
            return

        rows = [*self._describe_job(), *self._describe_time(), *self._describe_results()]
        console.table(str(job.run_dir.path), ["", ""], rows)
        console.info(
            f"look at it: {_tensorboard_command()} --logdir {job.run_dir.path.parent} "
            "--samples_per_plugin scalars=100000"
        )

    def _describe_job(self) -> list[tuple[str, str]]:
        job = self.job
        num_parameters = sum(parameter.numel() for parameter in job.raw_model.parameters())
        num_train = len(job.dataset.train)
        num_test = len(job.dataset.test)
        num_groups = len(job.raw_optimizer.param_groups)
        ranks = f"{job.accelerator.num_processes} on {job.accelerator.device.type}"
        if job.is_sharded:
            ranks += ", each with a shard of the network and of the optimizer's state"
        return [
            ("network", f"{job.recipe.model.arch}, {num_parameters:,} parameters"),
            ("data", f"{job.recipe.data.dataset}, {num_train:,} + {num_test:,} images"),
            ("ranks", ranks),
            ("optimizer", f"{job.recipe.optimizer.name}, {num_groups} parameter group(s)"),
            ("keep_prob", self._describe_dropout()),
            ("steps", f"{job.step:,} in all, {self.num_steps:,} by this start"),
        ]

    def _describe_dropout(self) -> str:
        section = self.job.recipe.lr_dropout
        if section is None:
            return "1, no learning rate dropout"

        keep_prob = f"{section.keep_prob}"
        if section.kind == "magma":
            return f"{keep_prob}, Magma"
        if not self.num_steps:
            return keep_prob

        dropout = get_lr_dropout(self.job.raw_optimizer)
        if dropout is not None and dropout.is_fused:
            return f"{keep_prob}, masked in one pass"
        return f"{keep_prob}, dropped elements restored after each step"

    def _describe_time(self) -> list[tuple[str, str]]:
        rows = []
        if self.num_steps:
            seconds = time.perf_counter() - self._began - sum(self._paused.values())
            images_per_second = self.num_steps * self.job.batches.batch_size / seconds
            rows += [
                ("training", f"{seconds:.1f} s, {images_per_second:.0f} images/s"),
                ("evaluation", f"{self._paused['evaluation']:.1f} s"),
            ]

        writer = self.job.writer
        if writer is not None and writer.num_written:
            waited = f"{self._paused['checkpoints']:.2f} s"
            writing = f"{writer.seconds_writing:.1f} s"
            rows.append(
                (
                    "training stood still",
                    f"{waited} for {writer.num_written} checkpoint(s) that took {writing} to write",
                )
            )
        return rows

    def _describe_results(self) -> list[tuple[str, str]]:
        job = self.job
        rows = []
        if job.skipped_steps:
            rows.append(
                ("steps skipped", f"{job.skipped_steps:,}, whose loss or gradient was not finite")
            )
        if job.last_eval_metrics:
            metrics = job.last_eval_metrics
            rows.append(
                ("test accuracy", f"{metrics['accuracy']:.4f} (loss {metrics['loss']:.4f})")
            )
        if job.best is not None:
            rows.append(
                ("best test accuracy", f"{job.best['accuracy']:.4f} at step {job.best['step']:,}")
            )

        assert job.run_dir is not None
        names = [store.checkpoint_name(step) for step in store.list_steps(job.run_dir.path)]
        rows.append(("checkpoints", ", ".join(names)))
        return rows


class _Speed:
    """Images per second since the last measurement, without the pauses."""

    def __init__(self, batch_size: int, began: float) -> None:
        self._batch_size = batch_size
        self._time = began
        self._num_steps = 0
        self._paused = 0.0

    def measure(self, num_steps: int, paused: float) -> float:
        """Images per second since the last call.

        Args:
            num_steps: steps of this start so far.
            paused: seconds so far in which training stood still.
        """
        now = time.perf_counter()
        seconds = now - self._time - (paused - self._paused)
        images = (num_steps - self._num_steps) * self._batch_size

        self._time = now
        self._num_steps = num_steps
        self._paused = paused
        return images / max(seconds, 1e-9)


def _tensorboard_command() -> str:
    """TensorBoard as it can be typed here: it may lie beside this Python and not be on the path."""
    if shutil.which("tensorboard"):
        return "tensorboard"
    return os.path.relpath(Path(sys.executable).with_name("tensorboard"))
