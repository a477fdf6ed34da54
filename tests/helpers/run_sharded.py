"""What each rank of a test runs under `accelerate launch`: several jobs, with and without shards.

    run_sharded.py few|all OUT_DIR RECIPE [section.key=value ...]

The jobs run one after the other, each in OUT_DIR/<its name>. OUT_DIR/rank<i>.json has for each
start of a job what this rank saw of it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from lrd import recipe as recipes
from lrd import train
from lrd.distributed import accelerator, communication, signals
from lrd.distributed.roll_call import RollCall
from lrd.errors import UserError
from lrd.job.setup import set_up
from lrd.job.state import Job
from lrd.optim import placement

SHARDS = "trainer.sharding=full"
NUM_STEPS = 6
AT = 3  # the step with the fault

# Name -> overrides. Each of these is run with copies and with shards.
FEW = {
    "plain": ["checkpoint.every_steps=1", "checkpoint.keep_last=20"],
    "sync_batchnorm": ["model.sync_batchnorm=true"],
    "groups": [
        "optimizer={name: Adam, lr: 0.001, groups: [{match: '*bn*', keep_prob: 1.0, lr: 0.01}]}",
        "trainer.clip_norm=0.3",
        "trainer.accumulation_steps=2",
    ],
}
MORE = {
    "bf16": ["trainer.clip_norm=0.3", "trainer.precision=bf16"],
    # On a CPU torch 2.13 has a fault at smaller widths, see tests/job/test_train.py.
    "channels_last": ["trainer.channels_last=true", "model.width=8"],
    "momentum_buffer": ["lr_dropout.masks=momentum_buffer"],
    "tensor": ["lr_dropout.granularity=tensor", "lr_dropout.rescale=true"],
}


def nan_loss(job: Job) -> None:
    """Make the loss of step AT NaN, by way of the inputs."""
    normalize = job.batches.normalize

    def normalize_with_fault(pixels: Tensor) -> Tensor:
        factor = float("nan") if job.step + 1 == AT and job.raw_model.training else 1.0
        return normalize(pixels) * factor

    job.batches.normalize = normalize_with_fault


def nan_gradient(job: Job) -> None:
    """Make the gradient NaN that flows from `layer1` to `conv1`, in step AT."""

    def spoil(_: nn.Module, __: object, output: Tensor) -> None:
        if job.step + 1 == AT and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    job.raw_model.conv1.register_forward_hook(spoil)


def other_mask_seed(job: Job) -> None:
    for group in job.raw_optimizer.param_groups:
        group["mask_seed"] = 1


# Name -> what makes the fault on the last rank, and overrides. These are run with shards.
FAULTS: dict[str, tuple[Callable[[Job], None], list[str]]] = {
    "nan gradient": (nan_gradient, ["trainer.accumulation_steps=2"]),
    "nan loss, skipped": (nan_loss, ["trainer.on_nonfinite=skip"]),
    "other mask seed": (other_mask_seed, []),
}


class Runner:
    """Runs the jobs of this rank.

    Args:
        out_dir: for the run directories.
        recipe_path: of all jobs.
        overrides: of all jobs.
    """

    def __init__(self, out_dir: Path, recipe_path: str, overrides: list[str]) -> None:
        self._out_dir = out_dir
        self._recipe_path = recipe_path
        self._overrides = overrides
        # Kept to the end: the destructor of DDP may wait for ever.
        self._jobs: list[Job] = []
        self.facts: dict[str, dict[str, object]] = {}

    def run(
        self,
        name: str,
        *overrides: str,
        start: str = "",
        change: Callable[[Job], None] | None = None,
    ) -> None:
        """Run a job, or go on with it.

        Args:
            name: of the job, and so of its run directory.
            overrides: of this start.
            start: which start of the job it is, for its facts; empty: it is the only one.
            change: makes a fault on the last rank.
        """
        AcceleratorState._reset_state()  # the precision may be another one
        overrides = (f"trainer.max_steps={NUM_STEPS}", *self._overrides, *overrides)
        recipe = recipes.load(self._recipe_path, [*overrides, f"run_dir={self._out_dir / name}"])
        label = f"{name} {start}".strip()
        try:
            job = set_up(recipe, RollCall())
        except UserError as error:
            self.facts[label] = {"message": str(error)}
            return

        self._jobs.append(job)
        if change is not None and job.accelerator.process_index == world_size() - 1:
            change(job)
        shrink_test_set(job)
        buffer_sums = record_buffers(job)

        message = ""
        with signals.StopSignals() as received:
            try:
                train.train(job, received)
            except UserError as error:
                message = str(error)
        communication.all_gather_values(0)  # after this rank 0 has written all that it writes
        job.close()

        self.facts[label] = {
            "message": message,
            "step": job.step,
            "skipped": job.skipped_steps,
            "metrics": job.last_eval_metrics,
            "buffer sums": buffer_sums,
            "bytes": num_bytes(job),
        }


def world_size() -> int:
    return torch.distributed.get_world_size()


def shrink_test_set(job: Job) -> None:
    """Leave so many test images that rank 0 has none in its last batch, and the last rank has."""
    num_images = world_size() * job.batches.batch_size + 1
    pixels = job.dataset.test.pixels[:num_images]
    labels = job.dataset.test.labels[:num_images]
    test = dataclasses.replace(job.dataset.test, pixels=pixels, labels=labels)
    job.dataset = dataclasses.replace(job.dataset, test=test)


def record_buffers(job: Job) -> list[float]:
    """Return a list that gets the sum of all buffers before each forward pass in training."""
    sums: list[float] = []

    def record(model: nn.Module, _: object) -> None:
        if model.training:
            sums.append(sum(float(buffer.double().sum()) for buffer in model.buffers()))

    job.raw_model.register_forward_pre_hook(record)
    return sums


def num_bytes(job: Job) -> int:
    """The bytes of the parameters and of the optimizer's state that this rank holds."""
    tensors: list[Tensor] = list(job.raw_model.parameters())
    for state in job.raw_optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    with torch.no_grad():
        return sum(placement.local(tensor).nbytes for tensor in tensors)


def main() -> None:
    which, out_dir, recipe_path, *overrides = sys.argv[1:]
    runner = Runner(Path(out_dir), recipe_path, overrides)

    compared = FEW if which == "few" else FEW | MORE
    for name, job_overrides in compared.items():
        runner.run(f"{name}, copies", *job_overrides)
        runner.run(f"{name}, shards", *job_overrides, SHARDS)
    for name, (change, job_overrides) in FAULTS.items():
        runner.run(name, *job_overrides, SHARDS, change=change)

    # Two starts, and three that change between copies and shards.
    resumable = FEW["groups"]
    runner.run("two starts", *resumable, SHARDS, "trainer.max_steps=3", start="1")
    runner.run("two starts", *resumable, SHARDS, start="2")
    changing = FEW["sync_batchnorm"]
    runner.run("changing", *changing, "trainer.max_steps=2", start="1")
    runner.run("changing", *changing, SHARDS, "trainer.max_steps=4", start="2")
    runner.run("changing", *changing, start="3")

    runner.run("Rprop", SHARDS, "optimizer={name: Rprop}")

    rank = communication.process_index()
    Path(out_dir, f"rank{rank}.json").write_text(json.dumps(runner.facts))
    accelerator.exit_process(0)


if __name__ == "__main__":
    main()
