"""Map-style data sets of the user's own, which are read sample by sample."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrd import recipe as recipes
from lrd.data.batches import normalization
from lrd.data.images import Dataset
from lrd.data.streaming.loader import Loader, Position, count_workers
from lrd.data.streaming.own_reader import OwnReader
from lrd.data.streaming.readers import Sample, SampleError
from lrd.data.streaming.streamed import StreamedImages
from lrd.errors import UserError
from lrd.generators import preserved_generators

_SAMPLES_IN_DIGEST = 8
_SAMPLES_FOR_STATISTICS = 256
_READ_AT_ONCE = 16  # samples


def stream_own(train: Any, test: Any, classes: Any, section: recipes.Data, seed: int) -> Dataset:
    """The data set of two map-style data sets of the user's own.

    Args:
        train, test: each returns an image and its label for an index.
        classes: names of the classes; None: `train.classes` has them.
        section: the `data` section of the recipe.
        seed: the seed of the recipe.

    Raises:
        UserError: a sample is not what it should be, or differs when it is read again.
    """
    name = section.dataset
    class_names = _find_classes(name, train, classes)
    readers = {"train": OwnReader(train, name, seed), "test": OwnReader(test, name, seed)}
    with preserved_generators():
        try:
            first = _try_out(readers, section, class_names)
            digests = {part: _digest(reader, class_names) for part, reader in readers.items()}
        except SampleError as error:
            raise UserError(str(error)) from None

    workers = count_workers(section)
    channels, height, width = first.pixels.shape
    mean, std = _find_statistics(readers["train"], first.pixels.dtype, section, workers)
    parts = {
        part: StreamedImages(
            reader=reader,
            image_shape=(channels, height, width),
            dtype=first.pixels.dtype,
            storage="samples",
            digest=digests[part],
            workers=workers,
            mean=mean,
            std=std,
        )
        for part, reader in readers.items()
    }
    return Dataset(parts["train"], parts["test"], class_names)


def _try_out(
    readers: dict[str, OwnReader], section: recipes.Data, classes: tuple[str, ...]
) -> Sample:
    """Read a few samples, and have the readers expect the same of all others.

    Returns:
        The first training sample.

    Raises:
        SampleError, UserError: a sample is not what it should be.
    """
    name = section.dataset
    for part, reader in readers.items():
        if len(reader) == 0:
            raise UserError(f"data.dataset: {name}: its {part} part is empty")
        reader.expect(None, None, len(classes))

    first = _read_twice(name, readers["train"])
    _, height, width = first.pixels.shape
    size = section.image_size
    if size is not None and (height, width) != (size, size):
        raise UserError(
            f"data.image_size: is {size}, but {name} returns images of {height} x {width} pixels; "
            "it resizes them itself"
        )

    for reader in readers.values():
        reader.expect(tuple(first.pixels.shape), first.pixels.dtype, len(classes))
    readers["test"].read(epoch=None, index=0)
    return first


def _find_classes(name: str, train: Any, classes: Any) -> tuple[str, ...]:
    found = getattr(train, "classes", None) if classes is None else classes
    is_unordered = isinstance(found, str | set | frozenset)
    if found is None or is_unordered or not hasattr(found, "__iter__"):
        raise UserError(
            f"data.dataset: {name}: the names of the classes are not known; give the data set a "
            "list of them as its attribute `classes`, or return it as a third value"
        )
    names = tuple(str(item) for item in found)
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"data.dataset: {name}: needs at least two classes, with different names; it has "
            f"{len(names)}"
        )
    return names


def _read_twice(name: str, reader: OwnReader) -> Sample:
    """Read a training sample twice: from one position it must come out the same.

    Raises:
        UserError: it does not, so that a resumed run would train on other images.
    """
    first = reader.read(epoch=0, index=0)
    pixels = first.pixels.numpy().copy()  # the data set may return the same memory again
    again = reader.read(epoch=0, index=0)
    is_same = np.array_equal(pixels, again.pixels.numpy(), equal_nan=True)
    if first.label != again.label or not is_same:
        raise UserError(
            f"data.dataset: {name}: sample 0 differs when it is read again from the same position; "
            "let it draw from the global generators of torch, NumPy or Python, which are seeded "
            "before each sample, or from lrd.data.generator"
        )
    return first


def _find_statistics(
    reader: OwnReader, dtype: torch.dtype, section: recipes.Data, workers: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel; floats are taken as they are."""
    if dtype == torch.float32:
        for key in ("mean", "std"):
            if getattr(section, key) is not None:
                raise UserError(
                    f"data.{key}: the images of {section.dataset} are floats, which are not scaled"
                )
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)

    count = min(len(reader), _SAMPLES_FOR_STATISTICS)
    chosen = np.linspace(0, len(reader) - 1, count).astype(int).tolist()
    positions: list[list[Position]] = [
        [(None, index) for index in chosen[start : start + _READ_AT_ONCE]]
        for start in range(0, count, _READ_AT_ONCE)
    ]
    loader = Loader(reader, positions, min(workers, len(positions)))
    try:
        images = torch.cat([loader.next()[0] for _ in positions])  # uint8 (count, 3, H, W)
    finally:
        loader.close()
    return normalization(section, images)


def _digest(reader: OwnReader, classes: tuple[str, ...]) -> str:
    """SHA-256 of the number of samples, the classes, and a few samples."""
    digest = hashlib.sha256(repr((len(reader), classes)).encode())
    count = min(len(reader), _SAMPLES_IN_DIGEST)
    for index in np.linspace(0, len(reader) - 1, count).astype(int).tolist():
        sample = reader.read(epoch=None, index=index)
        digest.update(sample.pixels.contiguous().numpy().tobytes())
        digest.update(f"{sample.label}".encode())
    return digest.hexdigest()
