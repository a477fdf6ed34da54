"""How well would data parallelism scale? A model on paper: step time, gradient bytes and link speed -> efficiency.

    .venv/bin/python benchmarks/paper_model.py [PICTURE.png]

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
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt

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


def efficiencies(computing: float, size: float, bandwidth: float, gpus: Iterable[int] = GPUS) -> list[float]:
    """At each number of GPUs, a multiple of those of a host."""
    reductions = [all_reduce(number // GPUS_A_HOST, size, bandwidth, LATENCY) for number in gpus]
    return [computing / step(computing, reducing, OVERLAP) for reducing in reductions]


def draw(path: Path) -> None:
    """Efficiency over the number of GPUs, a line for each link."""
    numbers = [GPUS_A_HOST * 2**power for power in range(8)]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for panel, (images, computing) in zip(panels, COMPUTING.items(), strict=True):
        for colour, (link, bandwidth) in enumerate(LINKS.items()):
            panel.plot(numbers, efficiencies(computing, 4 * PARAMETERS, bandwidth, numbers), f"C{colour}-", label=link)
            panel.plot(numbers, efficiencies(computing, 2 * PARAMETERS, bandwidth, numbers), f"C{colour}--")
        panel.set_xscale("log", base=2)
        panel.set_xticks(numbers, [str(number) for number in numbers])
        panel.set_xlabel("GPUs, eight a host")
        panel.set_title(f"{images}, {computing * 1e3:.0f} ms a step (assumed)", fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("efficiency")
    figure.legend(
        *panels[0].get_legend_handles_labels(), title="a host's link\n(dashed: bf16)", loc="outside right center"
    )
    figure.savefig(path, dpi=110)


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
            rows = [
                [link, *(f"{value:.2f}" for value in efficiencies(computing, size, bandwidth))]
                for link, bandwidth in LINKS.items()
            ]
            title = f"efficiency, {images} ({computing * 1e3:.0f} ms assumed), gradients in {what}"
            console.table(title, ["a host's link", *(f"{gpus} GPUs" for gpus in GPUS)], rows)
    for picture in sys.argv[1:]:
        draw(Path(picture))
    if RESULTS.exists():
        console.table("two hosts here", ["", "model, s a step", "measured", "measured / model"], compare())


if __name__ == "__main__":
    main()
