"""How fast are the batches of `lrd.data.batches`, compared with torchvision in a DataLoader?

    python benchmarks/data_pipeline.py [--rounds 7] [--out benchmarks/results/data_pipeline.json]

There are 50,000 images of 32 x 32 x 3 in memory and batches of 128, in a new order each epoch: crop
with 4 pixels of zero padding, flip, float32, normalized. The ways take turns, round by round.

- A round of `Batches` is whole epochs, including what an epoch costs at its start.
- A round of a DataLoader is `--batches` batches, counted once its workers are busy. What they have
  ready by then counts in their favour.

The limit is the memory: the bytes of an image that must move, at the speed of a copy. Last, the
step of a small network is compared with the making of its batch, which is what could be gained by
making batches ahead.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, spread, summary, write
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lrd import console, recipe
from lrd.data import datasets
from lrd.data.batches import Batches
from lrd.data.datasets import Images
from lrd.parts.resnet import ResNet
from lrd.torchvision_compat import torchvision

NUM_IMAGES = 50_000
IMAGE_SIZE = 32  # pixels a side
BATCH_SIZE = 128
PADDING = 4  # pixels

WARM_UP_BATCHES = 16  # batches of a DataLoader with workers before its time is taken
EPOCHS = 4  # of a round of `Batches`
COPIED_BYTES = 1 << 28  # of the copy that measures the memory
BYTES_PER_IMAGE = 3 * IMAGE_SIZE * IMAGE_SIZE * (1 + 4)  # uint8 is read, float32 is written


class Items(Dataset[tuple[Any, int]]):
    """A data set as users write it: each image is taken from memory and transformed.

    Args:
        images: all images.
        batches: has the mean and the standard deviation.
        as_pil: whether the images are PIL images; otherwise they are tensors.
    """

    def __init__(self, images: Images, batches: Batches, as_pil: bool) -> None:
        # After lrd.torchvision_compat; see there.
        from torchvision.transforms import v2

        self.as_pil = as_pil
        self.labels = images.labels.tolist()
        self.pixels = images.pixels
        if as_pil:
            self.pixels = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()

        mean = (batches.mean.flatten() / 255).tolist()
        std = (batches.std.flatten() / 255).tolist()
        transforms = [
            v2.RandomCrop(IMAGE_SIZE, padding=PADDING),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
        if as_pil:
            transforms.insert(2, v2.ToImage())
        self.transform = v2.Compose(transforms)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        pixels = self.pixels[i]
        image = Image.fromarray(pixels) if self.as_pil else pixels
        return self.transform(image), self.labels[i]


def make_loader_way(items: Items, workers: int, batches: int) -> Callable[[int], float]:
    """Make a function that measures the images per second of a DataLoader.

    Each round takes a new iterator, whose start is not counted.
    """
    loader = DataLoader(items, BATCH_SIZE, shuffle=True, drop_last=True, num_workers=workers)

    def measure_rate(_: int) -> float:
        iterator = iter(loader)
        for _ in itertools.islice(iterator, WARM_UP_BATCHES if workers else 1):
            pass

        start = time.perf_counter()
        for _inputs, _labels in itertools.islice(iterator, batches):
            pass
        return batches * BATCH_SIZE / (time.perf_counter() - start)

    return measure_rate


def make_batches_way(
    batches: Batches, device: torch.device, convert: Callable[[Tensor], Tensor] | None = None
) -> Callable[[int], float]:
    """Make a function that measures the images per second of `Batches`.

    Each round has epochs that no round before had.

    Args:
        convert: is called with the inputs of each batch.
    """
    steps = EPOCHS * batches.steps_per_epoch

    def measure_rate(round_number: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for step in range(round_number * steps, (round_number + 1) * steps):
            inputs, _labels = batches.micro_batch(step)
            if convert is not None:
                inputs = convert(inputs)
        synchronize(device)
        return steps * BATCH_SIZE / (time.perf_counter() - start)

    return measure_rate


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_copy(source: Tensor, target: Tensor) -> float:
    """Measure bytes per second, read and written, of a copy too large for any cache."""
    synchronize(source.device)
    start = time.perf_counter()
    target.copy_(source)
    synchronize(source.device)
    return 2 * source.nbytes / (time.perf_counter() - start)


def measure_steps(batches: Batches, device: torch.device, steps: int) -> list[tuple[float, float]]:
    """Measure steps of a ResNet-18 of width 16.

    Returns:
        For each step, the seconds of forward and backward, and the seconds of making its batch.
    """
    model = ResNet("resnet18", width=16).to(device)
    seconds = []
    for step in track(range(steps + 2), "steps", transient=True):
        start = time.perf_counter()
        inputs, labels = batches.micro_batch(step)
        synchronize(device)

        has_batch = time.perf_counter()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        synchronize(device)

        end = time.perf_counter()
        seconds.append((end - has_batch, has_batch - start))
    return seconds[2:]  # the first two warm up


def measure(rounds: int, num_batches: int, device: torch.device) -> dict[str, Any]:
    section = recipe.Data(
        dataset="synthetic",
        num_samples=NUM_IMAGES,
        image_size=IMAGE_SIZE,
        batch_size=BATCH_SIZE,
        augment="crop_flip",
        padding=PADDING,
    )
    images = datasets.load_dataset(section, 0).train
    batches = Batches(images.to(device), section, seed=0)

    ways: dict[str, Callable[[int], float]] = {}
    for kind in ("PIL", "tensors"):
        for workers in (0, 2):
            items = Items(images, batches, as_pil=kind == "PIL")
            name = f"DataLoader, {kind}, {workers} workers"
            ways[name] = make_loader_way(items, workers, num_batches)
    loader_ways = list(ways)

    ways["Batches"] = make_batches_way(batches, device)
    ways["Batches, then channels_last"] = make_batches_way(
        batches, device, lambda x: x.contiguous(memory_format=torch.channels_last)
    )
    ways["Batches, then bfloat16"] = make_batches_way(batches, device, lambda x: x.bfloat16())

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    copies = []
    for number in track(range(rounds + 1), "rounds", transient=True):
        for name in sorted(ways, reverse=bool(number % 2)):
            rates[name].append(ways[name](number))
        copies.append(measure_copy(source, target) / 1e9)

    # The first round warms up.
    rates = {name: values[1:] for name, values in rates.items()}
    copy = summary(copies[1:])

    medians = {name: statistics.median(values) for name, values in rates.items()}
    yardstick = max(loader_ways, key=lambda name: medians[name])
    rows = []
    for name in ways:
        pairs = zip(rates[name], rates[yardstick], strict=True)
        row = {
            "way": name,
            "images_per_s": summary(rates[name]),
            "ratio": summary([rate / yardstick_rate for rate, yardstick_rate in pairs]),
            "of_limit": medians[name] * BYTES_PER_IMAGE / (1e9 * copy["median"]),
        }
        rows.append(row)

    seconds = measure_steps(batches, device, steps=20)
    return {
        "rounds": rounds,
        "yardstick": yardstick,
        "copy_gb_per_s": copy,
        "bytes_per_image": BYTES_PER_IMAGE,
        "rows": rows,
        "step_ms": summary([1e3 * step for step, _ in seconds]),
        "batch_ms": summary([1e3 * batch for _, batch in seconds]),
        "batch_share": summary([batch / (step + batch) for step, batch in seconds]),
    }


def show(facts: dict[str, Any]) -> None:
    rows = []
    for row in facts["rows"]:
        rate = spread(row["images_per_s"], ",.0f")
        ratio = spread(row["ratio"], ".1f")
        rows.append([row["way"], rate, ratio, f"{row['of_limit']:.1%}"])

    copy = spread(facts["copy_gb_per_s"], ".1f")
    title = (
        f"images/s, {facts['device']}, {facts['threads']} threads, "
        f"median of {facts['rounds']} (min to max)\n"
        f"ratio: to {facts['yardstick']}; limit: a copy's {copy} GB/s / {BYTES_PER_IMAGE:,} B"
    )
    console.table(title, ["way", "images/s", "ratio", "of the limit"], rows)

    console.info(
        f"a batch between steps takes {spread(facts['batch_ms'])} ms, forward and backward of "
        f"ResNet-18, width 16, {spread(facts['step_ms'], '.0f')} ms: the batch is "
        f"{facts['batch_share']['median']:.2%} of both"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "data_pipeline.json")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        **circumstances(device.type),
        "torchvision": torchvision.__version__,
        **measure(arguments.rounds, arguments.batches, device),
    }
    show(facts)
    write(arguments.out, facts)


if __name__ == "__main__":
    main()
