"""How well would data parallelism scale? A model on paper, from step time, bytes and link speed.

    .venv/bin/python benchmarks/paper_model.py [PICTURE.png]

An all-reduce sends 2 (n - 1) / n of the gradients' bytes out of each of n parties (ring or halving:
the least there is) and takes 2 log2(n) latencies. GPUs of a host reduce among themselves first, at
no cost here, so the parties are hosts and a host's link carries the gradients once. DDP overlaps it
with the backward pass, which is two thirds of the computing, all but the last bucket's share:

    step = computing + max(0, all-reduce - overlap x 2/3 x computing)
    efficiency = computing / step

With `results/ranks.json` beside it, the model is compared with what was measured there: computing
is the step of one rank, and nothing overlaps (on CPUs gloo's threads and the backward pass share
the cores).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from common import RESNET34_PARAMETERS, RESULTS

from lrd import console

RANKS = RESULTS / "ranks.json"
GPUS_PER_HOST = 8
LATENCY = 20e-6  # seconds
OVERLAP = 0.9  # share of the backward pass
GPUS = (8, 16, 64, 256, 1024)

# Seconds of computing a step; assumed, not measured.
COMPUTING = {
    "128 images a GPU": 5e-3,
    "1,024 images a GPU": 40e-3,
}

# Bytes a second out of a host.
LINKS = {
    "10 Gbit/s": 1.25e9,
    "25 Gbit/s": 3.125e9,
    "100 Gbit/s": 12.5e9,
    "400 Gbit/s": 50e9,
}

# Bytes of the gradients.
GRADIENTS = {
    "float32": 4 * RESNET34_PARAMETERS,
    "bf16": 2 * RESNET34_PARAMETERS,
}


def all_reduce_seconds(parties: int, size: float, bandwidth: float, latency: float) -> float:
    """Model the seconds of an all-reduce.

    Args:
        size: bytes.
        bandwidth: bytes a second out of each party.
        latency: seconds.
    """
    if parties == 1:
        return 0.0
    return 2 * (parties - 1) / parties * size / bandwidth + 2 * math.log2(parties) * latency


def step_seconds(computing: float, reducing: float, overlap: float) -> float:
    """Model the seconds of a step.

    Args:
        computing: seconds.
        reducing: seconds of the all-reduce.
        overlap: the share of the backward pass that the all-reduce may overlap.
    """
    return computing + max(0.0, reducing - overlap * 2 / 3 * computing)


def efficiencies(
    computing: float, size: float, bandwidth: float, gpus: Iterable[int] = GPUS
) -> list[float]:
    """Model the efficiency at each number of GPUs, a multiple of those of a host."""
    values = []
    for num_gpus in gpus:
        hosts = num_gpus // GPUS_PER_HOST
        reducing = all_reduce_seconds(hosts, size, bandwidth, LATENCY)
        values.append(computing / step_seconds(computing, reducing, OVERLAP))
    return values


def draw(path: Path) -> None:
    """Draw the efficiency over the number of GPUs, with a line for each link."""
    gpus = [GPUS_PER_HOST * 2**power for power in range(8)]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for panel, (images, computing) in zip(panels, COMPUTING.items(), strict=True):
        for number, (link, bandwidth) in enumerate(LINKS.items()):
            float32 = efficiencies(computing, GRADIENTS["float32"], bandwidth, gpus)
            bf16 = efficiencies(computing, GRADIENTS["bf16"], bandwidth, gpus)
            panel.plot(gpus, float32, f"C{number}-", label=link)
            panel.plot(gpus, bf16, f"C{number}--")

        panel.set_xscale("log", base=2)
        panel.set_xticks(gpus, [str(num_gpus) for num_gpus in gpus])
        panel.set_xlabel("GPUs, eight a host")
        panel.set_title(f"{images}, {computing * 1e3:.0f} ms a step (assumed)", fontsize=10)
        panel.grid(alpha=0.3)

    panels[0].set_ylabel("efficiency")
    handles, labels = panels[0].get_legend_handles_labels()
    title = "a host's link\n(dashed: bf16)"
    figure.legend(handles, labels, title=title, loc="outside right center")
    figure.savefig(path, dpi=110)


def compare() -> list[list[str]]:
    """Compare measured steps of two hosts over links of known speed with the model."""
    facts = json.loads(RANKS.read_text(encoding="utf-8"))
    computing = facts["seconds"]["1 rank"]["median"]
    rows = []
    for name, seconds in facts["seconds"].items():
        if "bit/s" not in name:
            continue

        number, unit = name.split(", ")[1].split()
        bandwidth = float(number) * (1e9 if unit == "Gbit/s" else 1e6) / 8
        way = "2 hosts, bf16" if name.endswith("bf16") else "2 hosts"
        size = facts["sent_bytes_a_step"][way]
        reducing = all_reduce_seconds(2, size, bandwidth, latency=0.0)
        modelled = step_seconds(computing, reducing, overlap=0.0)
        measured = seconds["median"]
        row = [name, f"{modelled:.2f}", f"{measured:.2f}", f"{measured / modelled:.2f}"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "picture", type=Path, nargs="?", help="where to draw the efficiency; default: nowhere"
    )
    arguments = parser.parse_args()

    columns = ["a host's link", *(f"{num_gpus} GPUs" for num_gpus in GPUS)]
    for dtype, size in GRADIENTS.items():
        for images, computing in COMPUTING.items():
            rows = []
            for link, bandwidth in LINKS.items():
                values = efficiencies(computing, size, bandwidth)
                rows.append([link, *(f"{value:.2f}" for value in values)])
            title = f"efficiency, {images} ({computing * 1e3:.0f} ms assumed), gradients in {dtype}"
            console.table(title, columns, rows)

    if arguments.picture is not None:
        draw(arguments.picture)
    if RANKS.exists():
        columns = ["", "model, s a step", "measured", "measured / model"]
        console.table("two hosts here", columns, compare())


if __name__ == "__main__":
    main()
