"""Labelled images, and a data set of them."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lrd import philox
from lrd.errors import UserError
from lrd.philox import Domain


class Part(Protocol):
    """A part of a data set, such as its test images: in memory, or read when they are needed.

    Attributes:
        image_shape: of each image, (3, H, W).
        storage: where the images are, such as `memory` or `files`.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def storage(self) -> str: ...

    def __len__(self) -> int: ...

    def read(
        self, begin: int, end: int, batch_size: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Read the images from `begin` to before `end` in batches, without random changes.

        The last batch may be short.

        Returns:
            Pixels, uint8 (batch, 3, H, W), and labels, int64 (batch,), on the part's device.
        """

    def empty_batch(self) -> tuple[Tensor, Tensor]:
        """A batch as `read` returns them, of no images."""

    def to(self, device: torch.device) -> Part:
        """The same images, which are then on a device when they are read."""

    def select(self, indices: Tensor) -> Part:
        """The images with these indices, int64 (M,)."""

    def slice(self, begin: int, end: int) -> Part:
        """The images from `begin` to before `end`."""

    def relabel(self, labels: Tensor) -> Part:
        """The same images; those with label i get the label `labels[i]`, int64 (classes,)."""

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Add to a digest what tells these images and labels from others."""


@dataclass(frozen=True)
class Images:
    """Labelled images in memory.

    Attributes:
        pixels: uint8 (N, 3, H, W).
        labels: int64 (N,).
    """

    pixels: Tensor
    labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    @property
    def storage(self) -> str:
        return "memory"

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, begin: int, end: int, batch_size: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """See `Part`."""
        for start in range(begin, end, batch_size):
            batch = slice(start, min(start + batch_size, end))
            yield self.pixels[batch], self.labels[batch]

    def empty_batch(self) -> tuple[Tensor, Tensor]:
        """See `Part`."""
        return self.pixels[:0], self.labels[:0]

    def slice(self, begin: int, end: int) -> Images:
        """See `Part`: views of their memory."""
        return Images(self.pixels[begin:end], self.labels[begin:end])

    def relabel(self, labels: Tensor) -> Images:
        """See `Part`."""
        return Images(self.pixels, labels[self.labels])

    def update_digest(self, digest: hashlib._Hash) -> None:
        """See `Part`: all pixels and labels."""
        for tensor in (self.pixels, self.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())

    def to(self, device: torch.device) -> Images:
        """Copy pixels and labels to a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def select(self, indices: Tensor) -> Images:
        """Copy the images with these indices, int64 (M,)."""
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """Labelled images, and the names of the classes.

    Attributes:
        train: training images.
        test: test images.
        classes: name of each class, by its label.
        validation: images held out from the training images; None if there are none.
    """

    train: Part
    test: Part
    classes: tuple[str, ...]
    validation: Part | None = None

    @property
    def evaluated_parts(self) -> dict[str, Part]:
        """The parts on which the network is evaluated: `test`, and `validation` if there is one."""
        if self.validation is None:
            return {"test": self.test}
        return {"test": self.test, "validation": self.validation}

    def to(self, device: torch.device) -> Dataset:
        """The same data set, with all images on a device."""
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
        """SHA-256 by which hosts check that they have the same data.

        It is of all pixels and labels of images in memory; for others see their `Part`.
        """
        digest = hashlib.sha256()
        for part in (self.train, self.test, self.validation):
            if part is not None:
                part.update_digest(digest)
        # The same images have another fingerprint elsewhere; see `storage_of_fingerprint`.
        storage = self.train.storage
        return digest.hexdigest() if storage == "memory" else f"{storage} {digest.hexdigest()}"


def storage_of_fingerprint(fingerprint: str) -> str:
    """Where the images were whose `Dataset.fingerprint` this is."""
    storage, _, digest = fingerprint.rpartition(" ")
    return storage if digest and storage else "memory"


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
