"""`lrd check`: try a recipe out without training: data, shapes, a few steps, memory, time."""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
from contextlib import closing, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from lrd import console, train
from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.run_records import describe_seconds
from lrd.data import datasets
from lrd.distributed import hardware
from lrd.distributed.accelerator import start_rank
from lrd.distributed.roll_call import RollCall
from lrd.errors import RunError, UserError, describe_error, first_line
from lrd.job import setup
from lrd.job.state import Job
from lrd.recipe import named

_TIMED_STEPS = 5
_SECONDS_OF_STEPS = 20.0  # after which no further step is timed


def check(recipe_path: str, overrides: list[str], as_json: bool = False) -> None:
    """Try a recipe out in this process and print what it needs. Nothing is written.

    Args:
        recipe_path: the recipe file.
        overrides: `section.key=value`.
        as_json: print the times as a JSON object in place of the table; all else that is printed
            goes to standard error.

    Raises:
        UserError: something is wrong with the recipe, the data, the device or the run directory.
        RunError: the loss of the first steps is not finite.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        costs = _try_out(recipe_path, overrides)
    if as_json:
        console.info(json.dumps(costs, indent=1))


def _try_out(recipe_path: str, overrides: list[str]) -> dict[str, Any]:
    """Returns the times, for `--json`."""
    recipe = hardware.resolve_auto(recipes.load(recipe_path, overrides))
    run_dir = describe_run_dir(Path(recipe.run_dir))
    calls = RollCall()
    accelerator = start_rank(recipe.trainer, {}, calls)

    try:
        dataset = datasets.load_dataset(recipe.data, recipe.seed)
        job = setup.build_job(recipe, accelerator, dataset, calls)
        with closing(job):
            setup.wrap_model(job)
            losses, step_seconds = run_steps(job)
        eval_seconds = run_evaluation_batch(job)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's network and loss raise
        where = named.last_line_in_file(error)
        if not where and not isinstance(error, RuntimeError | MemoryError):
            raise
        raise UserError(f"this recipe fails here: {describe_error(error)}{where}") from None

    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise RunError(f"step {step}: the loss is {loss}; a lower optimizer.lr may help")
    rows = _describe(job, losses, step_seconds, eval_seconds)
    console.table("", ["", ""], [*rows, ("run_dir", run_dir)])
    console.info(f"{recipe_path}: nothing is wrong with it here")
    return {
        "total_steps": job.total_steps,
        "steps_per_epoch": job.batches.steps_per_epoch,
        "step_seconds": step_seconds,
        "evaluation_seconds": eval_seconds,
    }


def run_steps(job: Job) -> tuple[list[float], float]:
    """Take a few optimizer steps.

    Returns:
        The loss of each, and the median time of a step in seconds, without the first one.
    """
    losses = []
    seconds: list[float] = []
    began = time.perf_counter()
    for step in range(min(1 + _TIMED_STEPS, job.total_steps)):
        start = time.perf_counter()
        job.step = step
        loss, _ = train.forward_backward(job)
        train.clip_gradients(job)
        job.accelerated_optimizer.step()
        job.accelerated_optimizer.zero_grad()
        job.schedule.step()
        losses.append(float(loss))  # waits for a GPU

        seconds.append(time.perf_counter() - start)
        if time.perf_counter() - began > _SECONDS_OF_STEPS:
            break
    return losses, statistics.median(seconds[1:] or seconds)


def run_evaluation_batch(job: Job) -> float:
    """Run the network on a batch without gradients.

    Returns:
        The time that the whole test set would take, in seconds.
    """
    inputs = job.make_inputs(job.batches.micro_batch_size)  # float32 (micro_batch, 3, H, W)

    job.raw_model.eval()
    start = time.perf_counter()
    with torch.inference_mode():
        float(job.ddp_model(inputs).sum())  # waits for a GPU
    job.raw_model.train()
    return (time.perf_counter() - start) * len(job.dataset.test) / len(inputs)


def describe_run_dir(run_dir: Path) -> str:
    """What a start would find in the run directory.

    Raises:
        UserError: it cannot be written.
    """
    existing = run_dir.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
    except OSError as error:  # the name is too long
        raise UserError(f"run_dir: {run_dir} cannot be written: {first_line(error)}") from None
    if not existing.is_dir():
        raise UserError(f"run_dir: {run_dir} cannot be written: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UserError(f"run_dir: {run_dir} cannot be written: no permission for {existing}")

    steps = store.list_steps(run_dir)
    if steps:
        return f"{run_dir}, goes on after step {steps[-1]:,}"
    return f"{run_dir}, a new run"


def _describe(
    job: Job, losses: list[float], step_seconds: float, eval_seconds: float
) -> list[tuple[str, str]]:
    recipe = job.recipe
    num_parameters = sum(parameter.numel() for parameter in job.raw_model.parameters())
    steps_per_epoch = job.batches.steps_per_epoch
    epoch_seconds = steps_per_epoch * step_seconds + eval_seconds / recipe.trainer.eval_every
    run_seconds = epoch_seconds * job.total_steps / steps_per_epoch

    state_bytes = sum(
        tensor.nbytes
        for state in job.raw_optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    )
    model_bytes = sum(tensor.nbytes for tensor in job.raw_model.state_dict().values())
    input_shape = (job.batches.micro_batch_size, *job.batches.image_shape)
    shape = "x".join(str(size) for size in input_shape)
    images_per_second = job.batches.batch_size / step_seconds
    return [
        ("data", f"{recipe.data.dataset}, {len(job.dataset.train):,} training images"),
        ("", f"{len(job.dataset.test):,} test images, {len(job.dataset.classes)} classes"),
        ("network", f"{recipe.model.arch}, {num_parameters:,} parameters"),
        ("micro batch", f"{shape}, {recipe.trainer.precision} on {job.accelerator.device}"),
        ("loss", f"{losses[0]:.4f} in step 1, {losses[-1]:.4f} in step {len(losses)}"),
        ("steps", f"{job.total_steps:,}, {steps_per_epoch:,} in an epoch"),
        ("memory", f"{_peak_bytes(job) / 1e6:,.0f} MB at most so far"),
        ("checkpoint", f"{(model_bytes + state_bytes) / 1e6:,.1f} MB"),
        ("a step", f"{1e3 * step_seconds:,.1f} ms, {images_per_second:,.0f} images/s"),
        ("an epoch", f"{describe_seconds(epoch_seconds)}, with its evaluation"),
        ("the run", f"{describe_seconds(run_seconds)} in this one process"),
    ]


def _peak_bytes(job: Job) -> int:
    """The most memory that was in use: the GPU's, or this process's."""
    device = job.accelerator.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
