"""Folders of small image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save_image_folder(
    root: Path,
    num_train: int = 40,
    num_test: int = 10,
    size: int = 32,
    classes: tuple[str, ...] = ("a", "b", "c"),
    suffix: str = "png",
) -> Path:
    """Save `root/train` and `root/test`, each with images of noise.

    The classes take turns, so they have equally many images, or one more.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", num_train), ("test", num_test)):
        for number in range(count):
            folder = root / part / classes[number % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{number:04d}.{suffix}")
    return root
