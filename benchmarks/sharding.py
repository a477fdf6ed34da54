"""What does a rank hold with `trainer.sharding: full`, and what does it cost in time?

    accelerate launch --config_file launch/accelerate/cpu.yaml benchmarks/sharding.py

The full ResNet-34 with global batch 128, once with copies (DDP) and once with shards (FSDP2).
Blocks of steps of the two take turns. The bytes are those of parameters, gradients and optimizer
state before the optimizer's step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint import step
from common import RECIPE, RESULTS, circumstances, spread, summary, write
from rich.progress import track
from torch import Tensor

from lrd import console, recipe
from lrd.distributed import accelerator, communication
from lrd.distributed.roll_call import RollCall
from lrd.job.setup import set_up
from lrd.job.state import Job
from lrd.optim import placement
from lrd.parts.models import residual_blocks
from lrd.train import forward_backward

WAYS = {"copies": "none", "shards": "full"}


def held_bytes(job: Job) -> int:
    """The bytes of parameters, gradients and optimizer state that this rank holds."""
    forward_backward(job)
    tensors: list[Tensor] = []
    for parameter in job.raw_model.parameters():
        assert parameter.grad is not None
        tensors += [parameter, parameter.grad]
    for state in job.raw_optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    job.accelerated_optimizer.zero_grad()

    with torch.no_grad():
        return sum(placement.local(tensor).nbytes for tensor in tensors)


def largest_block_bytes(job: Job) -> int:
    """The bytes of the largest residual block, which a rank has whole while it computes."""
    return max(
        sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
        for block in residual_blocks(job.raw_model)
    )


def train_in_turn(jobs: dict[str, Job], rounds: int, steps: int) -> list[dict[str, float]]:
    """Train blocks of steps. Returns for each round the seconds of a step, by the way."""
    seconds = []
    for number in track(range(rounds), "rounds", disable=communication.process_index() > 0):
        ways = list(jobs) if number % 2 == 0 else list(reversed(jobs))
        figures = {}
        for way in ways:
            communication.all_gather_values(0)
            start = time.perf_counter()
            for _ in range(steps):
                step(jobs[way])
            figures[way] = (time.perf_counter() - start) / steps
        seconds.append(figures)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--optimizer", default="{name: Adam, lr: 0.001}")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharding.json")
    arguments = parser.parse_args()

    overrides = [
        f"data.batch_size={arguments.batch_size}",
        f"optimizer={arguments.optimizer}",
        "trainer.epochs=1000",
    ]
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for way, sharding in WAYS.items():
            settings = [*overrides, f"trainer.sharding={sharding}", f"run_dir={folder}/{way}"]
            jobs[way] = set_up(recipe.load(RECIPE, settings), RollCall())
            for _ in range(2):
                step(jobs[way])

        held = {way: held_bytes(job) for way, job in jobs.items()}
        held_by_ranks = communication.all_gather_values(held)
        seconds = train_in_turn(jobs, arguments.rounds, arguments.steps)

    if communication.process_index() == 0:
        job = jobs["shards"]
        most = {way: max(held[way] for held in held_by_ranks) for way in WAYS}
        facts: dict[str, Any] = {
            **circumstances(job.accelerator.device.type),
            "what": "ResNet-34 with copies and with shards of it",
            "ranks": job.accelerator.num_processes,
            "batch_size": arguments.batch_size,
            "optimizer": arguments.optimizer,
            "held_bytes_by_rank": held_by_ranks,
            "held_bytes_most": most,
            "largest_block_bytes": largest_block_bytes(job),
            "seconds_a_step": {way: summary([pair[way] for pair in seconds]) for way in WAYS},
            "ratio": summary([pair["shards"] / pair["copies"] for pair in seconds]),
            "rounds": seconds,
        }
        rows = [
            ["MB held by a rank, copies", f"{most['copies'] / 1e6:.1f}"],
            ["MB held by a rank, shards", f"{most['shards'] / 1e6:.1f}"],
            ["MB of the largest block", f"{facts['largest_block_bytes'] / 1e6:.1f}"],
            ["s a step, copies", spread(facts["seconds_a_step"]["copies"], ".3f")],
            ["s a step, shards", spread(facts["seconds_a_step"]["shards"], ".3f")],
            ["ratio", spread(facts["ratio"], ".2f")],
        ]
        console.table(facts["what"], ["", "median (min to max)"], rows)
        write(arguments.out, facts)
    accelerator.exit_process(0)


if __name__ == "__main__":
    main()
