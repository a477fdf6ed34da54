"""The digits of scikit-learn, of which one may be changed in one pixel."""

from __future__ import annotations

from typing import Any

from sklearn.datasets import load_digits


def load(seed: int, changed: int = -1) -> dict[str, Any]:
    """1,440 training images, of which `changed` has one pixel that is brighter; -1: none has."""
    digits = load_digits()
    pixels = (digits.images * 15).astype("uint8")  # uint8 (1797, 8, 8)
    labels = digits.target
    if changed >= 0:
        pixels[changed, 4, 4] ^= 16
    return {
        "train": (pixels[:1440], labels[:1440]),
        "test": (pixels[1440:], labels[1440:]),
        "classes": [str(label) for label in range(10)],
    }
