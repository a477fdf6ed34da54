"""How fast are images that stay on disk read, what memory do they take, and does training wait?

    python benchmarks/streaming.py --make DIR --source SMALL --count 100000
    python benchmarks/streaming.py --data DIR [--rounds 5]
    python benchmarks/streaming.py --data DIR --memory
    python benchmarks/streaming.py --data DIR --wait

The first makes JPEGs of 30 to 60 kB out of the small images in SMALL/train and SMALL/test
(streaming_images.py). The others measure:

- Without an option: images per second that are ready for the network, which is a normalized float32
  batch on the CPU. Compared are the files and the packed images of `lrd` with the pipeline of
  torchvision's classification reference: Pillow decodes, `transforms.v2` crops, resizes, flips and
  normalizes, torch's DataLoader collates; with as many workers. With "uint8" the batches are those
  that `lrd` copies to a GPU, which then normalizes them; torchvision's reference copies float32
  there. The ways take turns, round by round, and no round has the images of another one if there
  are enough. A rate is counted once the workers are busy. Then the stages of each way in one
  process, and a model on paper. `--images` takes only the first so many images, in a folder of
  their own beside DIR: so many that the system's cache holds them, for example.
- `--memory`: what all ranks and workers of a host take, how long it is to the first step, and
  whether that grows with the number of images or from epoch to epoch (streaming_runs.py).
- `--wait`: the share of its time in which a training of ResNet-34 waits for images
  (streaming_runs.py).

The images are packed first if they are not (`lrd data pack`). Files that were read lately may be in
the system's cache: a data set that fits there is read from memory, a larger one from the disk.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import streaming_runs
import torch
from common import RESULTS, circumstances, spread, summary, write
from PIL import Image
from rich.progress import track
from streaming_images import count_images, link_images, make_images
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lrd import console, recipe
from lrd.data.batches import normalize
from lrd.data.datasets import load_dataset
from lrd.data.decoding import simplejpeg
from lrd.data.positions import seed_for_sample
from lrd.data.streaming.augmentation import Augmentation
from lrd.data.streaming.packing import pack_folder
from lrd.data.streaming.streamed import StreamedBatches
from lrd.host import available_cores
from lrd.job.setup import build_batches
from lrd.torchvision_compat import torchvision

SIZE = 224  # pixels a side
BATCH_SIZE = 128
MEAN = [0.485, 0.456, 0.406]  # of ImageNet
STD = [0.229, 0.224, 0.225]
IMAGES_FOR_STAGES = 512
PAPER_CORES = 16

REFERENCE = "torchvision"
STORAGES = ("files", "packed")
UINT8 = ", uint8"  # after the storage: batches as they are copied to a GPU
STAGES = ("read and decode", "crop, resize, flip", "collate", "to float, normalize")


def make_section(root: Path, storage: str, workers: int, size: int) -> recipe.Data:
    return recipe.Data(
        dataset="imagefolder",
        root=str(root),
        batch_size=BATCH_SIZE,
        image_size=size,
        augment="resized_crop",
        mean=MEAN,
        std=STD,
        storage=storage,
        workers=workers,
    )


def make_batches(section: recipe.Data) -> StreamedBatches:
    dataset = load_dataset(section, seed=0)
    whole_recipe = recipe.Recipe(data=section)
    batches = build_batches(
        dataset.train, whole_recipe, num_classes=len(dataset.classes), rank=0, world_size=1
    )
    assert isinstance(batches, StreamedBatches)
    return batches


def make_reference(root: Path, size: int) -> Any:
    """The training images as torchvision's references/classification reads and changes them."""
    # After lrd.torchvision_compat; see there.
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return torchvision.datasets.ImageFolder(str(root / "train"), transform)


def count_warm_up_batches(workers: int) -> int:
    """Batches that the workers have made before the others, or are making; and one more."""
    return 2 * workers + 1


def make_lrd_way(
    root: Path, storage: str, workers: int, size: int, num_batches: int, is_uint8: bool = False
) -> Callable[[int], float]:
    """Make a function that measures the images per second of `lrd`."""
    batches = make_batches(make_section(root, storage, workers, size))
    if is_uint8:
        batches.normalize = lambda pixels: pixels  # type: ignore[method-assign]
    num_warm_up = count_warm_up_batches(workers)
    steps = num_warm_up + num_batches

    def measure_rate(round_number: int) -> float:
        first = round_number * steps
        for step in range(first, first + num_warm_up):
            batches.micro_batch(step)

        start = time.perf_counter()
        for step in range(first + num_warm_up, first + steps):
            batches.micro_batch(step)
        seconds = time.perf_counter() - start
        batches.close()
        return num_batches * BATCH_SIZE / seconds

    return measure_rate


