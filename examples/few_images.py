"""A data set of the first images of each class of a folder, which a recipe names as its own data:

    data: {dataset: "examples.few_images:few_images", root: DIR, image_size: 16}

Start in the folder that contains `examples`. With few small images, 200 epochs take minutes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import ImageFolder

Part = tuple[NDArray[np.uint8], list[int]]


def few_images(
    root: str, image_size: int = 16, per_class: int = 250, test_per_class: int = 200
) -> tuple[Part, Part, list[str]]:
    """Read the first images of each class, by name, from `root/train/<class>` and `root/test/...`.

    Args:
        root: the folder.
        image_size: height and width in pixels to which images are resized.
        per_class: how many training images of each class to take.
        test_per_class: the same for test images.

    Returns:
        Training and test part, each pixels, uint8 (N, 3, image_size, image_size), and N labels;
        and the names of the classes.
    """
    train, classes = _read(Path(root) / "train", image_size, per_class)
    test, _ = _read(Path(root) / "test", image_size, test_per_class)
    return train, test, classes


def _read(folder: Path, image_size: int, per_class: int) -> tuple[Part, list[str]]:
    """Read one part of the data set, and the names of its classes."""
    images = ImageFolder(str(folder))

    pixels = []
    labels = []
    taken: Counter[int] = Counter()
    for path, label in images.samples:  # sorted by class and name
        if taken[label] == per_class:
            continue
        taken[label] += 1

        image = images.loader(path).resize((image_size, image_size))
        pixels.append(np.asarray(image).transpose(2, 0, 1))  # (3, image_size, image_size)
        labels.append(label)
    return (np.stack(pixels), labels), images.classes
