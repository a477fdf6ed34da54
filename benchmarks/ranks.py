"""What do ranks and hosts cost? One rank, two on a host, two hosts, over links of several speeds; bytes on the wire.

    sudo .venv/bin/python benchmarks/ranks.py
    .venv/bin/python benchmarks/ranks.py --local --out benchmarks/results/ranks_one_host.json

Full ResNet-34, one thread a rank, so that efficiency is (images/s of two ranks) / (2 x images/s of one): 64 digits of
8x8 a rank and step, or 32 images of 32x32. Hosts are network namespaces of this machine (tests/network.py): root only;
--local leaves them out. The ways take turns. A step's time is the median between its records in TensorBoard.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import RECIPE, RESULTS, ROOT, circumstances, spread, summary, write
from rich.progress import track

from lrd import console

sys.path.insert(0, str(ROOT / "tests"))

from launching import EventAccumulator, command, launch
from network import hosts, launcher

IMAGES = {8: 64, 32: 32}  # a rank and step, by their size
GRADIENTS = 4 * 21_282_122  # bytes
FIRST = 3  # steps that warm up


@dataclass(frozen=True)
class Way:
    """`hosts` 0: no network; `megabits` 0: what the machine gives."""

    name: str
    hosts: int
    ranks: int  # on each host
    megabits: int = 0
    compression: str = "none"
    size: int = 8  # of the images

    @property
    def alone(self) -> str:
        """The way with one rank that it is compared with."""
        return "1 rank" if self.size == 8 else "1 rank, 32x32"

    @property
    def world_size(self) -> int:
        return max(1, self.hosts) * self.ranks


WAYS = [
    Way("1 rank", 0, 1),
    Way("2 ranks, one host", 0, 2),
    Way("1 rank, 32x32", 0, 1, size=32),
    Way("2 ranks, one host, 32x32", 0, 2, size=32),
    Way("2 hosts", 2, 1),
    Way("2 hosts, bf16", 2, 1, 0, "bf16"),
    Way("2 hosts, 1 Gbit/s", 2, 1, 1000),
    Way("2 hosts, 1 Gbit/s, bf16", 2, 1, 1000, "bf16"),
    Way("2 hosts, 250 Mbit/s", 2, 1, 250),
    Way("2 hosts, 250 Mbit/s, bf16", 2, 1, 250, "bf16"),
]


def measure(way: Way, steps: int) -> dict[str, float]:
    """Seconds a step, and the bytes that the main host sent in all."""
    target = [
        "-m",
        "lrd.train",
        RECIPE,
        f"data.batch_size={IMAGES[way.size] * way.world_size}",
        f"trainer.max_steps={steps}",
    ]
    target += ["trainer.epochs=1000", "checkpoint.every_steps=0", "trainer.fingerprint_every=0", "run_dir=run"]
    if way.size != 8:
        target += ["data.dataset=synthetic", f"data.image_size={way.size}"]
    target += ["schedule.name=constant", f"trainer.gradient_compression={way.compression}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not way.hosts:
            done = launch(command(way.ranks, [*target, f"run_dir={folder / 'run'}"]))
            assert done.returncode == 0, done.stdout + done.stderr
            return {"seconds": step_seconds(folder / "run"), "sent": 0}
        with hosts(way.hosts, folder) as own:
            for host in own if way.megabits else []:
                host.limit(way.megabits)
            started = [host.start(launcher(own, host, way.ranks, target, "--rdzv_backend", "lrd")) for host in own]
            for process in started:
                output = process.communicate(timeout=600)[0]
                assert process.returncode == 0, output
            return {"seconds": step_seconds(own[0].folder / "run"), "sent": own[0].sent_bytes()}


def step_seconds(run_dir: Path) -> float:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    times = [record.wall_time for record in events.Scalars("train/loss")][FIRST:]
    return statistics.median(later - earlier for earlier, later in pairwise(times))


def sent_a_step(way: Way) -> float:
    """Bytes, all headers included, from two runs of different length."""
    few, many = measure(way, FIRST + 2)["sent"], measure(way, FIRST + 8)["sent"]
    return (many - few) / 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks.json")
    parser.add_argument("--local", action="store_true", help="one host only: needs no root")
    arguments = parser.parse_args()
    all_ways = [way for way in WAYS if not (arguments.local and way.hosts)]
    counted = [way for way in all_ways if way.hosts and not way.megabits]
    bytes_a_step = {way.name: sent_a_step(way) for way in track(counted, "bytes on the wire")}
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        ways = all_ways if number % 2 == 0 else all_ways[::-1]
        rounds.append(
            {way.name: measure(way, arguments.steps)["seconds"] for way in track(ways, f"round {number + 1}")}
        )
    facts: dict[str, Any] = {
        **circumstances("cpu"),
        "what": "seconds a step of ResNet-34, 64 digits or 32 images of 32x32 a rank, one thread a rank; weak scaling",
        "gradient_bytes": GRADIENTS,
        "sent_bytes_a_step": bytes_a_step,
        "rounds": rounds,
        "seconds": {way.name: summary([one[way.name] for one in rounds]) for way in all_ways},
        "efficiency": {way.name: summary([one[way.alone] / one[way.name] for one in rounds]) for way in all_ways},
    }
    write(arguments.out, facts)
    rows = []
    for way in all_ways:
        seconds, efficiency = facts["seconds"][way.name], facts["efficiency"][way.name]
        speed = IMAGES[way.size] * way.world_size / seconds["median"]
        rows.append([way.name, f"{seconds['median']:.3f}", f"{speed:.0f}", spread(efficiency)])
    console.table("", ["", "seconds a step", "images/s", "efficiency, median (min to max)"], rows)
    for name, sent in bytes_a_step.items():
        console.say(f"{name}: {sent / 1e6:.1f} MB sent a step by a host, {sent / GRADIENTS:.3f} of the gradients' size")


if __name__ == "__main__":
    main()
