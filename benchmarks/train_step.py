"""How fast is a training step of ResNet-34 at 32x32, by precision and layout, and what bounds it?

    python benchmarks/train_step.py [--batches 32 128] [--rounds 5] [--compile] [--threads N]

A step is forward, backward and the masked SGD step. The ways take turns in one process, since
machines are noisy; the ratios are medians round by round.

What bounds it: torch's flop counter counts the FLOPs of convolutions and last layer over forward
and backward. Divided by the time of these two they are a share of what `torch.mm` of two square
matrices reaches in the same rounds and precision.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, spread, summary, write
from rich.progress import track
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import lrd
from lrd import console
from lrd.parts.resnet import ResNet

IMAGE_SIZE = 32  # pixels a side
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices that measure the peak
TINY_MATRIX_SIZE = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

CONTIGUOUS = "contiguous"
INPUTS_CHANNELS_LAST = "inputs channels_last"
CHANNELS_LAST = "channels_last"
LAYOUTS = (CONTIGUOUS, INPUTS_CHANNELS_LAST, CHANNELS_LAST)


@dataclass(frozen=True)
class Way:
    batch: int
    precision: str
    layout: str
    compiled: bool

    @property
    def baseline(self) -> Way:
        return Way(self.batch, "fp32", CONTIGUOUS, False)

    @property
    def network_key(self) -> tuple[bool, bool]:
        """Ways with the same key share a network."""
        return self.layout == CHANNELS_LAST, self.compiled


class Bench:
    """Networks and inputs on one device, made once."""

    def __init__(self, device: str, ways: list[Way], is_tiny: bool) -> None:
        self.device = device
        self.is_tiny = is_tiny
        self.networks: dict[tuple[bool, bool], tuple[nn.Module, Optimizer]] = {}
        for way in ways:
            if way.network_key not in self.networks:
                self.networks[way.network_key] = self._make_network(*way.network_key)

        max_batch = max(way.batch for way in ways)
        self.inputs = torch.randn(max_batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        self.labels = torch.randint(10, (max_batch,), device=device)

        self.size = TINY_MATRIX_SIZE if is_tiny else MATRIX_SIZE[device]
        self.matrices = {
            precision: torch.randn(self.size, self.size, device=device, dtype=dtype)
            for precision, dtype in DTYPES.items()
        }

    def _make_resnet(self) -> nn.Module:
        network = ResNet("resnet18", width=4) if self.is_tiny else ResNet()
        return network.to(self.device)

    def _make_network(self, channels_last: bool, compiled: bool) -> tuple[nn.Module, Optimizer]:
        network = self._make_resnet()
        if channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
        lrd.LRDropout(optimizer, keep_prob=0.5)
        if compiled:
            network.compile()
        return network, optimizer

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, way: Way) -> tuple[float, float]:
        """Take a step. Returns seconds of forward and backward, and of the optimizer's step."""
        network, optimizer = self.networks[way.network_key]
        inputs = self.inputs[: way.batch]
        labels = self.labels[: way.batch]

        start = self.clock()
        self.forward_backward(way, network, inputs, labels)
        has_gradients = self.clock()
        optimizer.step()
        optimizer.zero_grad()
        return has_gradients - start, self.clock() - has_gradients

    def forward_backward(
        self, way: Way, network: nn.Module, inputs: Tensor, labels: Tensor
    ) -> None:
        if way.layout != CONTIGUOUS:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device, torch.bfloat16, enabled=way.precision == "bf16"):
            logits = network(inputs)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    def count_flops(self) -> int:
        """Count the FLOPs of one image's forward and backward.

        A multiplication and its addition are two.
        """
        network = self._make_resnet()
        way = Way(1, "fp32", CONTIGUOUS, False)
        with FlopCounterMode(display=False) as counter:
            self.forward_backward(way, network, self.inputs[:2], self.labels[:2])
        return counter.get_total_flops() // 2

    def measure_peak(self, precision: str) -> float:
        """Measure the FLOP/s of `torch.mm`."""
        matrix = self.matrices[precision]
        start = self.clock()
        for _ in range(3):
            torch.mm(matrix, matrix)
        return 3 * 2 * self.size**3 / (self.clock() - start)


