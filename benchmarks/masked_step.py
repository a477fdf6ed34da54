"""What does the mask cost? One step on ResNet-34's 110 tensors: torch's own, LRDropout's two ways, and the public way.

    python benchmarks/masked_step.py [--rounds 20] [--out benchmarks/results/masked_step.json]

All ways step in turn in one process; a ratio is to the fastest stock step of the same round. The limit is the memory:
the bytes that a step must read and write, at the speed of a copy in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, spread, summary, write
from rich.progress import track
from torch import nn

import lrd
from lrd import console
from lrd.models import ResNet

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4},
    "AdamW": {"lr": 1e-4},
}
PASSES = {"SGD": 5, "AdamW": 7}  # over the parameters: reads and writes of a step
KEEP_PROBS = (0.5, 0.75, 0.9)
STOCK = {"stock, for-loop": {"foreach": False}, "stock, foreach": {"foreach": True}, "stock, fused": {"fused": True}}
COMPILE = "import torch, lrd; from lrd import fused; fused.is_trusted(torch.optim.{}, torch.device('cpu'))"


def parameters(device: str) -> list[nn.Parameter]:
    params = list(ResNet().to(device).parameters())
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    return params


class PublicSGD(torch.optim.Optimizer):
    """Learning rate dropout as public code does it: tensor by tensor, a Bernoulli draw of floats from the generator."""

    def __init__(self, params: list[nn.Parameter], keep_prob: float, **options: float) -> None:
        super().__init__(params, options)
        self.keep_prob = keep_prob

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad.add(param, alpha=group["weight_decay"])
                buffer = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                buffer.mul_(group["momentum"]).add_(grad)
                kept = torch.bernoulli(torch.full_like(param, self.keep_prob))
                param.add_(buffer * kept, alpha=-group["lr"])


def ways(name: str, keep_prob: float, device: str) -> dict[str, Callable[[], Any]]:
    """Each way's step. The same optimizer, but `masked, generic` keeps the compiled kernels out of it."""
    cls, options = getattr(torch.optim, name), OPTIMIZERS[name]
    steps = {way: cls(parameters(device), **options, **how).step for way, how in STOCK.items()}
    for way, can_fuse, how in (("masked, one pass", True, {}), ("masked, generic", False, {"fused": True})):
        optimizer = cls(parameters(device), **options, **how)
        dropout = lrd.LRDropout(optimizer, keep_prob=keep_prob)
        dropout._can_fuse = can_fuse
        optimizer.step()
        assert dropout.is_fused == can_fuse
        steps[way] = optimizer.step
    if name == "SGD":
        steps["masked, public code's way"] = PublicSGD(parameters(device), keep_prob, **options).step
    return steps


def milliseconds(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def compare(name: str, keep_prob: float, rounds: int, device: str) -> list[dict[str, Any]]:
    steps = ways(name, keep_prob, device)
    steps["copy"] = copy_of(parameters(device), PASSES[name])
    for _ in range(3):
        [step() for step in steps.values()]
    turns: list[dict[str, float]] = []
    for number in track(range(rounds), f"{name} {keep_prob}", transient=True):
        order = list(steps.items()) if number % 2 == 0 else list(steps.items())[::-1]
        turns.append({way: milliseconds(step, device) for way, step in order})
    medians = {way: statistics.median(turn[way] for turn in turns) for way in steps}
    fastest = min(STOCK, key=medians.__getitem__)
    return [
        {
            "optimizer": name,
            "keep_prob": keep_prob,
            "way": way,
            "milliseconds": summary([turn[way] for turn in turns]),
            "ratio": summary([turn[way] / turn[fastest] for turn in turns]),
            "share_of_memory_limit": medians["copy"] / medians[way],
            "fastest_stock": fastest,
            "n": rounds,
        }
        for way in steps
    ]


def copy_of(params: list[nn.Parameter], passes: int) -> Callable[[], Any]:
    """A copy of as many bytes as a step reads and writes in `passes` passes over the parameters."""
    numel = sum(param.numel() for param in params) * passes // 2
    source, target = (torch.ones(numel, device=params[0].device) for _ in range(2))
    return lambda: target.copy_(source)


def compilation(name: str) -> dict[str, float]:
    """Seconds in a fresh process, imports included: nothing compiled yet, and found on disk."""
    kind = "Adam" if name == "AdamW" else name
    seconds = {}
    for what in ("first", "later"):
        start = time.perf_counter()
        forget = "import numba; numba.config.CACHE_DIR = __import__('tempfile').mkdtemp(); " if what == "first" else ""
        subprocess.run([sys.executable, "-c", forget + COMPILE.format(kind)], check=True)
        seconds[what] = time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "masked_step.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = circumstances(device)
    cases = [(name, keep_prob) for name in OPTIMIZERS for keep_prob in KEEP_PROBS]
    rows = [row for name, keep_prob in cases for row in compare(name, keep_prob, arguments.rounds, device)]
    console.table(
        f"one step on ResNet-34's tensors, {where['device']}, {where['threads']} threads, median of {arguments.rounds}",
        ["optimizer", "keep_prob", "way", "ms", "ratio to the fastest stock step", "of the memory's limit"],
        [
            [row["optimizer"], row["keep_prob"], row["way"], f"{row['milliseconds']['median']:.1f}",
             spread(row["ratio"]), f"{row['share_of_memory_limit']:.0%}"]
            for row in rows
        ],
    )  # fmt: skip
    seconds = {name: compilation(name) for name in OPTIMIZERS} if device == "cpu" else "not measured"
    console.say(f"seconds from nothing to compiled and compared, imports included: {seconds}")
    write(arguments.out, {**where, "rows": rows, "compilation_seconds": seconds})


if __name__ == "__main__":
    main()
