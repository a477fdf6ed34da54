"""What a run shows while it goes and when it ends: the live line, TensorBoard's records, the closing table."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from lrd import checkpoint, console
from lrd.dropout import attached
from lrd.job import Job


class Progress:
    """Counts what this start of the run did. `loss` is the latest global mean loss."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loss = float("nan")
        self.steps = 0
        self._began = time.perf_counter()
        self._pauses = {"evaluation": 0.0, "checkpoints": 0.0}  # seconds in which training stood still
        self._window_start, self._window_steps, self._window_paused = self._began, 0, 0.0
        self._meter = console.Meter("epoch 1", job.total_steps, job.step)

    def __enter__(self) -> Progress:
        self._meter.__enter__()
        self.job.report("running")
        return self

    def __exit__(self, *exception: object) -> None:
        self._meter.__exit__(*exception)
        if self.job.tracker is not None:
            with suppress(OSError):  # a full disk has been told of
                self.job.tracker.flush()

    @contextmanager
    def pause(self, why: str) -> Iterator[None]:
        """Time in here is not training."""
        start = time.perf_counter()
        yield
        self._pauses[why] += time.perf_counter() - start

    @property
    def _paused(self) -> float:
        return sum(self._pauses.values())

    def step(self, lrs: list[float], grad_norm: Tensor, moved: bool) -> None:
        """After each step; `lrs` is what each group's lr was in it, `moved` whether the optimizer took it."""
        job = self.job
        self.steps += 1
        job.roll_call.step = job.step
        if job.tracker is None:
            return
        job.tracker.probe(job.step, lrs, moved)
        if job.step % job.recipe.tracking.every_steps == 0:
            speed = self._images_per_second()
            scalars = {"train/loss": self.loss, "train/images_per_second": speed, "train/grad_norm": float(grad_norm)}
            if job.recipe.trainer.on_nonfinite == "skip":
                scalars["train/skipped"] = job.skipped
            job.tracker.step(job.step, lrs, scalars, moved)
            accuracy = f"acc {job.latest['accuracy']:.4f}" if job.latest else ""
            epoch = min(job.recipe.trainer.epochs, 1 + job.step // job.batches.steps_per_epoch)
            figures = f"loss {self.loss:.4f} {accuracy} lr {lrs[0]:.3g} {speed:.0f} images/s"
            if job.skipped:
                figures += f" {job.skipped} skipped"
            self._meter.update(job.step, figures, f"epoch {epoch}/{job.recipe.trainer.epochs} step")

    def _images_per_second(self) -> float:
        now = time.perf_counter()
        seconds = now - self._window_start - (self._paused - self._window_paused)
        images = (self.steps - self._window_steps) * self.job.batches.batch_size
        self._window_start, self._window_steps, self._window_paused = now, self.steps, self._paused
        return images / max(seconds, 1e-9)

    def _way(self) -> str:
        dropout = attached(self.job.optimizer)
        return "masked in one pass" if dropout is not None and dropout.is_fused else "dropped elements put back"

    def summary(self) -> None:
        """A table of what the run did, and the command to look at it."""
        job = self.job
        if job.run_dir is None:
            return
        training = time.perf_counter() - self._began - self._paused
        groups = job.optimizer.param_groups
        dropout = job.recipe.lr_dropout
        rows: list[tuple[str, object]] = [
            ("network", f"{job.recipe.model.arch}, {sum(p.numel() for p in job.network.parameters()):,} parameters"),
            ("data", f"{job.recipe.data.dataset}, {len(job.dataset.train):,} + {len(job.dataset.test):,} images"),
            ("ranks", f"{job.accelerator.num_processes} on {job.accelerator.device.type}"),
            ("optimizer", f"{job.recipe.optimizer.name}, {len(groups)} parameter group(s)"),
            ("keep_prob", "1, no learning rate dropout" if dropout is None else f"{dropout.keep_prob}, {self._way()}"),
            ("steps", f"{job.step:,} in all, {self.steps:,} by this start"),
        ]
        if self.steps:
            speed = self.steps * job.batches.batch_size / training
            rows += [
                ("training", f"{training:.1f} s, {speed:.0f} images/s"),
                ("evaluation", f"{self._pauses['evaluation']:.1f} s"),
            ]
        writer = job.writer
        if writer is not None and writer.written:
            stood, took = f"{self._pauses['checkpoints']:.2f} s", f"{writer.working:.1f} s"
            rows.append(
                ("training stood still", f"{stood} for {writer.written} checkpoint(s) that took {took} to write")
            )
        if job.skipped:
            rows.append(("steps skipped", f"{job.skipped:,}, whose loss or gradient was not finite"))
        if job.latest:
            rows.append(("test accuracy", f"{job.latest['accuracy']:.4f} (loss {job.latest['loss']:.4f})"))
        if job.best is not None:
            rows.append(("best test accuracy", f"{job.best['accuracy']:.4f} at step {job.best['step']:,}"))
        kept = ", ".join(checkpoint.name(step) for step in checkpoint.steps(job.run_dir.path))
        rows.append(("checkpoints", kept))
        console.table(str(job.run_dir.path), ["", ""], rows)
        beside_python = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
        command = "tensorboard" if shutil.which("tensorboard") else beside_python
        console.say(f"look at it: {command} --logdir {job.run_dir.path.parent} --samples_per_plugin scalars=100000")
