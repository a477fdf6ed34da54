"""How far is the exchange of kept elements from dense learning rate dropout, after many steps?

    .venv/bin/python benchmarks/exchange_equality.py

ResNet-18 of width 8 trains on scikit-learn's digits under DDP on 2, 3 and 4 CPU ranks: with the
dense exchange, with that of kept elements, and with the dense one while each rank takes the batch
of its neighbour. The last two differ from the first only in how sums over the ranks are rounded, so
the last one is the yardstick: it shows what rounding alone does to this training. In float64 too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ACCELERATE, RESULTS, ROOT, circumstances, write
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import lrd
from lrd import console
from lrd.parts.resnet import ResNet

RANKS = (2, 3, 4)
DTYPES = ("float64", "float32")
KEEP_PROBS = (0.5, 0.1)
BATCH_SIZE = 16  # of a rank
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def load_digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalized images, (N, 3, 8, 8), and labels, int64 (N,)."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.tensor(digits.images, dtype=dtype)[:, None].repeat(1, 3, 1, 1)
    return (images - images.mean()) / images.std(), torch.tensor(digits.target)


def train(dtype: torch.dtype, keep_prob: float, steps: int, kind: str) -> tuple[Any, list[float]]:
    """Train one network.

    Args:
        kind: `dense`, `kept`, or `rotated`: dense, with the neighbour's batches.

    Returns:
        Its parameters, and the loss of the ranks' mean at each step.
    """
    torch.manual_seed(0)
    network = ResNet("resnet18", width=8).to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), **OPTIONS)
    lrd.LRDropout(optimizer, keep_prob=keep_prob, seed=1)
    ddp_model = DistributedDataParallel(network)
    if kind == "kept":
        lrd.exchange_kept(ddp_model, optimizer)

    world_size = dist.get_world_size()
    place = (dist.get_rank() + (kind == "rotated")) % world_size
    images, labels = load_digits(dtype)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (world_size, BATCH_SIZE), generator=generator)[place]
        optimizer.zero_grad()
        loss = cross_entropy(ddp_model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()

        mean_loss = loss.detach().double()
        dist.all_reduce(mean_loss)
        losses.append(float(mean_loss) / world_size)
    return [parameter.detach() for parameter in network.parameters()], losses


def compare(network: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two parameters, relative to the parameter's largest element."""
    pairs = zip(network, other, strict=True)
    return max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)


def run_rank(steps: int) -> None:
    """What each rank runs; rank 0 prints the results as JSON."""
    warnings.filterwarnings("ignore", "two optimizers step in turn")
    dist.init_process_group("gloo")
    rows = []
    for dtype in DTYPES:
        for keep_prob in KEEP_PROBS:
            settings = (getattr(torch, dtype), keep_prob, steps)
            dense, dense_losses = train(*settings, kind="dense")
            kept, kept_losses = train(*settings, kind="kept")
            rotated, rotated_losses = train(*settings, kind="rotated")
            rows.append(
                {
                    "ranks": dist.get_world_size(),
                    "dtype": dtype,
                    "keep_prob": keep_prob,
                    "kept": compare(kept, dense),
                    "rotated": compare(rotated, dense),
                    "last_losses": [dense_losses[-1], kept_losses[-1], rotated_losses[-1]],
                }
            )
    if dist.get_rank() == 0:
        print(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "exchange_equality.json")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments.steps)
        return

    rows: list[dict[str, Any]] = []
    config = ["--config_file", str(ROOT / "launch" / "accelerate" / "cpu.yaml")]
    for ranks in track(RANKS, "numbers of ranks"):
        command = [*ACCELERATE, *config, "--num_processes", str(ranks), __file__]
        done = subprocess.run(
            [*command, "--steps", str(arguments.steps)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows += json.loads(done.stdout.splitlines()[-1])

    facts = {
        **circumstances("cpu"),
        "what": "largest difference of parameters from dense learning rate dropout, relative to "
        "the parameter's largest element; ResNet-18 of width 8 on the digits",
        "steps": arguments.steps,
        "batch_size_of_a_rank": BATCH_SIZE,
        "optimizer": OPTIONS,
        "rows": rows,
    }
    write(arguments.out, facts)
    cells = [
        [
            row["ranks"],
            row["dtype"],
            row["keep_prob"],
            f"{row['kept']:.1e}",
            f"{row['rotated']:.1e}",
        ]
        for row in rows
    ]
    columns = ["ranks", "dtype", "keep_prob", "kept elements", "dense, other order of summation"]
    console.table("", columns, [[str(cell) for cell in row] for row in cells])


if __name__ == "__main__":
    sys.exit(main())
