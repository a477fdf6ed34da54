"""A part of a data set that is read when it is needed, and its training batches."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lrd import console
from lrd.data.batches import TrainingBatches
from lrd.data.mixing import Mixing
from lrd.data.streaming.loader import Loader, Position
from lrd.data.streaming.readers import Reader

_CPU = torch.device("cpu")


class _SelectableReader(Reader, Protocol):
    """A reader of which a part of the samples can be taken."""

    def select(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> _SelectableReader: ...


@dataclass(frozen=True)
class StreamedImages:
    """Images that worker processes read; see `lrd.data.images.Part`.

    Attributes:
        reader: reads the samples.
        image_shape: of each image, (3, H, W).
        dtype: of the pixels, uint8 or float32.
        storage: where they are: `files`, `packed`, or `samples` of the user's own data set.
        digest: tells these images from others.
        workers: number of processes that read.
        mean: of each channel, from 0 to 255, float32 (3, 1, 1).
        std: standard deviation of each channel, float32 (3, 1, 1).
        device: where the images are after they were read.
        new_labels: label of the reader -> label, int64 (classes,); None: they are the same.
    """

    reader: _SelectableReader
    image_shape: tuple[int, int, int]
    dtype: torch.dtype
    storage: str
    digest: str
    workers: int
    mean: Tensor
    std: Tensor
    device: torch.device = _CPU
    new_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def read(
        self, begin: int, end: int, batch_size: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """See `Part`."""
        starts = range(begin, end, batch_size)
        positions: Iterator[list[Position]] = (
            [(None, index) for index in range(start, min(start + batch_size, end))]
            for start in starts
        )
        # More workers than batches would have nothing to do.
        workers = min(self.workers, len(starts))
        loader = Loader(self.reader, positions, workers, self.device.type == "cuda")
        try:
            for _ in starts:
                pixels, labels, unreadable = loader.next()
                _report_unreadable(unreadable)
                if self.new_labels is not None:
                    labels = self.new_labels[labels]
                yield _move(pixels, self.device), _move(labels, self.device)
        finally:
            loader.close()

    def empty_batch(self) -> tuple[Tensor, Tensor]:
        """See `Part`."""
        pixels = torch.empty((0, *self.image_shape), dtype=self.dtype, device=self.device)
        labels = torch.empty(0, dtype=torch.int64, device=self.device)
        return pixels, labels

    def to(self, device: torch.device) -> StreamedImages:
        """See `Part`."""
        return replace(self, device=device)

    def select(self, indices: Tensor) -> StreamedImages:
        """See `Part`."""
        return replace(self, reader=self.reader.select(indices.numpy()))

    def slice(self, begin: int, end: int) -> StreamedImages:
        """See `Part`."""
        return self.select(torch.arange(begin, end))

    def relabel(self, labels: Tensor) -> StreamedImages:
        """See `Part`."""
        return replace(self, new_labels=labels.cpu())

    def update_digest(self, digest: hashlib._Hash) -> None:
        """See `Part`: the files' names and sizes, or what `data.fingerprint` says."""
        digest.update(f"{self.digest} {len(self)} {self.image_shape} {self.dtype}".encode())


class StreamedBatches(TrainingBatches):
    """The training batches of one rank, read ahead by workers; see `BatchOrder` for their order.

    Batches that are asked for in their order have been read already, as far as the workers keep
    up. For any other step the workers begin anew there.

    Args:
        images: the training images.
        batch_size: samples in the global batch of one step.
        seed: the seed of the recipe.
        rank: the rank whose part of each batch this is.
        world_size: the number of ranks.
        accumulation_steps: micro steps in a step.
        mixing: mixes each sample with the one before it; None: they stay as they are.

    Attributes:
        images: the training images.

    Raises:
        UserError: the batch cannot be split evenly, or it is larger than the training set.
    """

    def __init__(
        self,
        images: StreamedImages,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__(
            len(images),
            batch_size,
            seed,
            rank,
            world_size,
            accumulation_steps,
            image_shape=images.image_shape,
            mean=images.mean.to(images.device),
            std=images.std.to(images.device),
            mixing=mixing,
        )
        self.images = images
        self._loader: Loader | None = None
        self._next = (0, 0)  # step and micro step of the loader's next batch

    def micro_batch(self, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
        """See `TrainingBatches`."""
        start = time.perf_counter()
        if self._loader is None or (step, micro_step) != self._next:
            self.close()
            pin_memory = self.images.device.type == "cuda"
            positions = self._positions(step, micro_step)
            self._loader = Loader(self.images.reader, positions, self.images.workers, pin_memory)

        pixels, labels, unreadable = self._loader.next()
        self._next = self._after(step, micro_step)
        self.wait_seconds += time.perf_counter() - start
        self.num_replaced += len(unreadable)
        _report_unreadable(unreadable)

        device = self.images.device
        return self._finish(_move(pixels, device), _move(labels, device), step)

    def close(self) -> None:
        """See `TrainingBatches`."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _positions(self, step: int, micro_step: int) -> Iterator[list[Position]]:
        """The positions of the samples of each batch, from one on."""
        while self.end_step is None or step < self.end_step:
            epoch = step // self.steps_per_epoch
            indices = self.indices(step, micro_step).tolist()
            if self.mixing is not None:
                indices.insert(0, self.index_before(step, micro_step))
            yield [(epoch, index) for index in indices]
            step, micro_step = self._after(step, micro_step)

    def _after(self, step: int, micro_step: int) -> tuple[int, int]:
        """The step and micro step after these."""
        if micro_step + 1 < self.accumulation_steps:
            return step, micro_step + 1
        return step + 1, 0


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


_reported: set[str] = set()


def _report_unreadable(unreadable: list[tuple[str, ...]]) -> None:
    """Name files that could not be decoded, each once, from whichever rank has met them."""
    for line in chain.from_iterable(unreadable):
        if line not in _reported:
            _reported.add(line)
            console.error(f"{line}; the next readable image takes its place")
