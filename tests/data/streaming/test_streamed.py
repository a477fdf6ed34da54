"""Batches that workers read are those of images in memory, bit for bit, wherever they begin."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lrd import recipe as recipes
from lrd.data.batches import Batches, TrainingBatches
from lrd.data.datasets import load_dataset
from lrd.data.images import Dataset, Part
from lrd.data.streaming import streamed
from lrd.data.streaming.streamed import StreamedBatches, StreamedImages
from lrd.errors import UserError
from lrd.job.setup import build_batches
from tests.helpers.image_files import save_image_folder

CLASSES = 3
BATCH = 8  # 40 images: 5 steps in an epoch, or 4 with held-out images
MIXED = {"mixup": 0.4, "cutmix": 1.0}
NORMALIZED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
# All that draws from a generator while an image is read.
RANDOM = {"augment": "resized_crop", "trivial_augment": True, "random_erasing": 0.5}

# Of torch, on a host with fewer than four cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")

opened: list[TrainingBatches] = []


@pytest.fixture(autouse=True)
def closed_batches() -> Iterator[None]:
    """No worker outlives its test."""
    yield
    while opened:
        opened.pop().close()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return save_image_folder(tmp_path_factory.mktemp("images"))


def recipe_of(root: Path, storage: str, accumulation_steps: int = 1, **values) -> recipes.Recipe:
    data = {
        "dataset": "imagefolder",
        "root": str(root),
        "storage": storage,
        "image_size": 32,
        "batch_size": BATCH,
        "workers": 0,
        **values,
    }
    trainer = {"accumulation_steps": accumulation_steps}
    return recipes.parse({"data": data, "trainer": trainer, "seed": 3}, "r.yaml")


def make_batches(
    root: Path, storage: str, rank: int = 0, world_size: int = 1, **values
) -> TrainingBatches:
    recipe = recipe_of(root, storage, **values)
    train = load_dataset(recipe.data, recipe.seed).train
    batches = build_batches(train, recipe, CLASSES, rank, world_size)
    opened.append(batches)
    return batches


def read_steps(batches: TrainingBatches, steps: range) -> list[tuple[Tensor, Tensor]]:
    micro_steps = range(batches.accumulation_steps)
    return [batches.micro_batch(step, micro_step) for step in steps for micro_step in micro_steps]


def assert_same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(expected)
    for number, (found_batch, expected_batch) in enumerate(zip(found, expected, strict=True)):
        for tensor, other in zip(found_batch, expected_batch, strict=True):
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor, other), number


# The same as in memory


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_batches_from_files_are_those_from_memory(root, augment, workers):
    in_memory = make_batches(root, "memory", augment=augment)
    from_files = make_batches(root, "files", augment=augment, workers=workers)
    assert isinstance(in_memory, Batches)
    assert isinstance(from_files, StreamedBatches)
    assert torch.equal(from_files.mean, in_memory.mean)
    assert torch.equal(from_files.std, in_memory.std)

    steps = range(7)  # over the end of an epoch
    from_files.end_step = 7
    assert_same(read_steps(from_files, steps), read_steps(in_memory, steps))
    for step in steps:
        assert torch.equal(from_files.indices(step), in_memory.indices(step))


@pytest.mark.parametrize("mixing", [{}, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize(("world_size", "accumulation_steps"), list(product((1, 2, 4), (1, 2))))
def test_ranks_and_micro_steps_share_the_global_batch(root, world_size, accumulation_steps, mixing):
    settings = {"augment": "crop_flip", **NORMALIZED, **mixing}
    expected = read_steps(make_batches(root, "memory", **settings), range(6))

    ranks = [
        make_batches(
            root, "files", rank, world_size, accumulation_steps=accumulation_steps, **settings
        )
        for rank in range(world_size)
    ]
    for step, (inputs, labels) in enumerate(expected):
        parts = [
            batches.micro_batch(step, micro_step)
            for micro_step in range(accumulation_steps)
            for batches in ranks
        ]
        assert all(len(part) == BATCH // len(parts) for part, _ in parts)
        assert torch.equal(torch.cat([part for part, _ in parts]), inputs)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_mixed_batches_of_micro_steps_are_those_from_memory(root, workers):
    settings = {"augment": "crop", "accumulation_steps": 2, **MIXED}
    in_memory = make_batches(root, "memory", 1, 2, **settings)
    from_files = make_batches(root, "files", 1, 2, workers=workers, **settings)
    from_files.end_step = 6
    assert_same(read_steps(from_files, range(6)), read_steps(in_memory, range(6)))


def test_held_out_images_are_the_same_in_both_storages(root):
    settings = {"augment": "crop_flip", "validation": 0.2, **NORMALIZED}
    in_memory = make_batches(root, "memory", **settings)
    from_files = make_batches(root, "files", **settings)
    assert from_files.steps_per_epoch == in_memory.steps_per_epoch == 4
    assert_same(read_steps(from_files, range(6)), read_steps(in_memory, range(6)))


def read_part(part: Part, batch_size: int, begin: int = 0, end: int | None = None) -> list[Tensor]:
    """All pixels and labels."""
    batches = list(part.read(begin, len(part) if end is None else end, batch_size))
    pixels, labels = zip(*[part.empty_batch(), *batches], strict=True)
    assert all(len(batch) == batch_size for batch in labels[1:-1])
    return [torch.cat(pixels), torch.cat(labels)]


def load(root: Path, storage: str, **values) -> Dataset:
    recipe = recipe_of(root, storage, **values)
    return load_dataset(recipe.data, recipe.seed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resize", [None, 40])
def test_evaluated_images_are_the_same_in_both_storages(root, workers, resize):
    values = {"validation": 0.2, "resize": resize, "workers": workers, "augment": "crop"}
    in_memory = load(root, "memory", **values)
    from_files = load(root, "files", **values)
    assert from_files.classes == in_memory.classes

    for name, expected in in_memory.evaluated_parts.items():
        part = from_files.evaluated_parts[name]
        assert isinstance(part, StreamedImages)
        assert len(part) == len(expected)
        assert part.image_shape == expected.image_shape
        for batch_size in (4, 100):
            pixels, labels = read_part(part, batch_size)
            assert pixels.dtype == torch.uint8
            assert torch.equal(pixels, expected.pixels)
            assert torch.equal(labels, expected.labels)


def test_parts_of_parts_are_the_same_in_both_storages(root):
    in_memory = load(root, "memory").train
    from_files = load(root, "files").train
    new_labels = torch.tensor([2, 0, 1])
    changes = [
        lambda part: part.slice(3, 17),
        lambda part: part.select(torch.tensor([5, 1, 39, 1])),
        lambda part: part.relabel(new_labels),
        lambda part: part.slice(3, 30).select(torch.tensor([9, 0])).relabel(new_labels),
        lambda part: part.relabel(new_labels).slice(0, 5).to(torch.device("cpu")),
        lambda part: part.slice(4, 4),
    ]
    for change in changes:
        expected = change(in_memory)
        pixels, labels = read_part(change(from_files), batch_size=3)
        assert torch.equal(pixels, expected.pixels)
        assert torch.equal(labels, expected.labels)

    pixels, labels = read_part(from_files, 4, begin=6, end=15)
    assert torch.equal(pixels, in_memory.pixels[6:15])
    assert torch.equal(labels, in_memory.labels[6:15])


def test_fewer_images_than_workers_are_read(root):
    part = load(root, "files", workers=4).test.slice(0, 2)
    _, labels = read_part(part, batch_size=8)
    assert len(labels) == 2


# Wherever a run begins


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_random_changes_do_not_depend_on_workers_or_the_start(root, workers):
    settings = {"accumulation_steps": 2, **RANDOM, **MIXED}
    expected = read_steps(make_batches(root, "files", **settings), range(8))

    batches = make_batches(root, "files", workers=workers, **settings)
    batches.end_step = 8
    assert_same(read_steps(batches, range(3, 8)), expected[6:])  # in the middle of an epoch
    assert_same(read_steps(batches, range(4)), expected[:8])  # back, as after an evaluation
    assert_same([batches.micro_batch(2, 1)], expected[5:6])  # in the middle of a step
    for _ in range(2):
        assert_same([batches.micro_batch(3, 0)], expected[6:7])


def test_an_iterator_that_was_left_early_ends_its_workers(root):
    part = load(root, "files", workers=1).train
    for _ in part.read(0, 40, 4):
        break
    _, labels = read_part(part, batch_size=40)
    assert len(labels) == 40


def test_batches_behind_the_last_step_are_not_read_ahead(root, monkeypatch):
    asked = []

    class Recorder:
        """Asks for all batches at once, as many workers might."""

        def __init__(self, reader, batches, workers, pin_memory=False):
            asked.extend(list(batches))
            raise InterruptedError

    monkeypatch.setattr(streamed, "Loader", Recorder)
    for start, accumulation_steps, expected in ((0, 1, 7), (4, 1, 3), (5, 2, 4)):
        batches = make_batches(root, "files", accumulation_steps=accumulation_steps)
        batches.end_step = 7
        asked.clear()
        with pytest.raises(InterruptedError):
            batches.micro_batch(start)
        assert len(asked) == expected
        assert asked[-1][0][0] == 1  # the epoch

        last = batches.indices(6, accumulation_steps - 1).tolist()
        assert [index for _, index in asked[-1]] == last


def test_reading_leaves_the_global_generators_alone(root):
    """Their numbers are drawn elsewhere, by dropout for example."""
    batches = make_batches(root, "files", **RANDOM)
    test = load(root, "files").test

    def draw() -> tuple[Tensor, float, float]:
        return torch.rand(4), float(np.random.random()), random.random()

    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    seed()
    expected = draw()
    seed()
    read_steps(batches, range(2))
    list(test.read(0, 10, 4))
    found = draw()
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


# Files that cannot be decoded


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.fixture
def spoiled_root(root, tmp_path) -> Path:
    """A copy of the folder, in which the images 3, 4 and 39 are damaged; 39 is the last one."""
    copy = tmp_path / "images"
    shutil.copytree(root, copy)
    files = sorted((copy / "train").glob("*/*.png"))
    for index in (3, 4, 39):
        spoil(files[index])
    return copy


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_stops_the_run_with_one_line(spoiled_root, workers):
    batches = make_batches(spoiled_root, "files", workers=workers, **NORMALIZED)
    with pytest.raises(UserError) as caught:
        read_steps(batches, range(5))

    (line,) = str(caught.value).splitlines()
    names = [str(path) for path in sorted((spoiled_root / "train").glob("*/*.png"))]
    assert line.partition(":")[0] in (names[3], names[4], names[39])
    assert "not a readable image" in line
    assert "data.skip_corrupt=true" in line
    assert (f"of {workers})" in line) == (workers > 0)


def test_with_skip_corrupt_the_next_image_takes_the_place(root, spoiled_root, capsys):
    settings = {"augment": "crop_flip", "skip_corrupt": True, **NORMALIZED}
    good = load(root, "memory")
    place_of = {index: index for index in range(40)} | {3: 5, 4: 5, 39: 0}

    batches = make_batches(spoiled_root, "files", workers=2, **settings)
    batches.end_step = 5
    plain = make_batches(spoiled_root, "files", **settings | {"augment": "none"})
    num_read = 0
    for step, (_, labels) in enumerate(read_steps(batches, range(5))):
        inputs, plain_labels = plain.micro_batch(step)
        places = [place_of[index] for index in plain.indices(step).tolist()]
        num_read += len(places)
        assert torch.equal(labels, plain_labels)
        assert torch.equal(labels, good.train.labels[places])
        assert torch.equal(inputs, plain.normalize(good.train.pixels[places]))
    assert num_read == 40
    assert batches.num_replaced == plain.num_replaced == 3

    printed = capsys.readouterr().err
    for index in (3, 4, 39):
        path = sorted((spoiled_root / "train").glob("*/*.png"))[index]
        assert printed.count(str(path)) == 1


def test_ranks_agree_on_what_takes_the_place(spoiled_root):
    settings = {"augment": "crop_flip", "skip_corrupt": True, **NORMALIZED, **MIXED}
    expected = read_steps(make_batches(spoiled_root, "files", **settings), range(5))
    ranks = [make_batches(spoiled_root, "files", rank, 4, **settings) for rank in range(4)]
    for step, (inputs, _) in enumerate(expected):
        parts = [batches.micro_batch(step)[0] for batches in ranks]
        assert torch.equal(torch.cat(parts), inputs)


def test_a_file_that_vanishes_is_named(root, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(root, copy)
    batches = make_batches(copy, "files", **NORMALIZED)
    batches.micro_batch(0)
    for path in (copy / "train").glob("*/*.png"):
        os.unlink(path)
    with pytest.raises(UserError, match=r"^\S+\.png: not a readable image \(No such file or di"):
        batches.micro_batch(1)


def test_a_part_without_a_readable_image_is_refused(root, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(root, copy)
    for path in (copy / "train").glob("*/*.png"):
        spoil(path)
    batches = make_batches(copy, "files", skip_corrupt=True, **NORMALIZED)
    with pytest.raises(UserError, match=r"like the 39 images before it"):
        batches.micro_batch(0)
