"""How long does training stand still for a checkpoint of the full ResNet-34?

    accelerate launch --config_file launch/accelerate/cpu.yaml benchmarks/checkpoint.py

Checkpoints written in the background are compared with checkpoints written in the foreground. First
the same checkpoint is written in both ways in turn, with a training step between. Then blocks of
100 steps of global batch 128 with one checkpoint and with none take turns; they show how much the
writing slows down the training beside it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RECIPE, RESULTS, circumstances, spread, summary, write
from rich.progress import track

from lrd import console, recipe
from lrd.distributed import accelerator, communication
from lrd.distributed.roll_call import RollCall
from lrd.job.setup import set_up
from lrd.job.state import Job
from lrd.train import clip_gradients, forward_backward, save_checkpoint


def step(job: Job) -> None:
    """Do one training step, as `lrd.train` does it."""
    loss, accuracy = forward_backward(job)
    norm = clip_gradients(job)
    communication.gather_step_statistics(loss, norm, accuracy, 0)
    job.accelerated_optimizer.step()
    job.accelerated_optimizer.zero_grad()
    job.schedule.step()
    job.step += 1


def save(job: Job, background: bool) -> float:
    """Save a checkpoint. Returns the seconds for which training stood still."""
    job.recipe.checkpoint.background = background
    start = time.perf_counter()
    save_checkpoint(job)
    return time.perf_counter() - start


def wait_for_writer(job: Job) -> None:
    """Wait until all ranks know that the last checkpoint is written."""
    communication.run_on_main_process(lambda: job.writer.wait() if job.writer else None)


def write_in_turn(job: Job, pairs: int) -> list[dict[str, float]]:
    """Write checkpoints in the foreground and in the background.

    Returns:
        For each pair, the seconds for which training stood still, by the way of writing.
    """
    seconds = []
    for number in track(range(pairs + 1), "pairs", disable=job.writer is None):
        ways = ["background", "foreground"] if number % 2 == 0 else ["foreground", "background"]
        pair = {}
        for way in ways:
            step(job)
            pair[way] = save(job, background=way == "background")
            wait_for_writer(job)
        seconds.append(pair)
    return seconds[1:]  # the first pair allocates the memory that the others use again


def train_in_turn(job: Job, blocks: int, steps: int) -> list[dict[str, float]]:
    """Train blocks of steps with a checkpoint after the first step, and with none.

    Returns:
        For each pair of blocks, the seconds `with` and `without` a checkpoint, and those for which
        training `stood still` in the former.
    """
    rounds = []
    for number in range(blocks):
        seconds = {}
        for what in ("without", "with") if number % 2 == 0 else ("with", "without"):
            wait_for_writer(job)
            start = time.perf_counter()
            description = f"block {number + 1} {what}"
            for i in track(range(steps), description, disable=job.writer is None):
                step(job)
                if i == 0 and what == "with":
                    seconds["stood still"] = save(job, background=True)
            seconds[what] = time.perf_counter() - start
        rounds.append(seconds)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.json")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        job = set_up(recipe.load(RECIPE, [f"run_dir={folder}", "trainer.epochs=1000"]), RollCall())
        for _ in range(3):
            step(job)
        pairs = write_in_turn(job, arguments.pairs)
        rounds = train_in_turn(job, arguments.blocks, arguments.steps)
        wait_for_writer(job)

    if job.accelerator.is_main_process:
        report(job, pairs, rounds, arguments.steps, arguments.out)
    accelerator.exit_process(0)


def report(
    job: Job,
    pairs: list[dict[str, float]],
    rounds: list[dict[str, float]],
    steps: int,
    out: Path,
) -> None:
    stood_still = [block["stood still"] / block["without"] for block in rounds]
    slower = [block["with"] / block["without"] - 1 for block in rounds]
    facts: dict[str, Any] = {
        **circumstances(job.accelerator.device.type),
        "what": "seconds that training stood still for a checkpoint of ResNet-34 "
        "(weights and momentum)",
        "ranks": job.accelerator.num_processes,
        "bytes": job.train_state().nbytes,
        "foreground": summary([pair["foreground"] for pair in pairs]),
        "background": summary([pair["background"] for pair in pairs]),
        "ratio": summary([pair["background"] / pair["foreground"] for pair in pairs]),
        "pairs": len(pairs),
        "blocks": rounds,
        "steps_a_block": steps,
        "stood_still_share": summary(stood_still),
        "slower_with": summary(slower),
    }
    keys = ("foreground", "background", "ratio", "stood_still_share", "slower_with")
    rows = [[key.replace("_", " "), spread(facts[key], ".3f")] for key in keys]
    console.table(facts["what"], ["", "median (min to max)"], rows)
    write(out, facts)


if __name__ == "__main__":
    main()
