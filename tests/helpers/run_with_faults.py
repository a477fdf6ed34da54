"""What each rank of a test runs under `accelerate launch`: several jobs, each with a fault.

    run_with_faults.py OUT_DIR RECIPE [section.key=value ...]

The jobs run one after the other; the fault is on the last rank. OUT_DIR/rank<i>.json has for each
fault the error that ended the job, the steps done, the steps skipped and the checkpoints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lrd import recipe as recipes
from lrd import train
from lrd.checkpoint import store
from lrd.distributed import accelerator, communication, signals
from lrd.distributed.roll_call import RollCall
from lrd.errors import UserError
from lrd.job.setup import set_up
from lrd.job.state import Job

AT = 12  # the step with the fault; the checkpoint before it is that of step 10
PARAMETER = "layer2.0.conv1.weight"
SKIP = ["trainer.on_nonfinite=skip"]


def nan_loss(job: Job) -> None:
    """Make the loss of step AT NaN, by way of the inputs."""
    normalize = job.batches.normalize

    def normalize_with_fault(pixels: torch.Tensor) -> torch.Tensor:
        factor = float("nan") if job.step + 1 == AT and job.raw_model.training else 1.0
        return normalize(pixels) * factor

    job.batches.normalize = normalize_with_fault


def nan_gradient(job: Job) -> None:
    """Make one parameter's gradient NaN in step AT."""
    parameter = dict(job.raw_model.named_parameters())[PARAMETER]
    parameter.register_hook(
        lambda gradient: gradient * float("nan") if job.step + 1 == AT else gradient
    )


def nan_gradients_from_then_on(job: Job) -> None:
    """Make one parameter's gradient NaN in step AT and all later steps."""
    parameter = dict(job.raw_model.named_parameters())[PARAMETER]
    parameter.register_hook(
        lambda gradient: gradient * float("nan") if job.step + 1 >= AT else gradient
    )


def flipped_bit(job: Job) -> None:
    """Flip one bit of one weight at the end of step AT."""
    parameter = dict(job.raw_model.named_parameters())[PARAMETER]
    step = job.schedule.step

    def step_and_flip() -> None:
        step()
        if job.step + 1 == AT:
            parameter.data.view(torch.int32).view(-1)[5] ^= 1

    job.schedule.step = step_and_flip


def no_fault(job: Job) -> None:
    pass


# Name -> what makes the fault, and overrides of the recipe.
FAULTS: dict[str, tuple[Callable[[Job], None], list[str]]] = {
    "nan loss": (nan_loss, []),
    "nan gradient": (nan_gradient, []),
    "nan loss, skipped": (nan_loss, SKIP),
    "nan gradient, skipped": (nan_gradient, SKIP),
    "nan gradients, skipped": (nan_gradients_from_then_on, SKIP),
    "flipped bit": (flipped_bit, []),
    "nothing": (no_fault, SKIP),
}


def run_with_fault(
    out_dir: Path, name: str, recipe_path: str, overrides: list[str]
) -> dict[str, object]:
    """Run the job with one fault. Returns what this rank saw of it."""
    make_fault, fault_overrides = FAULTS[name]
    run_dir = out_dir / name
    recipe = recipes.load(recipe_path, [*overrides, *fault_overrides, f"run_dir={run_dir}"])
    job = set_up(recipe, RollCall())
    if job.accelerator.process_index == job.accelerator.num_processes - 1:
        make_fault(job)

    message = ""
    with signals.StopSignals() as received:
        try:
            train.train(job, received)
        except UserError as error:
            message = str(error)

    buffer_sums = [buffer.double().sum().item() for buffer in job.raw_model.buffers()]
    communication.all_gather_values(0)  # after this rank 0 has written all that it writes
    return {
        "message": message,
        "step": job.step,
        "skipped": job.skipped_steps,
        "checkpoints": store.list_steps(run_dir),
        "finite": bool(torch.tensor(buffer_sums).isfinite().all()),
    }


if __name__ == "__main__":
    out_dir, recipe_path, *overrides = sys.argv[1:]
    facts = {name: run_with_fault(Path(out_dir), name, recipe_path, overrides) for name in FAULTS}

    rank = communication.describe_rank().split()[1]
    Path(out_dir, f"rank{rank}.json").write_text(json.dumps(facts))
    accelerator.exit_process(0)