def make_reference_way(
    root: Path, workers: int, size: int, num_batches: int
) -> Callable[[int], float]:
    """Make a function that measures the images per second of torchvision and a DataLoader."""
    images = make_reference(root, size)
    num_warm_up = count_warm_up_batches(workers)

    def measure_rate(round_number: int) -> float:
        sampler = RandomSampler(
            images,
            num_samples=(num_warm_up + num_batches) * BATCH_SIZE,
            generator=torch.Generator().manual_seed(round_number),
        )
        iterator = iter(DataLoader(images, BATCH_SIZE, sampler=sampler, num_workers=workers))
        for _ in itertools.islice(iterator, num_warm_up):
            pass

        start = time.perf_counter()
        for _inputs, _labels in iterator:
            pass
        return num_batches * BATCH_SIZE / (time.perf_counter() - start)

    return measure_rate


def measure_rates(
    root: Path, all_workers: list[int], size: int, rounds: int, num_batches: int
) -> list[dict[str, Any]]:
    """Measure the images per second of each way with each number of workers.

    Returns:
        A row for each, with its ratio to the reference with as many workers.
    """
    ways: dict[tuple[str, int], Callable[[int], float]] = {}
    for workers in all_workers:
        ways[REFERENCE, workers] = make_reference_way(root, workers, size, num_batches)
        for storage in STORAGES:
            for suffix in ("", UINT8):
                ways[storage + suffix, workers] = make_lrd_way(
                    root, storage, workers, size, num_batches, is_uint8=suffix == UINT8
                )

    rates: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
    for number in track(range(rounds), "rounds", transient=True):
        for key in list(ways)[:: -1 if number % 2 else 1]:
            rates[key].append(ways[key](number))

    rows = []
    for (name, workers), values in rates.items():
        pairs = zip(values, rates[REFERENCE, workers], strict=True)
        row = {
            "way": name,
            "workers": workers,
            "images_per_s": summary(values),
            "ratio": summary([rate / reference for rate, reference in pairs]),
        }
        rows.append(row)
    return rows


class Stages:
    """The seconds that each image spends in each stage, in one process.

    Attributes:
        seconds: of each image in each stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def measure(self, stage: str, function: Callable[[], Any], num_images: int = 1) -> Any:
        """Call a function of one or more images, and return what it returns."""
        start = time.perf_counter()
        result = function()
        self.seconds[stage].append((time.perf_counter() - start) / num_images)
        return result

    def milliseconds(self) -> dict[str, float]:
        """The mean of each stage for an image."""
        return {stage: 1e3 * statistics.mean(values) for stage, values in self.seconds.items()}


def measure_lrd_stages(
    root: Path, storage: str, size: int, indices: list[list[int]]
) -> dict[str, float]:
    """Measure what `ImageReader`, the workers' collation and `StreamedBatches` do.

    Args:
        indices: of the images of each batch.
    """
    section = make_section(root, storage, workers=0, size=size)
    batches = make_batches(section)
    source = batches.images.reader.source  # type: ignore[attr-defined]
    augmentation = Augmentation(section, size, mean=[255.0 * value for value in MEAN])
    stages = Stages()

    def read(index: int) -> Tensor:
        seed_for_sample(seed=0, epoch=0, index=index)
        region: Tensor = source.read_region(index, augmentation.choose_region, size)
        return region

    for batch in indices:
        images = []
        for index in batch:
            region = stages.measure(STAGES[0], partial(read, index))
            images.append(stages.measure(STAGES[1], partial(augmentation.finish, region)))
        pixels = stages.measure(STAGES[2], partial(torch.stack, images), len(batch))
        to_float = partial(normalize, pixels, batches.mean, batches.std)
        stages.measure(STAGES[3], to_float, len(batch))
    return stages.milliseconds()


def measure_reference_stages(root: Path, size: int, indices: list[list[int]]) -> dict[str, float]:
    """Measure what torchvision's pipeline does; see `measure_lrd_stages`."""
    images = make_reference(root, size)
    crop, flip, to_tensor, to_float, normalize_floats = images.transform.transforms
    stages = Stages()

    def change(image: Image.Image) -> Tensor:
        pixels: Tensor = to_tensor(flip(crop(image)))
        return pixels

    for batch in indices:
        inputs = []
        for index in batch:
            path, _ = images.samples[index]
            image = stages.measure(STAGES[0], partial(images.loader, path))
            pixels = stages.measure(STAGES[1], partial(change, image))
            # In this pipeline each image is normalized before it is collated.
            make_floats = lambda pixels=pixels: normalize_floats(to_float(pixels))  # noqa: E731
            inputs.append(stages.measure(STAGES[3], make_floats))
        stages.measure(STAGES[2], partial(torch.stack, inputs), len(batch))
    return stages.milliseconds()


def measure_stages(root: Path, size: int) -> dict[str, dict[str, float]]:
    """Measure the milliseconds of an image in each stage, in one process, by way."""
    count = min(IMAGES_FOR_STAGES, count_images(root))
    order = torch.randperm(count_images(root), generator=torch.Generator().manual_seed(0))
    chosen = order[:count].tolist()
    indices = [chosen[start : start + BATCH_SIZE] for start in range(0, count, BATCH_SIZE)]

    measured = {REFERENCE: measure_reference_stages(root, size, indices)}
    for storage in STORAGES:
        measured[storage] = measure_lrd_stages(root, storage, size, indices)
    return measured


