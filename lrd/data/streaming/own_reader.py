"""Samples of a map-style `torch.utils.data.Dataset` of the user's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lrd.data.decoding import to_rgb
from lrd.data.positions import seed_for_sample
from lrd.data.streaming.readers import Sample, SampleError
from lrd.errors import describe_error
from lrd.recipe.named import last_line_in_file

# Evaluated samples have a position too, for data sets that draw there.
_EVALUATION_EPOCH = (1 << 64) - 1


class OwnReader:
    """Reads samples of the user's data set; its random generators begin at the sample's position.

    Whatever the data set draws from torch, NumPy or Python while it makes a sample, such as the
    transforms of torchvision, is then a function of (seed, epoch, index).

    Args:
        dataset: has a length, and returns an image and its label for an index.
        name: what messages call it.
        seed: the seed of the recipe.
        indices: of the samples that are to be read, int64 (N,); None: all.
    """

    def __init__(
        self, dataset: Any, name: str, seed: int, indices: NDArray[np.int64] | None = None
    ) -> None:
        self._dataset = dataset
        self._name = name
        self._seed = seed
        self._indices = indices
        self._num_classes: int | None = None
        self._shape: tuple[int, ...] | None = None
        self._dtype: torch.dtype | None = None

    def __len__(self) -> int:
        """Number of samples.

        Raises:
            SampleError: the data set does not say it.
        """
        if self._indices is not None:
            return len(self._indices)
        try:
            return len(self._dataset)
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            where = last_line_in_file(error)
            text = f"len() failed: {describe_error(error)}{where}"
            raise SampleError(f"data.dataset: {self._name}: {text}") from None

    def select(self, indices: NDArray[np.int64]) -> OwnReader:
        """A reader of the samples with these indices, int64 (M,)."""
        chosen = indices if self._indices is None else self._indices[indices]
        reader = OwnReader(self._dataset, self._name, self._seed, chosen)
        reader.expect(self._shape, self._dtype, self._num_classes)
        return reader

    def expect(
        self,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype | None,
        num_classes: int | None,
    ) -> None:
        """Say what each sample must be; None: anything."""
        self._shape = shape
        self._dtype = dtype
        self._num_classes = num_classes

    def read(self, epoch: int | None, index: int) -> Sample:
        """See `Reader`."""
        own_index = index if self._indices is None else int(self._indices[index])
        seed_for_sample(self._seed, _EVALUATION_EPOCH if epoch is None else epoch, own_index)
        try:
            item = self._dataset[own_index]
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            where = last_line_in_file(error)
            raise self._error(own_index, f"failed: {describe_error(error)}{where}") from None

        try:
            image, label = item
        except (TypeError, ValueError):
            kind = type(item).__name__
            raise self._error(
                own_index, f"is {kind}, should be a pair of image and label"
            ) from None
        pixels = self._to_pixels(image, own_index)
        return Sample(pixels, self._to_label(label, own_index))

    def _to_pixels(self, image: Any, index: int) -> Tensor:
        """Bring an image into the form uint8 or float32 (3, H, W)."""
        try:
            if isinstance(image, Image.Image):
                image = np.asarray(to_rgb(image))
            if isinstance(image, np.ndarray):
                image = _to_tensor(image)
        except (OSError, TypeError, ValueError) as error:
            raise self._error(index, f"has an image that fails: {describe_error(error)}") from None
        if not isinstance(image, Tensor):
            kind = type(image).__name__
            raise self._error(index, f"has an image of type {kind}, should be a tensor or array")

        pixels = image.detach().as_subclass(Tensor)  # without torchvision's class
        if pixels.ndim == 3 and pixels.shape[0] == 1:
            pixels = pixels.expand(3, -1, -1)
        if pixels.is_floating_point():
            pixels = pixels.float()

        described = f"{_name_dtype(pixels.dtype)} {tuple(pixels.shape)}"
        is_image = pixels.ndim == 3 and pixels.shape[0] == 3
        if not is_image or pixels.dtype not in (torch.uint8, torch.float32):
            raise self._error(
                index, f"has an image of {described}, should be uint8 or float32 (3, H, W)"
            )
        if self._shape is not None and tuple(pixels.shape) != self._shape:
            raise self._error(
                index, f"has an image of {described}, the first sample has {self._shape}"
            )
        if self._dtype is not None and pixels.dtype != self._dtype:
            expected = _name_dtype(self._dtype)
            raise self._error(index, f"has an image of {described}, the first sample {expected}")
        return pixels

    def _to_label(self, label: Any, index: int) -> int:
        value = label
        if isinstance(label, Tensor | np.ndarray | np.generic) and math.prod(label.shape) == 1:
            value = label.item()
        if isinstance(value, bool) or not isinstance(value, int):
            shown = " ".join(f"{label!r}".split())
            raise self._error(index, f"has the label {shown}, should be an integer")
        if value < 0 or (self._num_classes is not None and value >= self._num_classes):
            classes = "" if self._num_classes is None else f" and below {self._num_classes}"
            raise self._error(index, f"has the label {value}, should be from 0{classes}")
        return value

    def _error(self, index: int, text: str) -> SampleError:
        return SampleError(f"data.dataset: {self._name}: sample {index} {text}")


def _to_tensor(image: NDArray[Any]) -> Tensor:
    """The same numbers, with the channels first where they are uint8 and the channels last."""
    if image.ndim == 3 and image.shape[2] in (1, 3) and image.dtype == np.uint8:
        image = image.transpose(2, 0, 1)  # uint8 (channels, H, W)
    # torch takes no negative strides, and warns about an array that cannot be written.
    return torch.from_numpy(np.require(image, requirements=["C", "W", "E"]))


def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
