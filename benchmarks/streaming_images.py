"""JPEGs of photographs' size for benchmarks/streaming.py, made of a folder of small images.

Enlarged images are smooth and would be small files, so noise is added. A file depends on its number
and its source alone: the same command again makes what is missing, with the same bytes.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrd import console
from lrd.host import available_cores

SHORTER_SIDE = (270, 330)  # pixels
LONGEST_SHAPE = 1.4  # the longer side over the shorter one
NOISE = 18.0  # standard deviation, in units of the pixels' values; the same in all channels
QUALITY = 85
TRAINING_IMAGES_PER_TEST_IMAGE = 25  # in ImageNet there are 25.6
LEAST_TEST_IMAGES = 100  # so that each class has some

_PARTS = ("train", "test")
_IMAGES_AT_ONCE = 32  # that a process gets
_NOISE_VALUES = 1 << 20  # drawn once; each image takes some of them
_NAME = re.compile(r"\d{7}\.jpg")


class _Task(NamedTuple):
    """One image that is to be made.

    Attributes:
        seed: two numbers that no other image has.
        source: the small image.
        path: the file.
    """

    seed: tuple[int, int]
    source: Path
    path: Path


def make_images(source: Path, folder: Path, count: int) -> None:
    """Make `folder/train/<class>/*.jpg` and a 25th as many in `folder/test`, or 100.

    Args:
        source: has small images in `train/<class>/` and `test/<class>/`.
        folder: where they are made; may have some of them already.
        count: of training images.
    """
    for part in _PARTS:
        num_images = count if part == "train" else count_test_images(count)
        tasks = _list_tasks(source / part, folder / part, num_images)
        with multiprocessing.Pool(max(1, int(available_cores()))) as pool:
            sizes = pool.imap_unordered(_make_image, tasks, _IMAGES_AT_ONCE)
            total = sum(console.track(sizes, f"making {folder / part}", total=num_images))
        console.info(f"{folder / part}: {num_images:,} images of {total / num_images / 1e3:.1f} kB")


def link_images(folder: Path, subset: Path, count: int) -> None:
    """Make a folder of the first training images of another, and of its first test images.

    They are hard links, so both folders must be on one file system.
    """
    for part in _PARTS:
        num_images = count if part == "train" else count_test_images(count)
        classes = [entry.name for entry in _list_classes(folder / part)]
        for name in classes:
            (subset / part / name).mkdir(parents=True)
        for number in range(num_images):
            path = Path(part) / classes[number % len(classes)] / _file_name(number)
            os.link(folder / path, subset / path)


def count_images(folder: Path) -> int:
    """How many training images `make_images` has made in a folder."""
    return sum(
        bool(_NAME.fullmatch(name))
        for entry in _list_classes(folder / "train")
        for name in os.listdir(entry)
    )


def count_test_images(count: int) -> int:
    """How many test images belong to a number of training images."""
    return max(LEAST_TEST_IMAGES, count // TRAINING_IMAGES_PER_TEST_IMAGE)


def _list_classes(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir())


def _list_tasks(source: Path, folder: Path, num_images: int) -> Iterator[_Task]:
    """The images of a part. Its classes take turns, and so do the small images of a class."""
    part = _PARTS.index(folder.name)
    classes = _list_classes(source)
    files = [sorted(entry.iterdir()) for entry in classes]
    for entry in classes:
        (folder / entry.name).mkdir(parents=True, exist_ok=True)

    for number in range(num_images):
        label = number % len(classes)
        small = files[label][number // len(classes) % len(files[label])]
        path = folder / classes[label].name / _file_name(number)
        yield _Task((part, number), small, path)


def _file_name(number: int) -> str:
    return f"{number:07d}.jpg"


def _make_image(task: _Task) -> int:
    """Make one image, if it is not there, and return its size in bytes."""
    if task.path.exists():
        return task.path.stat().st_size

    rng = np.random.default_rng(task.seed)
    shorter = int(rng.integers(*SHORTER_SIDE, endpoint=True))
    longer = round(shorter * rng.uniform(1.0, LONGEST_SHAPE))
    width, height = (longer, shorter) if rng.random() < 0.75 else (shorter, longer)
    with Image.open(task.source) as small:
        image = small.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)

    start = int(rng.integers(_NOISE_VALUES - height * width))
    noise = _draw_noise()[start : start + height * width].reshape(height, width, 1)
    pixels = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)  # uint8 (H, W, 3)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=QUALITY)

    # A process that is stopped must not leave half a file under its name.
    temporary = task.path.with_suffix(".tmp")
    temporary.write_bytes(content.getvalue())
    temporary.replace(task.path)
    return len(content.getvalue())


@cache
def _draw_noise() -> NDArray[np.int16]:
    values = np.random.default_rng(0).standard_normal(_NOISE_VALUES, dtype=np.float32)
    return np.rint(NOISE * values).astype(np.int16)
