"""Labelled images in memory, and a data set of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrd import philox
from lrd.errors import UserError
from lrd.philox import Domain


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: uint8 (N, 3, H, W).
        labels: int64 (N,).
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """Copy pixels and labels to a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def select(self, indices: Tensor) -> Images:
        """Copy the images with these indices, int64 (M,)."""
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory, and the names of the classes.

    Attributes:
        train: training images.
        test: test images.
        classes: name of each class, by its label.
        validation: images held out from the training images; None if there are none.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    validation: Images | None = None

    @property
    def evaluated_parts(self) -> dict[str, Images]:
        """The parts on which the network is evaluated: `test`, and `validation` if there is one."""
        if self.validation is None:
            return {"test": self.test}
        return {"test": self.test, "validation": self.validation}

    def to(self, device: torch.device) -> Dataset:
        """Copy all images to a device."""
        return Dataset(
            train=self.train.to(device),
            test=self.test.to(device),
            classes=self.classes,
            validation=None if self.validation is None else self.validation.to(device),
        )

    def hold_out(self, fraction: float, seed: int) -> Dataset:
        """Move a part of the training images to `validation`.

        Which images these are is a function of the seed and their number. Both parts keep the
        order of the training images.

        Args:
            fraction: of the training images, in (0, 1); rounded to a number of images.
            seed: the seed of the recipe.

        Raises:
            UserError: this would be none of the images, or all of them.
        """
        count = len(self.train)
        num_held_out = count_held_out(fraction, count)

        words = philox.words(
            seed,
            Domain.VALIDATION,
            position=(0, 0, 0),
            first_block=0,
            n_blocks=-(-count // philox.WORDS_PER_BLOCK),
        )
        order = torch.from_numpy(np.argsort(words[:count], kind="stable"))  # int64 (N,)
        held_out = order[:num_held_out].sort().values
        kept = order[num_held_out:].sort().values

        return Dataset(
            train=self.train.select(kept),
            test=self.test,
            classes=self.classes,
            validation=self.train.select(held_out),
        )

    def fingerprint(self) -> str:
        """SHA-256 of all pixels and labels, by which hosts check that they have the same data."""
        digest = hashlib.sha256()
        for part in (self.train, self.test, self.validation):
            if part is None:
                continue
            for tensor in (part.pixels, part.labels):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def count_held_out(fraction: float, count: int) -> int:
    """How many of `count` training images `Dataset.hold_out` moves to `validation`.

    Raises:
        UserError: none of them, or all of them.
    """
    num_held_out = round(fraction * count)
    if not 0 < num_held_out < count:
        raise UserError(
            f"data.validation: is {fraction}, which is {num_held_out} of {count} training images"
        )
    return num_held_out