def model_on_paper(stages: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What 16 cores give, and what a GPU needs.

    A worker does all stages but the last one, which `lrd` does on the GPU; torchvision's does all.
    Nothing is taken off for memory and disk, which the cores share.
    """
    rates = {}
    for way, milliseconds in stages.items():
        in_worker = sum(milliseconds.values())
        if way != REFERENCE:
            in_worker -= milliseconds[STAGES[3]]
        rates[way] = PAPER_CORES * 1e3 / in_worker
    return {
        "cores": PAPER_CORES,
        "images_per_s": rates,
        "seconds_a_step_of_256_images": {way: 256 / rate for way, rate in rates.items()},
        "gpu_images_per_s": "not measured",
        "formula": "a GPU that trains R images/s waits for none if R is at most images_per_s",
    }


def show(facts: dict[str, Any]) -> None:
    rows = [
        [
            row["way"],
            row["workers"],
            spread(row["images_per_s"], ",.0f"),
            spread(row["ratio"]),
        ]
        for row in facts["rates"]
    ]
    title = (
        f"images/s ready for the network, {facts['size']} x {facts['size']} pixels, "
        f"{facts['images']:,} images, {facts['device']}, {facts['cores']} cores, "
        f"median of {facts['rounds']} (min to max)\nratio: to {REFERENCE} with as many workers"
    )
    console.table(title, ["way", "workers", "images/s", "ratio"], rows)

    stages = facts["stages_ms"]
    rows = [[stage, *(f"{stages[way][stage]:.2f}" for way in stages)] for stage in STAGES]
    console.table("ms an image, one process and thread", ["stage", *stages], rows)

    paper = facts["on_paper"]
    for way, rate in paper["images_per_s"].items():
        seconds = paper["seconds_a_step_of_256_images"][way]
        console.info(
            f"on paper {paper['cores']} cores give {rate:,.0f} images/s ({way}): enough for a GPU "
            f"whose step of 256 images takes {1e3 * seconds:.0f} ms or more (GPU: not measured)"
        )


def measure_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)  # as each worker has; else a single process would use all cores
    rates = measure_rates(
        root=arguments.data,
        all_workers=[0, arguments.workers],
        size=arguments.size,
        rounds=arguments.rounds,
        num_batches=arguments.batches,
    )
    stages = measure_stages(arguments.data, arguments.size)
    return {
        "size": arguments.size,
        "batch_size": BATCH_SIZE,
        "images": count_images(arguments.data),
        "rounds": arguments.rounds,
        "batches_a_round": arguments.batches,
        "rates": rates,
        "stages_ms": stages,
        "on_paper": model_on_paper(stages),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--make", type=Path, metavar="DIR", help="make images there, and end")
    what.add_argument("--data", type=Path, metavar="DIR", help="the images that --make made")
    parser.add_argument("--source", type=Path, help="with --make: the folder of small images")
    parser.add_argument("--count", type=int, default=100_000, help="with --make: training images")

    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--memory", action="store_true", help="measure memory and start-up")
    parts.add_argument("--wait", action="store_true", help="measure how long training waits")
    parser.add_argument("--size", type=int, default=SIZE, help="of the network's inputs, in pixels")
    parser.add_argument("--images", type=int, help="measure with the first so many images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20, help="of a round")
    parser.add_argument("--workers", type=int, default=max(1, int(available_cores())))
    parser.add_argument("--steps", type=int, default=30, help="with --wait: of a training")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="with --memory"
    )
    parser.add_argument(
        "--epoch-images", type=int, default=10_000, help="with --memory: of five epochs"
    )
    parser.add_argument("--out", type=Path, help="the file of results")
    arguments = parser.parse_args()
    if arguments.make is not None and arguments.source is None:
        parser.error("--make needs --source")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.make is not None:
        make_images(arguments.source, arguments.make, arguments.count)
        return

    size = streaming_runs.size_before_crop(arguments.size)
    if arguments.images is not None:
        subset = arguments.data.with_name(f"{arguments.data.name}-{arguments.images}")
        if not subset.exists():
            link_images(arguments.data, subset, arguments.images)
        arguments.data = subset
    pack_folder(arguments.data, arguments.data, size=size, skip_corrupt=False)
    facts: dict[str, Any] = {
        **circumstances("cpu"),
        "torchvision": torchvision.__version__,
        "jpeg_decoder": "Pillow" if simplejpeg is None else "simplejpeg",
    }
    if arguments.memory:
        name = "streaming_memory"
        facts |= streaming_runs.measure_memory(
            arguments.data, arguments.counts, arguments.epoch_images, arguments.size
        )
        streaming_runs.show_memory(facts)
    elif arguments.wait:
        name = "streaming_wait"
        facts |= streaming_runs.measure_wait(arguments.data, arguments.steps, arguments.size)
        streaming_runs.show_wait(facts)
    else:
        name = "streaming"
        facts |= measure_speed(arguments)
        show(facts)
    write(arguments.out or RESULTS / f"{name}.json", facts)


if __name__ == "__main__":
    main()
