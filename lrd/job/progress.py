"""What a run shows: the live line, a line per epoch, its records, and the table at the end."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from lrd import __version__, console
from lrd.checkpoint import store
from lrd.distributed.communication import StepStatistics, all_gather_values, describe_rank
from lrd.job.rank_speed import SlowRanks, describe_spread
from lrd.job.state import Job
from lrd.optim.dropout import get_lr_dropout
from lrd.tracking.metrics_file import read_rows
from lrd.tracking.recorder import SKIPPED_TAG


class Progress:
    """Counts and shows what this start of the run does. All ranks must make one together.

    Attributes:
        num_steps: steps that this start has taken.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.num_steps = 0

        # The latest of the global batch, and for how long each rank computed.
        self._loss = float("nan")
        self._accuracy = float("nan")
        self._compute_seconds: list[float] = []

        self._slow_ranks = SlowRanks(all_gather_values(describe_rank()))
        self._began = time.perf_counter()
        self._paused = {
            "evaluation": 0.0,
            "checkpoints": 0.0,
        }  # seconds in which training stood still
        self._speed = _Speed(job.batches.batch_size, self._began)
        self._epoch = self._begin_epoch()
        self._meter = console.ProgressMeter(
            "training", job.total_steps, job.step, has_last_line=False
        )
        if job.tracker is not None and job.step == 0:
            job.tracker.record_summary(describe_run(job))

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

    def take_statistics(self, statistics: StepStatistics) -> None:
        """Take what the ranks told each other in the step, and name a rank that has become slow."""
        self._loss = statistics.mean_loss
        self._accuracy = statistics.mean_accuracy
        if self.job.is_sharded:  # the time of exchanging shards is not told apart
            return

        self._compute_seconds = statistics.compute_seconds
        lines = self._slow_ranks.add(statistics.compute_seconds)
        if self.job.tracker is not None:
            for line in lines:
                console.error(line)

    def before_update(self) -> None:
        """Keep what a record of the step needs of the state before it."""
        self.job.recorder.before_update(self.job.step + 1)

    def after_step(self, lrs: list[float], grad_norm: Tensor, is_skipped: bool) -> None:
        """Record and show a step.

        Args:
            lrs: the lr that each parameter group had in it.
            grad_norm: float32 ().
            is_skipped: whether the optimizer did not take the step.
        """
        job = self.job
        self.num_steps += 1
        job.recorder.record_probes(job.step, lrs, moved=not is_skipped)
        job.recorder.record_update(job.step)
        if job.step % job.recipe.tracking.every_steps != 0:
            if is_skipped:  # else nothing would say so: a probe may be zero because of its mask
                job.recorder.record_skipped(job.step, job.skipped_steps)
            return

        images_per_second = self._speed.measure(self.num_steps, sum(self._paused.values()))
        grad_norm_tag = "train/grad_norm" if job.exchange is None else "train/grad_norm_of_rank_0"
        scalars = {
            "train/loss": self._loss,
            "train/accuracy": self._accuracy,
            "train/images_per_second": images_per_second,
            grad_norm_tag: float(grad_norm),
        }
        if job.recipe.trainer.on_nonfinite == "skip":
            scalars[SKIPPED_TAG] = job.skipped_steps
        if job.recipe.data.skip_corrupt:
            scalars["train/replaced"] = job.replaced_images
        scalars |= describe_spread(self._compute_seconds)
        job.recorder.record_step(job.step, lrs, scalars, moved=not is_skipped)
        if job.tracker is None:  # this is not the main process
            return
        self._epoch.add(self._loss, self._accuracy)
        self._epoch.lr = lrs[0]
        self._show(lrs[0], images_per_second)

    def show_epoch(self) -> None:
        """Print a line about the epoch if `job.step` steps complete it or the run.

        It comes after the evaluation of the step, if there is one.
        """
        job = self.job
        is_complete = job.step % job.batches.steps_per_epoch == 0 or job.step == job.total_steps
        if job.tracker is None or not is_complete:
            return

        console.info_that_fits(self._describe_epoch())
        self._epoch = _Epoch(seconds_from=time.perf_counter())

    def _begin_epoch(self) -> _Epoch:
        """The epoch in which this start begins, with its steps of earlier starts."""
        job = self.job
        if job.tracker is None:
            return _Epoch()

        # An epoch that still has to be evaluated has not ended.
        steps_done = job.step % job.batches.steps_per_epoch
        if steps_done == 0 and job.is_evaluation_due:
            steps_done = job.batches.steps_per_epoch
        if steps_done == 0:
            return _Epoch(seconds_from=self._began)

        epoch = _Epoch()
        lr_tag = f"lr/{job.raw_optimizer.param_groups[0]['name']}"
        for row in read_rows(job.tracker.metrics.path, first_step=job.step - steps_done + 1):
            if "train/loss" in row and "train/accuracy" in row:
                epoch.add(row["train/loss"], row["train/accuracy"])
            epoch.lr = row.get(lr_tag, epoch.lr)
        return epoch

    def _describe_epoch(self) -> list[str]:
        """The epoch in one line, in several lengths."""
        job = self.job
        number = 1 + (job.step - 1) // job.batches.steps_per_epoch
        epoch = f"epoch {number}/{job.recipe.trainer.epochs}"
        step = f"step {job.step}"

        train = []
        if self._epoch.num_steps:
            means = self._epoch.means()
            train = [f"loss {means[0]:.4f} acc {means[1]:.4f}"]

        evaluations: dict[str, str] = {}  # by the name of their accuracy
        accuracies: dict[str, str] = {}
        metrics = job.last_eval_metrics if job.last_eval_step == job.step else {}
        for name, value in metrics.items():
            if name.endswith("accuracy"):
                part = "val" if name.startswith("validation_") else "test"
                what = f"{part} ema" if "ema_" in name else part
                loss = metrics[name.removesuffix("accuracy") + "loss"]
                evaluations[name] = f"{what} loss {loss:.4f} acc {value:.4f}"
                accuracies[name] = f"{what} acc {value:.4f}"

        lr = [] if math.isnan(self._epoch.lr) else [f"lr {self._epoch.lr:.3g}"]
        seconds = self._epoch.seconds()
        duration = [] if seconds is None else [_describe_duration(seconds)]

        # The one by which the best epoch is chosen.
        best = [text for name, text in accuracies.items() if name == job.best_metric]
        forms = [
            [epoch, step, *train, *evaluations.values(), *lr, *duration],
            [epoch, step, *train, *evaluations.values(), *duration],
            [epoch, step, *train, *accuracies.values(), *duration],
            [epoch, step, *train, *accuracies.values()],
            [epoch, step, *train, *best, *duration],
            [epoch, step, *train, *best],
            [epoch, *train, *best],
        ]
        return ["  ".join(form) for form in forms]

    def _show(self, lr: float, images_per_second: float) -> None:
        job = self.job
        figures = (
            f"loss {self._loss:.4f} acc {self._accuracy:.4f} lr {lr:.3g} "
            f"{images_per_second:.0f} images/s"
        )
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
        return [
            *describe_parts(job),
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
        if self.job.batches.wait_seconds:
            rows.append(("waited for data", f"{self.job.batches.wait_seconds:.1f} s"))

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
        if job.replaced_images:
            rows.append(("unreadable images", f"replaced {job.replaced_images:,} times"))
        metrics = job.last_eval_metrics
        for name, value in metrics.items():
            if name.endswith("accuracy"):
                loss = metrics[name.removesuffix("accuracy") + "loss"]
                rows.append((_describe_metric(name), f"{value:.4f} (loss {loss:.4f})"))
        if job.best is not None:
            what = f"best {_describe_metric(job.best_metric)}"
            rows.append((what, f"{job.best_accuracy:.4f} at step {job.best['step']:,}"))

        assert job.run_dir is not None
        names = [store.checkpoint_name(step) for step in store.list_steps(job.run_dir.path)]
        rows.append(("checkpoints", ", ".join(names)))
        return rows


def _describe_metric(name: str) -> str:
    """`validation_ema_accuracy` as `validation ema accuracy`, `accuracy` as `test accuracy`."""
    words = name.replace("_", " ")
    return words if name.startswith("validation_") else f"test {words}"


def describe_parts(job: Job) -> list[tuple[str, str]]:
    """Network, data, ranks and optimizer of a job, in a few words each."""
    num_parameters = sum(parameter.numel() for parameter in job.raw_model.parameters())
    num_train = len(job.dataset.train)
    num_test = len(job.dataset.test)
    validation = job.dataset.validation
    held_out = "" if validation is None else f", {len(validation):,} held out"
    num_groups = len(job.raw_optimizer.param_groups)
    ranks = f"{job.accelerator.num_processes} on {job.accelerator.device.type}"
    if job.is_sharded:
        ranks += ", each with a shard of the network and of the optimizer's state"
    return [
        ("network", f"{job.recipe.model.arch}, {num_parameters:,} parameters"),
        ("data", f"{job.recipe.data.dataset}, {num_train:,} + {num_test:,} images{held_out}"),
        ("ranks", ranks),
        ("optimizer", f"{job.recipe.optimizer.name}, {num_groups} parameter group(s)"),
    ]


def describe_run(job: Job) -> list[tuple[str, str]]:
    """A run before its first step, for TensorBoard's Text page."""
    recipe = job.recipe
    section = recipe.lr_dropout
    keep_prob = "1 (no learning rate dropout)" if section is None else f"{section.keep_prob}"
    groups = job.raw_optimizer.param_groups
    lrs = ", ".join(
        f"{group['name']}: {group.get('initial_lr', group['lr']):g}" for group in groups
    )
    return [
        *describe_parts(job),
        ("lr before the schedule", lrs),
        ("schedule", recipe.schedule.name),
        ("keep_prob", keep_prob),
        ("batch size", f"{job.batches.batch_size} over all ranks"),
        ("epochs", f"{recipe.trainer.epochs} of {job.batches.steps_per_epoch:,} steps"),
        ("seed", f"{recipe.seed}"),
        ("versions", _describe_versions()),
    ]


def describe_start(job: Job) -> str:
    """One line for the log, by which a start is found in it."""
    return (
        f"start on {platform.node()}, process {os.getpid()}: "
        f"{job.accelerator.num_processes} rank(s) on {job.accelerator.device.type}; "
        f"{_describe_versions()}"
    )


def _describe_versions() -> str:
    return f"lrd {__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def _describe_duration(seconds: float) -> str:
    """Seconds as `4.3 s`, `5:07 min` or `2:05:07 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{whole_seconds:02} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02} h"


class _Epoch:
    """What is recorded of one epoch.

    Args:
        seconds_from: when it began, by `time.perf_counter`; None if an earlier start began it.

    Attributes:
        num_steps: steps whose loss is finite.
        lr: of the first parameter group in the latest recorded step; NaN if there is none.
    """

    def __init__(self, seconds_from: float | None = None) -> None:
        self.num_steps = 0
        self.lr = float("nan")
        self._seconds_from = seconds_from
        self._loss_sum = 0.0
        self._accuracy_sum = 0.0

    def add(self, loss: float, accuracy: float) -> None:
        """Add a recorded step. A skipped one, whose loss is not finite, does not count."""
        if math.isfinite(loss):
            self.num_steps += 1
            self._loss_sum += loss
            self._accuracy_sum += accuracy

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy over the recorded steps."""
        return self._loss_sum / self.num_steps, self._accuracy_sum / self.num_steps

    def seconds(self) -> float | None:
        """How long it has taken; None if an earlier start began it."""
        if self._seconds_from is None:
            return None
        return time.perf_counter() - self._seconds_from


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
