"""What do ranks, hosts and links cost, in seconds a step and in bytes on the wire?

    sudo .venv/bin/python benchmarks/ranks.py
    .venv/bin/python benchmarks/ranks.py --local --out benchmarks/results/ranks_one_host.json
    sudo .venv/bin/python benchmarks/ranks.py --exchange --out benchmarks/results/exchange.json

Compared are one rank, two ranks on a host, and two hosts over links of several speeds. Each rank
trains the full ResNet-34 on one thread, with 64 digits of 8x8 a step or 32 images of 32x32. So
efficiency is (images/s of two ranks) / (2 x images/s of one rank).

With --exchange: what it gains to send only the elements that learning rate dropout keeps.

Hosts are network namespaces of this machine (tests/helpers/namespaces.py) and need root; --local
leaves them out. The ways take turns. The time of a step is the median of the times between its
records in TensorBoard.
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

from common import (
    RECIPE,
    RESNET34_PARAMETERS,
    RESULTS,
    ROOT,
    circumstances,
    spread,
    summary,
    write,
)
from rich.progress import track

from lrd import console

sys.path.insert(0, str(ROOT))

from tests.helpers.launching import command, launch
from tests.helpers.namespaces import hosts, launcher
from tests.helpers.tensorboard_events import load_events

IMAGES = {8: 64, 32: 32}  # image size in pixels a side -> images a rank and step
GRADIENT_BYTES = 4 * RESNET34_PARAMETERS
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Way:
    """A number of hosts and ranks, and the link between them.

    Attributes:
        hosts: how many; 0: there is no network.
        ranks: on each host.
        megabits: Mbit/s of each host's link; 0: what the machine gives.
        compression: of the gradients.
        exchange: which elements are sent, `trainer.gradient_exchange`.
        keep_prob: of learning rate dropout.
        size: of the images, in pixels a side.
    """

    name: str
    hosts: int
    ranks: int
    megabits: int = 0
    compression: str = "none"
    exchange: str = "all"
    keep_prob: float = 0.5
    size: int = 8

    @property
    def single_rank_name(self) -> str:
        """The way with one rank with which it is compared, if it is measured."""
        return "1 rank" if self.size == 8 else "1 rank, 32x32"

    @property
    def world_size(self) -> int:
        return max(1, self.hosts) * self.ranks


WAYS = [
    Way("1 rank", hosts=0, ranks=1),
    Way("2 ranks, one host", hosts=0, ranks=2),
    Way("1 rank, 32x32", hosts=0, ranks=1, size=32),
    Way("2 ranks, one host, 32x32", hosts=0, ranks=2, size=32),
    Way("2 hosts", hosts=2, ranks=1),
    Way("2 hosts, bf16", hosts=2, ranks=1, compression="bf16"),
    Way("2 hosts, 1 Gbit/s", hosts=2, ranks=1, megabits=1000),
    Way("2 hosts, 1 Gbit/s, bf16", hosts=2, ranks=1, megabits=1000, compression="bf16"),
    Way("2 hosts, 250 Mbit/s", hosts=2, ranks=1, megabits=250),
    Way("2 hosts, 250 Mbit/s, bf16", hosts=2, ranks=1, megabits=250, compression="bf16"),
]

# What is sent: (name, exchange, compression)
SENDINGS = [
    ("all", "all", "none"),
    ("kept", "kept", "none"),
    ("all, bf16", "all", "bf16"),
    ("kept, bf16", "kept", "bf16"),
]
EXCHANGE_WAYS = [
    Way(f"{place}, {name}", hosts, ranks, megabits, compression, exchange)
    for place, hosts, ranks, megabits in (
        ("2 ranks, one host", 0, 2, 0),
        ("2 hosts", 2, 1, 0),
        ("2 hosts, 1 Gbit/s", 2, 1, 1000),
        ("2 hosts, 250 Mbit/s", 2, 1, 250),
    )
    for name, exchange, compression in SENDINGS
]
BYTES_WAYS = [
    Way(f"{name}, keep_prob {keep_prob}", 2, 1, 0, compression, exchange, keep_prob)
    for keep_prob in (0.9, 0.5, 0.1)
    for name, exchange, compression in SENDINGS
    if exchange == "kept" or keep_prob == 0.5
]


def make_target(way: Way, steps: int) -> list[str]:
    """Build what each rank of a way runs."""
    target = [
        "-m",
        "lrd.train",
        RECIPE,
        f"data.batch_size={IMAGES[way.size] * way.world_size}",
        f"trainer.max_steps={steps}",
        "trainer.epochs=1000",
        "checkpoint.every_steps=0",
        "trainer.fingerprint_every=0",
        "schedule.name=constant",
        f"trainer.gradient_compression={way.compression}",
        f"trainer.gradient_exchange={way.exchange}",
        f"lr_dropout.keep_prob={way.keep_prob}",
        "run_dir=run",
    ]
    if way.size != 8:
        target += ["data.dataset=synthetic", f"data.image_size={way.size}"]
    return target


def measure(way: Way, steps: int) -> dict[str, float]:
    """Train, and return the seconds a step and the bytes that the main host sent in all."""
    target = make_target(way, steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not way.hosts:
            done = launch(command(way.ranks, [*target, f"run_dir={folder / 'run'}"]))
            assert done.returncode == 0, done.stdout + done.stderr
            return {"seconds": median_step_seconds(folder / "run"), "sent": 0}

        with hosts(way.hosts, folder) as all_hosts:
            if way.megabits:
                for host in all_hosts:
                    host.limit(way.megabits)
            processes = [
                host.start(launcher(all_hosts, host, way.ranks, target, "--rdzv_backend", "lrd"))
                for host in all_hosts
            ]
            for process in processes:
                output = process.communicate(timeout=600)[0]
                assert process.returncode == 0, output

            main_host = all_hosts[0]
            seconds = median_step_seconds(main_host.folder / "run")
            return {"seconds": seconds, "sent": main_host.sent_bytes()}


def base_name(way: Way, ways: list[Way]) -> str:
    """What a way's speed is compared with: one rank, or the same hosts sending all elements."""
    if way not in EXCHANGE_WAYS:
        return way.single_rank_name
    return next(
        other.name
        for other in ways
        if (other.hosts, other.megabits) == (way.hosts, way.megabits)
        and (other.exchange, other.compression) == ("all", "none")
    )


