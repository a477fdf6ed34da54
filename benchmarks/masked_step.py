"""What does the mask cost? The optimizer's step on ResNet-34's 110 tensors, stock against LRDropout.

    python benchmarks/masked_step.py [--steps 20] [--out benchmarks/results/masked_step.json]

The two step in turn in one process, since machines are noisy; the figure is the median of the ratios pair by pair.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import circumstances
from rich.progress import track

import lrd
from lrd import console
from lrd.models import ResNet

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4},
    "AdamW": {"lr": 1e-4},
}
KEEP_PROBS = (0.5, 0.75, 0.9)


def timed(step: Callable[[], Any], device: str) -> float:
    """Milliseconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def compare(name: str, keep_prob: float, steps: int, device: str) -> dict[str, Any]:
    stock_model = ResNet().to(device)
    masked_model = copy.deepcopy(stock_model)
    for model in (stock_model, masked_model):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
    cls = getattr(torch.optim, name)
    stock = cls(stock_model.parameters(), fused=True, **OPTIMIZERS[name])
    masked = cls(masked_model.parameters(), fused=True, **OPTIMIZERS[name])
    lrd.LRDropout(masked, keep_prob=keep_prob)
    pairs = []
    for _ in track(range(steps + 3), f"{name} {keep_prob}", transient=True):
        pairs.append((timed(stock.step, device), timed(masked.step, device)))
    pairs = pairs[3:]
    ratios = [ours / theirs for theirs, ours in pairs]
    return {
        "optimizer": name,
        "keep_prob": keep_prob,
        "stock_ms": statistics.median(theirs for theirs, _ in pairs),
        "lrdropout_ms": statistics.median(ours for _, ours in pairs),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "n": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/masked_step.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = circumstances(device)
    rows = [compare(name, keep_prob, arguments.steps, device) for name in OPTIMIZERS for keep_prob in KEEP_PROBS]
    console.table(
        f"one step on ResNet-34's tensors, {where['device']}, {where['threads']} threads, median of {arguments.steps}",
        ["optimizer", "keep_prob", "stock fused, ms", "with LRDropout, ms", "ratio (min to max)"],
        [
            [row["optimizer"], row["keep_prob"], f"{row['stock_ms']:.1f}", f"{row['lrdropout_ms']:.1f}",
             f"{row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to {row['ratio']['max']:.2f})"]
            for row in rows
        ],
    )  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    console.say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
