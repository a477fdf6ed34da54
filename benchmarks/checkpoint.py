"""How long does training stand still for a checkpoint of the full ResNet-34? In the background against the foreground.

    accelerate launch --config_file launch/accelerate/cpu.yaml benchmarks/checkpoint.py

First the same checkpoint in both ways in turn, with a training step between; then blocks of 100 steps of global batch
128 with one checkpoint and with none in turn, for what the writing takes from the training beside it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RECIPE, RESULTS, circumstances, spread, summary, write
from rich.progress import track

from lrd import console, distributed, recipe
from lrd.job import Job, set_up
from lrd.train import clip, forward_backward, save_checkpoint


def step(job: Job) -> None:
    loss = forward_backward(job)
    norm = clip(job)
    distributed.exchange(loss, norm, 0)
    job.prepared_optimizer.step()
    job.prepared_optimizer.zero_grad()
    job.schedule.step()
    job.step += 1


def saved(job: Job, background: bool) -> float:
    """Seconds that training stood still."""
    job.recipe.checkpoint.background = background
    start = time.perf_counter()
    save_checkpoint(job)
    return time.perf_counter() - start


def write_in_turn(job: Job, pairs: int) -> list[dict[str, float]]:
    """The same checkpoint in the foreground and in the background; the latter is over before the next begins."""
    seconds = []
    for number in track(range(pairs + 1), "pairs", disable=job.writer is None):
        pair = {}
        for way in ("foreground", "background") if number % 2 else ("background", "foreground"):
            step(job)
            pair[way] = saved(job, way == "background")
            distributed.on_main(lambda: job.writer.wait() if job.writer else None)
        seconds.append(pair)
    return seconds[1:]  # the first takes the memory that the others use again


def train_in_turn(job: Job, blocks: int, steps: int) -> list[dict[str, float]]:
    """Seconds of `steps` steps with a checkpoint after the first, with none, and the standing still in the former."""
    rounds = []
    for number in range(blocks):
        seconds = {}
        for what in ("with", "without") if number % 2 else ("without", "with"):
            distributed.on_main(lambda: job.writer.wait() if job.writer else None)
            start = time.perf_counter()
            for i in track(range(steps), f"block {number + 1} {what}", disable=job.writer is None):
                step(job)
                if i == 0 and what == "with":
                    seconds["stood still"] = saved(job, background=True)
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
        job = set_up(recipe.load(RECIPE, [f"run_dir={folder}", "trainer.epochs=1000"]))
        for _ in range(3):
            step(job)
        pairs = write_in_turn(job, arguments.pairs)
        rounds = train_in_turn(job, arguments.blocks, arguments.steps)
        distributed.on_main(lambda: job.writer.wait() if job.writer else None)
    if job.accelerator.is_main_process:
        facts: dict[str, Any] = {
            **circumstances(job.accelerator.device.type),
            "what": "seconds that training stood still for a checkpoint of ResNet-34 (weights and momentum)",
            "ranks": job.accelerator.num_processes,
            "bytes": job.state().nbytes,
            "foreground": summary([pair["foreground"] for pair in pairs]),
            "background": summary([pair["background"] for pair in pairs]),
            "ratio": summary([pair["background"] / pair["foreground"] for pair in pairs]),
            "pairs": len(pairs),
            "blocks": rounds,
            "steps_a_block": arguments.steps,
            "stood_still_share": summary([r["stood still"] / r["without"] for r in rounds]),
            "slower_with": summary([r["with"] / r["without"] - 1 for r in rounds]),
        }
        keys = ("foreground", "background", "ratio", "stood_still_share", "slower_with")
        rows = [[key.replace("_", " "), spread(facts[key], 3)] for key in keys]
        console.table(facts["what"], ["", "median (min to max)"], rows)
        write(arguments.out, facts)
    distributed.leave(0)


if __name__ == "__main__":
    main()
