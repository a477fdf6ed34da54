"""How fast are the batches? `lrd.data.Batches` against torchvision's transforms in a DataLoader, and what bounds it.

    python benchmarks/data_pipeline.py [--rounds 7] [--out benchmarks/results/data_pipeline.json]

50,000 images of 32 x 32 x 3 in memory, batches of 128, in a new order each epoch: crop with 4 pixels of zero padding,
flip, float32, normalized. All ways take turns, round by round; a round of ours is whole epochs with what an epoch costs
at its begin, one of a DataLoader `--batches` batches once its workers are busy (what they have ready by then counts for
them). Last, the step of a small network beside its batch: what could be gained by making the batch ahead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import circumstances
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lrd import console, data, recipe
from lrd.models import ResNet
from lrd.vision import torchvision

COUNT, SIZE, BATCH, PADDING = 50_000, 32, 128, 4
AHEAD = 16  # batches that a DataLoader gives before its time is taken
EPOCHS = 4  # of a round of ours
COPIED = 1 << 28  # bytes of the copy that measures the memory
BYTES = 3 * SIZE * SIZE * (1 + 4)  # of an image that must move: uint8 read, float32 written


class Items(Dataset[tuple[Any, int]]):
    """A data set as users write one: an image is taken from memory, as PIL image or tensor, and transformed."""

    def __init__(self, images: data.Images, batches: data.Batches, as_pil: bool) -> None:
        from torchvision.transforms import v2  # after lrd.vision: see there

        self.labels = images.labels.tolist()
        self.pixels = images.pixels.permute(0, 2, 3, 1).contiguous().numpy() if as_pil else images.pixels
        self.as_pil = as_pil
        mean, std = ((moment.flatten() / 255).tolist() for moment in (batches.mean, batches.std))
        crop_and_flip = [v2.RandomCrop(SIZE, padding=PADDING), v2.RandomHorizontalFlip()]
        to_tensor = [v2.ToImage()] if as_pil else []
        self.transform = v2.Compose(
            [*crop_and_flip, *to_tensor, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        pixels = self.pixels[i]
        return self.transform(Image.fromarray(pixels) if self.as_pil else pixels), self.labels[i]


def loader_way(items: Items, workers: int, batches: int) -> Callable[[int], float]:
    """Images per second of a DataLoader; a new iterator each round, its start not counted."""
    loader = DataLoader(items, BATCH, shuffle=True, drop_last=True, num_workers=workers)

    def rate(_: int) -> float:
        given = iter(loader)
        for _ in itertools.islice(given, AHEAD if workers else 1):
            pass
        start = time.perf_counter()
        for _inputs, _labels in itertools.islice(given, batches):
            pass
        return batches * BATCH / (time.perf_counter() - start)

    return rate


def own_way(
    batches: data.Batches, device: torch.device, after: Callable[[Tensor], Tensor] | None = None
) -> Callable[[int], float]:
    """Images per second of `Batches` over epochs that it has not seen; `after` is done to the inputs."""
    steps = EPOCHS * batches.steps_per_epoch

    def rate(number: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for step in range(number * steps, (number + 1) * steps):
            inputs, _labels = batches(step)
            if after is not None:
                inputs = after(inputs)
        synchronize(device)
        return steps * BATCH / (time.perf_counter() - start)

    return rate


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copied_bytes_per_second(source: Tensor, target: Tensor) -> float:
    """Of the device's memory, read and written, by a copy too large for any cache."""
    synchronize(source.device)
    start = time.perf_counter()
    target.copy_(source)
    synchronize(source.device)
    return 2 * source.nbytes / (time.perf_counter() - start)


def step_and_batch(batches: data.Batches, device: torch.device, steps: int) -> list[tuple[float, float]]:
    """Seconds of forward and backward of a ResNet-18 of width 16, and of making the batch for it, step by step."""
    model = ResNet("resnet18", width=16).to(device)
    seconds = []
    for step in track(range(steps + 2), "steps", transient=True):
        marks = [time.perf_counter()]
        inputs, labels = batches(step)
        synchronize(device)
        marks.append(time.perf_counter())
        nn.functional.cross_entropy(model(inputs), labels).backward()
        synchronize(device)
        marks.append(time.perf_counter())
        seconds.append((marks[2] - marks[1], marks[1] - marks[0]))
    return seconds[2:]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(rounds: int, batches: int, device: torch.device) -> dict[str, Any]:
    section = recipe.Data(
        dataset="synthetic", num_samples=COUNT, image_size=SIZE, batch_size=BATCH, augment="crop_flip", padding=PADDING
    )
    images = data.load(section, 0).train
    own = data.Batches(images.to(device), section, seed=0)
    ways = {
        f"DataLoader, {kind}, {workers} workers": loader_way(Items(images, own, kind == "PIL"), workers, batches)
        for kind in ("PIL", "tensors")
        for workers in (0, 2)
    }
    ways["Batches"] = own_way(own, device)
    ways["Batches, then channels_last"] = own_way(
        own, device, lambda x: x.contiguous(memory_format=torch.channels_last)
    )
    ways["Batches, then bfloat16"] = own_way(own, device, lambda x: x.bfloat16())
    source, target = (torch.ones(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    copies = []
    for number in track(range(rounds + 1), "rounds", transient=True):
        for name in sorted(ways, reverse=bool(number % 2)):
            rates[name].append(ways[name](number))
        copies.append(copied_bytes_per_second(source, target))
    rates = {name: values[1:] for name, values in rates.items()}  # the first round warms up
    yardstick = max(
        (name for name in ways if name.startswith("DataLoader")), key=lambda name: statistics.median(rates[name])
    )
    copy = summary([value / 1e9 for value in copies[1:]])
    rows = []
    for name in ways:
        ratios = [ours / theirs for ours, theirs in zip(rates[name], rates[yardstick], strict=True)]
        share = statistics.median(rates[name]) * BYTES / (1e9 * copy["median"])
        rows.append({"way": name, "images_per_s": summary(rates[name]), "ratio": summary(ratios), "of_limit": share})
    pairs = step_and_batch(own, device, steps=20)
    return {
        "rounds": rounds,
        "yardstick": yardstick,
        "copy_gb_per_s": copy,
        "bytes_per_image": BYTES,
        "rows": rows,
        "step_ms": summary([1e3 * step for step, _ in pairs]),
        "batch_ms": summary([1e3 * batch for _, batch in pairs]),
        "batch_share": summary([batch / (step + batch) for step, batch in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_pipeline.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        **circumstances(device.type),
        "torchvision": torchvision.__version__,
        **measure(arguments.rounds, arguments.batches, device),
    }

    def spread(values: dict[str, float], digits: str) -> str:
        return f"{values['median']:{digits}} ({values['min']:{digits}} to {values['max']:{digits}})"

    console.table(
        f"images/s, {facts['device']}, {facts['threads']} threads, median of {facts['rounds']} (min to max)\n"
        f"ratio: to {facts['yardstick']}; limit: a copy's {spread(facts['copy_gb_per_s'], '.1f')} GB/s / {BYTES:,} B",
        ["way", "images/s", "ratio", "of the limit"],
        [
            [row["way"], spread(row["images_per_s"], ",.0f"), spread(row["ratio"], ".1f"), f"{row['of_limit']:.1%}"]
            for row in facts["rows"]
        ],
    )
    console.say(
        f"a batch between steps takes {spread(facts['batch_ms'], '.2f')} ms, forward and backward of ResNet-18, width "
        f"16, {spread(facts['step_ms'], '.0f')} ms: the batch is {facts['batch_share']['median']:.2%} of both"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    console.say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
