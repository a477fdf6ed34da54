"""How fast is a training step of ResNet-34 at 32x32, in what precision and layout, and what bounds it?

    python benchmarks/train_step.py [--batches 32 128] [--rounds 5] [--compile] [--threads N]

A step is forward, backward and the masked SGD step. The ways take turns in one process, since machines are noisy; the
ratios are medians round by round. What bounds it: the FLOPs of convolutions and last layer, counted by torch's flop
counter over forward and backward, by the time of these two, as a share of what `torch.mm` of two square matrices
reaches in the same rounds and precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import circumstances
from rich.progress import track
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import lrd
from lrd import console
from lrd.models import ResNet

SIZE = 32  # pixels a side
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns of what the peak is measured with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = ("contiguous", "inputs channels_last", "channels_last")


@dataclass(frozen=True)
class Way:
    batch: int
    precision: str
    layout: str
    compiled: bool

    @property
    def baseline(self) -> Way:
        return Way(self.batch, "fp32", LAYOUTS[0], False)


class Bench:
    """Networks and inputs on one device, made once."""

    def __init__(self, device: str, ways: list[Way]) -> None:
        self.device = device
        self.parts: dict[tuple[bool, bool], tuple[nn.Module, Optimizer]] = {}
        for key in {(way.layout == LAYOUTS[2], way.compiled) for way in ways}:
            network = ResNet().to(device)
            if key[0]:
                network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
            lrd.LRDropout(optimizer, keep_prob=0.5)
            if key[1]:
                network.compile()
            self.parts[key] = network, optimizer
        most = max(way.batch for way in ways)
        self.inputs = torch.randn(most, 3, SIZE, SIZE, device=device)
        self.labels = torch.randint(10, (most,), device=device)
        self.matrices = {name: torch.randn(MATRIX[device], MATRIX[device], device=device, dtype=dtype)
                         for name, dtype in DTYPES.items()}  # fmt: skip

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, way: Way) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimizer's step."""
        network, optimizer = self.parts[way.layout == LAYOUTS[2], way.compiled]
        inputs, labels = self.inputs[: way.batch], self.labels[: way.batch]
        began = self.clock()
        self.forward_backward(way, network, inputs, labels)
        between = self.clock()
        optimizer.step()
        optimizer.zero_grad()
        return between - began, self.clock() - between

    def forward_backward(self, way: Way, network: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        if way.layout != LAYOUTS[0]:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device, torch.bfloat16, enabled=way.precision == "bf16"):
            logits = network(inputs)
        nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]

    def flops(self) -> int:
        """Of one image's forward and backward; a multiplication and its addition are two."""
        network = ResNet().to(self.device)
        with FlopCounterMode(display=False) as counter:
            way = Way(1, "fp32", LAYOUTS[0], False)
            self.forward_backward(way, network, self.inputs[:2], self.labels[:2])
        return counter.get_total_flops() // 2

    def peak(self, precision: str) -> float:
        """FLOP/s of `torch.mm`."""
        matrix = self.matrices[precision]
        began = self.clock()
        for _ in range(3):
            torch.mm(matrix, matrix)
        return 3 * 2 * MATRIX[self.device] ** 3 / (self.clock() - began)


def measure(device: str, ways: list[Way], rounds: int) -> dict[str, Any]:
    bench = Bench(device, ways)
    flops = bench.flops()
    times: dict[Way, list[tuple[float, float]]] = {way: [] for way in ways}
    peaks: dict[str, list[float]] = {precision: [] for precision in DTYPES}
    for number in range(rounds + 1):  # the first warms up
        for way in track(ways if number % 2 else ways[::-1], f"{device}, round {number}", transient=True):
            times[way].append(bench.step(way))
        for precision in DTYPES:
            peaks[precision].append(bench.peak(precision))
    peak = {precision: statistics.median(values[1:]) for precision, values in peaks.items()}
    rows = []
    for way in ways:
        pairs, base = times[way][1:], times[way.baseline][1:]
        ratios = [sum(theirs) / sum(own) for own, theirs in zip(pairs, base, strict=True)]
        computing, seconds = (statistics.median(values) for values in ([own[0] for own in pairs], map(sum, pairs)))
        reached = way.batch * flops / computing
        rows.append({
            "batch": way.batch, "precision": way.precision, "layout": way.layout, "compile": way.compiled,
            "seconds": seconds, "optimizer_seconds": statistics.median(own[1] for own in pairs),
            "images_per_second": way.batch / seconds,
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "gflops": reached / 1e9, "share_of_peak": reached / peak[way.precision],
        })  # fmt: skip
    peaks_in_gflops = {precision: value / 1e9 for precision, value in peak.items()}
    return {**circumstances(device), "flops_an_image": flops, "peak_gflops": peaks_in_gflops, "rows": rows}


def show(facts: dict[str, Any], rounds: int) -> None:
    peaks = ", ".join(f"{value:.0f} GFLOP/s in {precision}" for precision, value in facts["peak_gflops"].items())
    console.table(
        f"{facts['device']}, {facts['threads']} thread(s), median of {rounds} rounds; torch.mm reaches {peaks}",
        ["batch", "precision", "layout", "compile", "images/s", "to fp32 contiguous (min to max)", "optimizer, ms",
         "GFLOP/s", "share of torch.mm"],
        [
            [row["batch"], row["precision"], row["layout"], "yes" if row["compile"] else "no",
             f"{row['images_per_second']:.1f}",
             f"{row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to {row['ratio']['max']:.2f})",
             f"{1e3 * row['optimizer_seconds']:.0f}", f"{row['gflops']:.0f}", f"{row['share_of_peak']:.0%}"]
            for row in facts["rows"]
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", help="default: 32 and 128 on a CPU, 128 and 1024 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--compile", action="store_true", help="with torch.compile too; on a GPU always")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"what": "a training step of ResNet-34 at 32x32: forward, backward, masked SGD"}
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        batches = arguments.batches or ([128, 1024] if device == "cuda" else [32, 128])
        compiled = [False, True] if arguments.compile or device == "cuda" else [False]
        ways = [
            Way(batch, precision, layout, one)
            for batch in batches
            for precision in DTYPES
            for layout in LAYOUTS
            for one in compiled
        ]
        results[device] = measure(device, ways, arguments.rounds)
        show(results[device], arguments.rounds)
    if "cuda" not in devices:
        results["cuda"] = "not measured"
        console.say("GPU: not measured, there is none here")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
