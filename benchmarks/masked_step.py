"""What does the mask cost, in one optimizer step on ResNet-34's 110 tensors?

    python benchmarks/masked_step.py [--rounds 20] [--out benchmarks/results/masked_step.json]

Compared are torch's own steps, the two ways of LRDropout, and the way of public code. All ways step
in turn in one process; a ratio is to the fastest stock step of the same round. The limit is the
memory: the bytes that a step must read and write, at the speed of a copy in the same run.
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
from lrd.parts.resnet import ResNet

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4},
    "Adam": {"lr": 1e-4},
    "AdamW": {"lr": 1e-4},
}
PASSES = {"SGD": 5, "Adam": 7, "AdamW": 7}  # over the parameters: reads and writes of a step
KEEP_PROBS = (0.5, 0.75, 0.9)
SLEEP_CYCLES = 20_000_000  # of a GPU's clock, about 10 ms: longer than to launch a step's kernels
STOCK = {
    "stock, for-loop": {"foreach": False},
    "stock, foreach": {"foreach": True},
    "stock, fused": {"fused": True},
}

# Programs of a fresh process.
COMPILE = (
    "import torch; from lrd.optim.fused import dispatch; "
    "dispatch.matches_torch(torch.optim.{}, torch.device('cpu'))"
)
USE_EMPTY_CACHE = "import numba; numba.config.CACHE_DIR = __import__('tempfile').mkdtemp(); "


def make_parameters(device: str, is_tiny: bool = False) -> list[nn.Parameter]:
    """Make the parameters of a ResNet-34, with gradients.

    Args:
        device: `cpu` or `cuda`.
        is_tiny: a narrow ResNet-18 in its place, to try the benchmark out.
    """
    # Large enough for LRDropout to load its kernels at the first step.
    network = ResNet("resnet18", width=16) if is_tiny else ResNet()
    params = list(network.to(device).parameters())
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    return params


class PublicSGD(torch.optim.Optimizer):
    """Learning rate dropout as in public code.

    It goes tensor by tensor, and draws a Bernoulli mask of floats from the running generator.
    """

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


def make_ways(
    name: str, keep_prob: float, device: str, is_tiny: bool
) -> dict[str, Callable[[], Any]]:
    """Make the step of each way of one optimizer."""
    cls = getattr(torch.optim, name)
    options = OPTIMIZERS[name]

    def make_masked_step(can_fuse: bool, **more_options: Any) -> Callable[[], Any]:
        optimizer = cls(make_parameters(device, is_tiny), **options, **more_options)
        dropout = lrd.LRDropout(optimizer, keep_prob=keep_prob)
        dropout._can_fuse = can_fuse  # whether it may use the compiled kernels
        optimizer.step()
        assert dropout.is_fused == can_fuse
        return optimizer.step

    ways = {}
    for way, stock_options in STOCK.items():
        ways[way] = cls(make_parameters(device, is_tiny), **options, **stock_options).step
    ways["masked, one pass"] = make_masked_step(can_fuse=True)
    ways["masked, generic"] = make_masked_step(can_fuse=False, fused=True)
    if name == "SGD":
        public_optimizer = PublicSGD(make_parameters(device, is_tiny), keep_prob, **options)
        ways["masked, public code's way"] = public_optimizer.step
    return ways


def measure_ms(step: Callable[[], Any], device: str) -> float:
    """Measure a step, in milliseconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure_gpu_ms(step: Callable[[], Any]) -> float:
    """Measure what the GPU itself takes for a step, in milliseconds.

    The GPU is kept busy until all of the step's kernels are launched, as it is by the backward pass
    in training. So the time of Python, which prepares them meanwhile, does not count.
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def compare(
    name: str, keep_prob: float, rounds: int, device: str, is_tiny: bool
) -> list[dict[str, Any]]:
    """Compare all ways of one optimizer.

    Returns:
        A row for each. On a GPU `gpu_milliseconds` and `gpu_ratio` are its own time, without that
        of the CPU.
    """
    ways = make_ways(name, keep_prob, device, is_tiny)
    ways["copy"] = make_copy(make_parameters(device, is_tiny), PASSES[name])
    for _ in range(3):
        for step in ways.values():
            step()

    turns: list[dict[str, float]] = []
    gpu_turns: list[dict[str, float]] = []
    for number in track(range(rounds), f"{name} {keep_prob}", transient=True):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        turns.append({way: measure_ms(ways[way], device) for way in order})
        if device == "cuda":
            gpu_turns.append({way: measure_gpu_ms(ways[way]) for way in order})

    medians = {way: statistics.median(turn[way] for turn in turns) for way in ways}
    fastest_stock = min(STOCK, key=lambda way: medians[way])
    rows: list[dict[str, Any]] = [
        {
            "optimizer": name,
            "keep_prob": keep_prob,
            "way": way,
            "milliseconds": summary([turn[way] for turn in turns]),
            "ratio": summary([turn[way] / turn[fastest_stock] for turn in turns]),
            "share_of_memory_limit": medians["copy"] / medians[way],
            "fastest_stock": fastest_stock,
            "n": rounds,
        }
        for way in ways
    ]
    if not gpu_turns:
        return rows

    gpu_medians = {way: statistics.median(turn[way] for turn in gpu_turns) for way in ways}
    fastest_stock = min(STOCK, key=lambda way: gpu_medians[way])
    for row in rows:
        way = row["way"]
        row["gpu_milliseconds"] = summary([turn[way] for turn in gpu_turns])
        row["gpu_ratio"] = summary([turn[way] / turn[fastest_stock] for turn in gpu_turns])
        row["gpu_share_of_memory_limit"] = gpu_medians["copy"] / gpu_medians[way]
        row["gpu_fastest_stock"] = fastest_stock
    return rows


def make_copy(params: list[nn.Parameter], passes: int) -> Callable[[], Any]:
    """Make a copy of as many bytes as a step moves.

    Args:
        passes: over the parameters, each a read or a write.
    """
    numel = sum(param.numel() for param in params) * passes // 2
    source = torch.ones(numel, device=params[0].device)
    target = torch.ones(numel, device=params[0].device)
    return lambda: target.copy_(source)


def measure_compilation(name: str) -> dict[str, float]:
    """Measure the seconds of a fresh process that compiles the kernels, imports included.

    Returns:
        The seconds with nothing compiled yet (`first`), and with the kernels on disk (`later`).
    """
    kind = "Adam" if name == "AdamW" else name
    program = COMPILE.format(kind)
    seconds = {}
    for what, code in (("first", USE_EMPTY_CACHE + program), ("later", program)):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds[what] = time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), default=["SGD", "AdamW"]
    )
    parser.add_argument("--tiny", action="store_true", help="a small network, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS / "masked_step.json")
    arguments = parser.parse_args()

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    facts = circumstances(device)
    rows = []
    for name in arguments.optimizers:
        for keep_prob in KEEP_PROBS:
            rows += compare(name, keep_prob, arguments.rounds, device, arguments.tiny)

    columns = [
        "optimizer",
        "keep_prob",
        "way",
        "ms",
        "ratio to the fastest stock step",
        "of the memory's limit",
    ]
    cells = [
        [
            row["optimizer"],
            row["keep_prob"],
            row["way"],
            f"{row['milliseconds']['median']:.1f}",
            spread(row["ratio"]),
            f"{row['share_of_memory_limit']:.0%}",
        ]
        for row in rows
    ]
    network = "a small ResNet-18" if arguments.tiny else "ResNet-34"
    title = (
        f"one step on {network}'s tensors, {facts['device']}, {facts['threads']} threads, "
        f"median of {arguments.rounds}"
    )
    console.table(title, columns, cells)

    seconds: dict[str, dict[str, float]] | str = "not measured"
    if device == "cpu" and not arguments.tiny:
        seconds = {name: measure_compilation(name) for name in arguments.optimizers}
    console.info(f"seconds from nothing to compiled and compared, imports included: {seconds}")
    write(arguments.out, {**facts, "rows": rows, "compilation_seconds": seconds})


if __name__ == "__main__":
    main()