def measure(device: str, ways: list[Way], rounds: int, is_tiny: bool) -> dict[str, Any]:
    if device == "cuda":
        # torch lets convolutions use TF32 and multiplications not. The peak must be of the same.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    bench = Bench(device, ways, is_tiny)
    flops = bench.count_flops()
    times: dict[Way, list[tuple[float, float]]] = {way: [] for way in ways}
    peaks: dict[str, list[float]] = {precision: [] for precision in DTYPES}
    for number in range(rounds + 1):
        order = ways if number % 2 else ways[::-1]
        for way in track(order, f"{device}, round {number}", transient=True):
            times[way].append(bench.step(way))
        for precision in DTYPES:
            peaks[precision].append(bench.measure_peak(precision))

    # The first round warms up.
    times = {way: pairs[1:] for way, pairs in times.items()}
    median_peaks = {precision: statistics.median(values[1:]) for precision, values in peaks.items()}

    rows = []
    for way in ways:
        totals = [sum(pair) for pair in times[way]]
        baseline_totals = [sum(pair) for pair in times[way.baseline]]
        ratios = [
            baseline_total / total
            for total, baseline_total in zip(totals, baseline_totals, strict=True)
        ]
        seconds = statistics.median(totals)
        forward_backward_seconds = statistics.median(pair[0] for pair in times[way])
        flops_per_second = way.batch * flops / forward_backward_seconds
        row = {
            "batch": way.batch,
            "precision": way.precision,
            "layout": way.layout,
            "compile": way.compiled,
            "seconds": seconds,
            "optimizer_seconds": statistics.median(pair[1] for pair in times[way]),
            "images_per_second": way.batch / seconds,
            "ratio": summary(ratios),
            "gflops": flops_per_second / 1e9,
            "share_of_peak": flops_per_second / median_peaks[way.precision],
        }
        rows.append(row)

    return {
        **circumstances(device),
        "rounds": rounds,
        "tf32": device == "cuda" and torch.backends.cudnn.allow_tf32,
        "flops_an_image": flops,
        "peak_gflops": {precision: value / 1e9 for precision, value in median_peaks.items()},
        "rows": rows,
    }


def show(facts: dict[str, Any], rounds: int) -> None:
    columns = [
        "batch",
        "precision",
        "layout",
        "compile",
        "images/s",
        "to fp32 contiguous (min to max)",
        "optimizer, ms",
        "GFLOP/s",
        "share of torch.mm",
    ]
    cells = [
        [
            row["batch"],
            row["precision"],
            row["layout"],
            "yes" if row["compile"] else "no",
            f"{row['images_per_second']:.1f}",
            spread(row["ratio"]),
            f"{1e3 * row['optimizer_seconds']:.0f}",
            f"{row['gflops']:.0f}",
            f"{row['share_of_peak']:.0%}",
        ]
        for row in facts["rows"]
    ]
    peaks = ", ".join(
        f"{value:.0f} GFLOP/s in {precision}" for precision, value in facts["peak_gflops"].items()
    )
    title = (
        f"{facts['device']}, {facts['threads']} thread(s), median of {rounds} rounds; "
        f"torch.mm reaches {peaks}"
    )
    console.table(title, columns, cells)


def make_ways(batches: list[int], compiled: list[bool]) -> list[Way]:
    return [
        Way(batch, precision, layout, is_compiled)
        for batch in batches
        for precision in DTYPES
        for layout in LAYOUTS
        for is_compiled in compiled
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--batches", type=int, nargs="+", help="default: 32 and 128 on a CPU, 128 and 1024 on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile too; default: on a GPU",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=["cpu", "cuda"],
        help="default: the CPU, and a GPU if there is one",
    )
    parser.add_argument("--tiny", action="store_true", help="a small network, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_step.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    results: dict[str, Any] = {
        "what": "a training step of ResNet-34 at 32x32: forward, backward, masked SGD"
    }
    devices = arguments.devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    for device in devices:
        default_batches = [128, 1024] if device == "cuda" else [32, 128]
        is_compiled = device == "cuda" if arguments.compile is None else arguments.compile
        compiled = [False, True] if is_compiled else [False]
        ways = make_ways(arguments.batches or default_batches, compiled)
        results[device] = measure(device, ways, arguments.rounds, arguments.tiny)
        show(results[device], arguments.rounds)

    if not torch.cuda.is_available():
        results["cuda"] = "not measured"
        console.info("GPU: not measured, there is none here")
    write(arguments.out, results)


if __name__ == "__main__":
    main()
