"""What does `optimizer.step()` cost where the tensors are small, with and without the mask?

    python benchmarks/small_models.py [--rounds 25] [--out benchmarks/results/small_models.json]
    python benchmarks/small_models.py --checkout ../before --out /dev/null

Compared are the stock optimizer, LRDropout, and learning rate dropout written by hand: clone all
parameters, step, draw a uniform number for each element and let `torch.where` choose. All ways step
in turn in one process, once the kernels are loaded; a ratio is to the stock step of the same round.

The last table has whole training steps of a small network: forward, backward and the update.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, summary, write
from rich.progress import track
from torch import nn
from torch.optim import Optimizer

import lrd
from lrd import console

SIZES = ((1, 1000), (6, 1700), (10, 1000), (100, 100), (300, 10_000))  # tensors, elements of each
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-4, "momentum": 0.9},
    "Adam": {"lr": 1e-4},
}
KEEP_PROBS = (0.5, 0.9)
THREADS = (1, 2)
WAYS = ("stock", "LRDropout 0.5", "LRDropout 0.9", "by hand 0.5", "by hand 0.9")

WARM_UP_STEPS = 5
SECONDS_PER_TURN = 0.004  # for which one way steps before the next one does

Way = Callable[[], Any]


class Steps:
    """The steps of one optimizer in one way."""

    def __init__(self, way: str, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._keep_prob = float(way.split()[-1]) if " " in way else 1.0

        self.step: Way = optimizer.step
        if way.startswith("LRDropout"):
            # Equal masks of two optimizers would be warned of.
            seed = WAYS.index(way)
            self._dropout = lrd.LRDropout(optimizer, keep_prob=self._keep_prob, seed=seed)
        elif way.startswith("by hand"):
            self.step = self._step_by_hand

    @property
    def is_fused(self) -> bool:
        return hasattr(self, "_dropout") and self._dropout.is_fused

    @torch.no_grad()
    def _step_by_hand(self) -> None:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        old_values = [param.clone() for param in params]
        self._optimizer.step()
        for param, old in zip(params, old_values, strict=True):
            is_kept = torch.rand(param.shape) < self._keep_prob
            param.copy_(torch.where(is_kept, param, old))


def make_optimizer(name: str, params: list[nn.Parameter]) -> Optimizer:
    optimizer: Optimizer = getattr(torch.optim, name)(params, **OPTIMIZERS[name])
    return optimizer


def make_steps(name: str, n_tensors: int, numel: int) -> tuple[dict[str, Way], bool]:
    """The step of each way, and whether LRDropout takes it in one pass."""
    all_steps = {}
    for way in WAYS:
        params = [nn.Parameter(torch.randn(numel)) for _ in range(n_tensors)]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        all_steps[way] = Steps(way, make_optimizer(name, params))

    for steps in all_steps.values():
        for _ in range(WARM_UP_STEPS):
            steps.step()
    is_fused = all_steps["LRDropout 0.5"].is_fused
    return {way: steps.step for way, steps in all_steps.items()}, is_fused


def make_training_steps(name: str) -> tuple[dict[str, Way], bool]:
    """The whole training step of a network of 9,930 parameters in six tensors, for each way."""
    inputs = torch.randn(32, 32)
    labels = torch.arange(32) % 10

    all_steps = {}
    training_steps: dict[str, Way] = {}
    for way in WAYS:
        network = nn.Sequential(
            nn.Linear(32, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 10)
        )
        steps = Steps(way, make_optimizer(name, list(network.parameters())))
        all_steps[way] = steps

        def train(network: nn.Module = network, steps: Steps = steps) -> None:
            for param in network.parameters():
                param.grad = None
            loss = nn.functional.cross_entropy(network(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            steps.step()

        training_steps[way] = train
        for _ in range(WARM_UP_STEPS):
            train()

    assert sum(param.numel() for param in network.parameters()) == 9_930
    return training_steps, all_steps["LRDropout 0.5"].is_fused


def load_kernels() -> None:
    """Take a large step, which loads the kernels: from then on small steps use them too."""
    for name in OPTIMIZERS:
        param = nn.Parameter(torch.zeros(1 << 18))
        param.grad = torch.zeros_like(param)
        Steps("LRDropout 0.5", make_optimizer(name, [param])).step()


def measure_us(step: Way, n_calls: int) -> float:
    """Measure a step, in microseconds: the mean of some calls in a row."""
    start = time.perf_counter()
    for _ in range(n_calls):
        step()
    return 1e6 * (time.perf_counter() - start) / n_calls


def compare(ways: dict[str, Way], rounds: int) -> dict[str, Any]:
    """Step in all ways in turn.

    Returns:
        For each way, the microseconds and the ratio to the stock step.
    """
    n_calls = {}
    for way, step in ways.items():
        us = min(measure_us(step, 1) for _ in range(3))
        n_calls[way] = max(1, int(1e6 * SECONDS_PER_TURN / us))

    turns = []
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        turns.append({way: measure_us(ways[way], n_calls[way]) for way in order})

    return {
        way: {
            "microseconds": summary([turn[way] for turn in turns]),
            "ratio_to_stock": summary([turn[way] / turn["stock"] for turn in turns]),
        }
        for way in ways
    }


def measure_all(rounds: int) -> list[dict[str, Any]]:
    """A row for each optimizer, size and number of threads."""
    cases: list[tuple[int, str, tuple[int, int] | None]] = [
        (threads, name, size)
        for threads in THREADS
        for name in OPTIMIZERS
        for size in (*SIZES, None)
    ]
    rows = []
    for threads, name, size in track(cases, "small models", transient=True):
        torch.set_num_threads(threads)
        ways, is_fused = make_steps(name, *size) if size else make_training_steps(name)
        row = {
            "threads": threads,
            "optimizer": name,
            "what": f"{size[0]} x {size[1]:,}" if size else "network, whole step",
            "is_fused": is_fused,
            "n": rounds,
            "ways": compare(ways, rounds),
        }
        rows.append(row)

    return rows


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    cells = []
    for row in rows:
        medians = [f"{row['ways'][way]['microseconds']['median']:.0f}" for way in WAYS]
        ratios = [f"{row['ways'][way]['ratio_to_stock']['median']:.2f}" for way in WAYS[1:3]]
        cells.append([row["threads"], row["optimizer"], row["what"], *medians, *ratios])

    columns = ["threads", "optimizer", "tensors", *WAYS, "0.5 : stock", "0.9 : stock"]
    console.table(title, columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "small_models.json")
    parser.add_argument("--checkout", type=Path, help="measure the package of another checkout")
    arguments = parser.parse_args()

    # The package is imported already, so another one needs another process.
    if arguments.checkout is not None:
        package = arguments.checkout.resolve() / "lrd"
        if Path(lrd.__file__).parent != package:
            # torch would load this checkout's entry point, which the other one may lack.
            environment = {
                **os.environ,
                "PYTHONPATH": str(package.parent),
                "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            }
            command = [sys.executable, *sys.argv]
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)

    load_kernels()
    facts = circumstances("cpu")
    rows = measure_all(arguments.rounds)
    title = f"microseconds, {facts['device']}, median of {arguments.rounds}"
    print_table(rows, title)
    write(arguments.out, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
