"""Many repetitions of scikit-learn's digits, of which one is damaged, as a recipe's own data:

    lrd train examples/one_bad_sample.yaml run_dir=runs/bad

docs/time-machine.md finds out which one it is. Start in the folder that contains `examples`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]

NUM_TRAIN = 16_384
NUM_TEST = 360
NUM_ORIGINALS = 300
DAMAGED = 5_531  # with seed 0 it comes at step 812


def digits(is_damaged: bool = True, noise: float = 8.0) -> tuple[Part, Part, list[str]]:
    """Repeat the digits, each time with other noise.

    Args:
        is_damaged: whether one training image consists of random bytes.
        noise: its standard deviation, of 255.

    Returns:
        Training and test part, each pixels, uint8 (N, 8, 8), and labels, int64 (N,); and the names
        of the classes.
    """
    original = load_digits()
    scaled = original.images * (255 / 16)  # float64 (1797, 8, 8)
    rng = np.random.default_rng(0)

    chosen = rng.integers(0, NUM_ORIGINALS, NUM_TRAIN)
    images = scaled[chosen]
    images = images + noise * rng.standard_normal(images.shape)
    train = images.clip(0, 255).astype(np.uint8)
    labels = original.target[chosen]

    if is_damaged:
        train[DAMAGED] = rng.integers(0, 2, (8, 8)) * 255

    test = scaled[-NUM_TEST:].astype(np.uint8)
    classes = [str(label) for label in range(10)]
    return (train, labels), (test, original.target[-NUM_TEST:]), classes
