"""What each rank of a test runs under `accelerate launch`: one job after the other, each with a fault on the last rank.

disturbed.py OUT_DIR RECIPE [section.key=value ...]

rank<i>.json: for each fault, what the job said, how far it came, how many steps it skipped, its checkpoints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lrd import checkpoint, distributed, signals, train
from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.job import Job, set_up

AT = 12  # the step with the fault; the checkpoint before is of step 10
PARAMETER = "layer2.0.conv1.weight"


def nan_loss(job: Job) -> None:
    normalized = job.batches.normalized

    def spoilt(pixels: torch.Tensor) -> torch.Tensor:
        factor = float("nan") if job.step + 1 == AT and job.network.training else 1.0
        return normalized(pixels) * factor

    job.batches.normalized = spoilt


def nan_gradient(job: Job) -> None:
    parameter = dict(job.network.named_parameters())[PARAMETER]
    parameter.register_hook(lambda gradient: gradient * float("nan") if job.step + 1 == AT else gradient)


def nan_gradients_from_there(job: Job) -> None:
    parameter = dict(job.network.named_parameters())[PARAMETER]
    parameter.register_hook(lambda gradient: gradient * float("nan") if job.step + 1 >= AT else gradient)


def flipped_bit(job: Job) -> None:
    parameter = dict(job.network.named_parameters())[PARAMETER]
    step = job.schedule.step

    def flip_and_step() -> None:
        step()
        if job.step + 1 == AT:
            parameter.data.view(torch.int32).view(-1)[5] ^= 1

    job.schedule.step = flip_and_step


def nothing(job: Job) -> None:
    pass


SKIP = ["trainer.on_nonfinite=skip"]
FAULTS: dict[str, tuple[Callable[[Job], None], list[str]]] = {
    "nan loss": (nan_loss, []),
    "nan gradient": (nan_gradient, []),
    "nan loss, skipped": (nan_loss, SKIP),
    "nan gradient, skipped": (nan_gradient, SKIP),
    "nan gradients, skipped": (nan_gradients_from_there, SKIP),
    "flipped bit": (flipped_bit, []),
    "nothing": (nothing, SKIP),
}


def disturbed(out: Path, name: str, recipe_path: str, overrides: list[str]) -> dict[str, object]:
    fault, more = FAULTS[name]
    run_dir = out / name
    job = set_up(recipes.load(recipe_path, [*overrides, *more, f"run_dir={run_dir}"]))
    if job.accelerator.process_index == job.accelerator.num_processes - 1:
        fault(job)
    message = ""
    with signals.StopSignals() as received:
        try:
            train.train(job, received)
        except UserError as error:
            message = str(error)
    sums = [buffer.double().sum().item() for buffer in job.network.buffers()]
    distributed.gather(0)  # rank 0 has written what it writes
    return {
        "message": message,
        "step": job.step,
        "skipped": job.skipped,
        "checkpoints": checkpoint.steps(run_dir),
        "finite": bool(torch.tensor(sums).isfinite().all()),
    }


if __name__ == "__main__":
    out, recipe_path, *overrides = sys.argv[1:]
    facts = {name: disturbed(Path(out), name, recipe_path, overrides) for name in FAULTS}
    rank = distributed.describe_rank().split()[1]
    Path(out, f"rank{rank}.json").write_text(json.dumps(facts))
    distributed.leave(0)
