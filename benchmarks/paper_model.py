"""How well would data parallelism scale? A model on paper: step time, gradient bytes and link speed -> efficiency.

    .venv/bin/python benchmarks/paper_model.py

An all-reduce sends 2 (n - 1) / n of the gradients' bytes out of each of n parties (ring or halving: the least there
is) and takes 2 log2(n) latencies. GPUs of a host reduce among themselves first, at no cost here, so the parties are
hosts and a host's link carries the gradients once. DDP overlaps it with the backward pass, which is two thirds of the
computing, all but the last bucket's share:

    step = computing + max(0, all-reduce - overlap x 2/3 x computing)
    efficiency = computing / step

With `results/ranks.json` beside it, the model is compared with what was measured there: computing is the step of one
rank, nothing overlaps (on CPUs gloo's threads and the backward pass share the cores).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from lrd import console

RESULTS = Path(__file__).parent / "results" / "ranks.json"
PARAMETERS = 21_282_122
GPUS_A_HOST, LATENCY, OVERLAP = 8, 20e-6, 0.9  # GPUs; seconds; share of the backward pass
COMPUTING = {"128 images a GPU": 5e-3, "1,024 images a GPU": 40e-3}  # seconds; assumed, not measured
LINKS = {"10 Gbit/s": 1.25e9, "25 Gbit/s": 3.125e9, "100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9}  # bytes/s of a host
GPUS = (8, 16, 64, 256, 1024)


def all_reduce(parties: int, size: float, bandwidth: float, latency: float) -> float:
    """Seconds; `size` in bytes, `bandwidth` in bytes a second out of each party."""
    if parties == 1:
        return 0.0
    return 2 * (parties - 1) / parties * size / bandwidth + 2 * math.log2(parties) * latency


def step(computing: float, reducing: float, overlap: float) -> float:
    return computing + max(0.0, reducing - overlap * 2 / 3 * computing)


def predict(computing: float, size: float, bandwidth: float) -> list[str]:
    """The efficiency at each number of GPUs."""
    times = [
        step(computing, all_reduce(gpus // GPUS_A_HOST, size, bandwidth, LATENCY), OVERLAP if gpus > GPUS_A_HOST else 1)
        for gpus in GPUS
    ]
    return [f"{computing / seconds:.2f}" for seconds in times]


def compare() -> list[list[str]]:
    """Measured steps of two hosts over links of known speed against the model."""
    facts = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = []
    for name, seconds in facts["seconds"].items():
        if "bit/s" in name:
            number, unit = name.split(", ")[1].split()
            bandwidth = float(number) * (1e9 if unit == "Gbit/s" else 1e6) / 8
            size = facts["sent_bytes_a_step"]["2 hosts, bf16" if name.endswith("bf16") else "2 hosts"]
            modelled = step(facts["seconds"]["1 rank"]["median"], all_reduce(2, size, bandwidth, 0.0), 0.0)
            rows.append([name, f"{modelled:.2f}", f"{seconds['median']:.2f}", f"{seconds['median'] / modelled:.2f}"])
    return rows


def main() -> None:
    for what, size in (("float32", 4 * PARAMETERS), ("bf16", 2 * PARAMETERS)):
        for images, computing in COMPUTING.items():
            rows = [[link, *predict(computing, size, bandwidth)] for link, bandwidth in LINKS.items()]
            title = f"efficiency, {images} ({computing * 1e3:.0f} ms assumed), gradients in {what}"
            console.table(title, ["a host's link", *(f"{gpus} GPUs" for gpus in GPUS)], rows)
    if RESULTS.exists():
        console.table("two hosts here", ["", "model, s a step", "measured", "measured / model"], compare())


if __name__ == "__main__":
    main()
