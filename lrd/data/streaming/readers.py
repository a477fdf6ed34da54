"""What a worker process does for one sample: read it, and change it as its position says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrd import recipe as recipes
from lrd.data.batches import crop_settings
from lrd.data.decoding import UnreadableImageError
from lrd.data.positions import draw_shifts, seed_for_sample
from lrd.data.streaming.augmentation import Augmentation
from lrd.data.streaming.sources import Source

_MAX_UNREADABLE = 100  # in a row


@dataclass(frozen=True)
class Sample:
    """One image, as a worker sends it.

    Attributes:
        pixels: uint8 (3, H, W), or float32 where the user's own data set returns it.
        label: its class.
        unreadable: files that could not be decoded, with the reason; this image takes their place.
    """

    pixels: Tensor
    label: int
    unreadable: tuple[str, ...] = ()


class SampleError(Exception):
    """A sample cannot be read; the text is one line for the user."""


class Reader(Protocol):
    """Reads samples by their position. It is copied to worker processes."""

    def __len__(self) -> int: ...

    def read(self, epoch: int | None, index: int) -> Sample:
        """Read a sample.

        Args:
            epoch: from 0, for training; None for an evaluation, without random changes.
            index: of the sample, from 0.

        Raises:
            SampleError: it cannot be read.
        """


class ImageReader:
    """Reads images of a source and augments them, see the `data` section of a recipe.

    Args:
        source: where the images come from.
        section: the `data` section of the recipe.
        seed: the seed of the recipe.
        size: height and width of the result.
        mean: of each channel, from 0 to 255.
        indices: of the images in the source that are to be read, int64 (N,); None: all.
    """

    def __init__(
        self,
        source: Source,
        section: recipes.Data,
        seed: int,
        size: int,
        mean: list[float],
        indices: NDArray[np.int64] | None = None,
    ) -> None:
        self.source = source
        self.size = size
        self._section = section
        self._seed = seed
        self._mean = mean
        self._indices = indices
        self._augmentation = Augmentation(section, size, mean)
        self._crop, self._flip, self._padding = crop_settings(section, size)

    def __len__(self) -> int:
        return len(self.source.labels) if self._indices is None else len(self._indices)

    def select(self, indices: NDArray[np.int64]) -> ImageReader:
        """A reader of the images with these indices, int64 (M,)."""
        chosen = indices if self._indices is None else self._indices[indices]
        return ImageReader(self.source, self._section, self._seed, self.size, self._mean, chosen)

    def source_index(self, index: int) -> int:
        """The index in the source of an image with an index from 0 to `len(self) - 1`."""
        return index if self._indices is None else int(self._indices[index])

    def read(self, epoch: int | None, index: int) -> Sample:
        """See `Reader`.

        With `skip_corrupt` the next readable image takes the place of one that is not. Which image
        that is depends on the files alone, so it is the same on every rank.
        """
        unreadable = []
        for offset in range(min(len(self), _MAX_UNREADABLE)):
            position = (index + offset) % len(self)
            source_index = self.source_index(position)
            try:
                pixels = self._read_pixels(epoch, position, source_index)
            except UnreadableImageError as error:
                line = f"{self.source.describe(source_index)}: not a readable image ({error})"
                if not self._section.skip_corrupt:
                    advice = "data.skip_corrupt=true takes another image in place of such files"
                    raise SampleError(f"{line}; {advice}") from None
                unreadable.append(line)
                continue
            return Sample(pixels, int(self.source.labels[source_index]), tuple(unreadable))

        raise SampleError(f"{unreadable[-1]}, like the {len(unreadable) - 1} images before it")

    def _read_pixels(self, epoch: int | None, index: int, source_index: int) -> Tensor:
        """Read an image, uint8 (3, size, size)."""
        if epoch is None:
            resize = self._section.evaluation_resize(self.size)
            return self.source.read_centre(source_index, self.size, resize)
        seed_for_sample(self._seed, epoch, index)

        augmentation = self._augmentation
        if augmentation.crops:
            region = self.source.read_region(source_index, augmentation.choose_region, self.size)
            return augmentation.finish(region)

        pixels = self.source.read_centre(source_index, self.size, self._section.resize)
        if self._crop:
            pixels = self._crop_and_flip(pixels, epoch, index)
        return augmentation.finish(pixels)

    def _crop_and_flip(self, pixels: Tensor, epoch: int, index: int) -> Tensor:
        """The crop that `Batches` makes of an image in memory, uint8 (3, size, size)."""
        shifts = draw_shifts(self._seed, epoch, index, 1, self._padding, self._flip)
        row, column, flip = shifts[0].tolist()
        padded = torch.nn.functional.pad(pixels, [self._padding] * 4)
        crop = padded[:, row : row + self.size, column : column + self.size]
        return crop.flip(-1) if flip else crop