def median_step_seconds(run_dir: Path) -> float:
    records = load_events(run_dir).Scalars("train/loss")
    times = [record.wall_time for record in records][WARM_UP_STEPS:]
    return statistics.median(later - earlier for earlier, later in pairwise(times))


def measure_bytes_a_step(way: Way) -> float:
    """Measure what a host sends a step, all headers included, by two runs of different length."""
    short = measure(way, WARM_UP_STEPS + 2)["sent"]
    long = measure(way, WARM_UP_STEPS + 8)["sent"]
    return (long - short) / 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks.json")
    parser.add_argument("--local", action="store_true", help="one host only: needs no root")
    parser.add_argument("--exchange", action="store_true", help="send kept elements alone, or all")
    arguments = parser.parse_args()

    ways = EXCHANGE_WAYS if arguments.exchange else WAYS
    ways = [way for way in ways if not (arguments.local and way.hosts)]
    ways_on_a_wire = BYTES_WAYS if arguments.exchange else ways
    ways_on_a_wire = [way for way in ways_on_a_wire if way.hosts and not way.megabits]
    bytes_a_step = {
        way.name: measure_bytes_a_step(way) for way in track(ways_on_a_wire, "bytes on the wire")
    }

    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        order = ways if number % 2 == 0 else ways[::-1]
        seconds = {}
        for way in track(order, f"round {number + 1}"):
            seconds[way.name] = measure(way, arguments.steps)["seconds"]
        rounds.append(seconds)

    report(ways, rounds, bytes_a_step, arguments.out)


def report(
    ways: list[Way], rounds: list[dict[str, float]], bytes_a_step: dict[str, float], out: Path
) -> None:
    seconds = {way.name: summary([times[way.name] for times in rounds]) for way in ways}
    bases = {way.name: base_name(way, ways) for way in ways}
    ratios = {
        name: summary([times[base] / times[name] for times in rounds])
        for name, base in bases.items()
    }
    facts: dict[str, Any] = {
        **circumstances("cpu"),
        "what": "seconds a step of ResNet-34, 64 digits or 32 images of 32x32 a rank, "
        "one thread a rank; weak scaling",
        "gradient_bytes": GRADIENT_BYTES,
        "sent_bytes_a_step": bytes_a_step,
        "rounds": rounds,
        "seconds": seconds,
        "efficiency" if ways[0] is WAYS[0] else "speed_up": ratios,
    }
    write(out, facts)

    rows = []
    for way in ways:
        median = seconds[way.name]["median"]
        images_per_second = IMAGES[way.size] * way.world_size / median
        cells = [f"{median:.3f}", f"{images_per_second:.0f}", spread(ratios[way.name])]
        rows.append([way.name, *cells, bases[way.name]])
    columns = ["", "seconds a step", "images/s", "speed, median (min to max)", "relative to"]
    console.table("", columns, rows)

    for name, sent in bytes_a_step.items():
        console.info(
            f"{name}: {sent / 1e6:.1f} MB sent a step by a host, "
            f"{sent / GRADIENT_BYTES:.3f} of the gradients' size"
        )


if __name__ == "__main__":
    main()
