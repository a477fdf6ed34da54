"""What is random about the data, as functions of a position.

The order of an epoch is a function of (seed, epoch), and how a sample is changed is a function of
(seed, epoch, sample's index). Both are the same on any rank, in any worker, and after any resume.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lrd import philox
from lrd.errors import UserError
from lrd.generators import set_generators
from lrd.philox import Domain


class BatchOrder:
    """The samples of each batch of one rank, as a function of the step and the micro step.

    An epoch is `steps_per_epoch` full batches; its last, incomplete batch is dropped. The global
    batch of a step is cut into `accumulation_steps * world_size` contiguous parts of equal size:
    the first micro step of each rank, then the second of each rank, and so on.

    Below, N is the number of samples and B is `micro_batch_size`.

    Args:
        num_samples: number of training samples.
        batch_size: samples in the global batch of one step.
        seed: the seed of the recipe.
        rank: the rank whose part of each batch this is.
        world_size: the number of ranks.
        accumulation_steps: micro steps in a step.

    Attributes:
        micro_batch_size: samples in one micro step on one rank.
        steps_per_epoch: steps in one epoch.
        order: function of the epoch: the order of its samples, int64 (N,), on the host.

    Raises:
        UserError: the batch cannot be split evenly, or it is larger than the training set.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
    ) -> None:
        _check_batch_size(batch_size, num_samples, world_size, accumulation_steps)

        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulation_steps = accumulation_steps
        self.micro_batch_size = batch_size // (world_size * accumulation_steps)
        self.steps_per_epoch = num_samples // batch_size

        # The cache holds two epochs, so that an epoch is still there while the next one begins.
        self.order = lru_cache(maxsize=2)(self._draw_order)

    def indices(self, step: int, micro_step: int = 0) -> Tensor:
        """Indices of the samples that this rank has in a micro step.

        Returns:
            int64 (B,), on the host.
        """
        epoch, positions = self.locate(step, micro_step)
        return self.order(epoch)[positions]

    def index_before(self, step: int, micro_step: int = 0) -> int:
        """Index of the sample before this rank's first in the global batch, seen as a ring."""
        epoch, positions = self.locate(step, micro_step)
        return int(self.order(epoch)[self.position_before(positions)])

    def locate(self, step: int, micro_step: int) -> tuple[int, slice]:
        """Find the epoch, and the positions of this rank's samples in the epoch's order."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        part = micro_step * self.world_size + self.rank
        start = batch * self.batch_size + part * self.micro_batch_size
        return epoch, slice(start, start + self.micro_batch_size)

    def position_before(self, positions: slice) -> int:
        """The position before a part of a global batch; before the first one comes the last."""
        batch_start = positions.start // self.batch_size * self.batch_size
        offset = (positions.start - batch_start - 1) % self.batch_size
        return int(batch_start + offset)

    def _draw_order(self, epoch: int) -> Tensor:
        """Draw the order of an epoch: the samples sorted by a random 64-bit key of each.

        Returns:
            int64 (N,), on the host.
        """
        words = philox.words(
            self.seed,
            Domain.ORDER,
            position=(epoch, 0, 0),
            first_block=0,
            n_blocks=-(-self.num_samples // philox.WORDS_PER_BLOCK),
        )
        keys = words[: self.num_samples]  # uint64 (N,)
        return torch.from_numpy(np.argsort(keys, kind="stable"))


def draw_shifts(seed: int, epoch: int, first: int, count: int, padding: int, flip: bool) -> Tensor:
    """Draw crop and flip of consecutive samples in an epoch: one Philox block for each sample.

    Args:
        seed: the seed of the recipe.
        epoch: from 0.
        first: index of the first sample.
        count: number of samples.
        padding: pixels of zero padding on each side of an image, before it is cropped.
        flip: whether images are mirrored.

    Returns:
        int64 (count, 3), on the host: the row and the column of the crop's corner in the padded
        image, each in [0, 2 * padding], and 1 if the crop is mirrored, else 0.
    """
    words = philox.words(
        seed, Domain.AUGMENT, position=(epoch, 0, 0), first_block=first, n_blocks=count
    )
    draws = words.reshape(-1, philox.WORDS_PER_BLOCK) >> 32  # uint64 (count, 4), in [0, 2**32)

    # draw * range >> 32 maps a 32-bit draw to [0, range) without a division.
    offsets = 2 * padding + 1
    ranges = np.array([offsets, offsets, 2 if flip else 1], dtype=np.uint64)
    shifts = draws[:, :3] * ranges >> 32  # uint64 (count, 3)
    return torch.from_numpy(shifts.astype(np.int64))


def _check_batch_size(
    batch_size: int, num_images: int, world_size: int, accumulation_steps: int
) -> None:
    """Check that a global batch can be split evenly and is no larger than the training set.

    Raises:
        UserError: it cannot, or it is larger.
    """
    num_parts = world_size * accumulation_steps
    if batch_size % num_parts:
        smaller = batch_size // num_parts * num_parts
        larger = smaller + num_parts
        alternatives = f"{smaller} or {larger}" if smaller else f"{larger}"
        raise UserError(
            f"data.batch_size: is {batch_size}, which cannot be split evenly over "
            f"{world_size} rank(s) x {accumulation_steps} accumulation step(s); "
            f"may be {alternatives}"
        )

    if batch_size > num_images:
        raise UserError(
            f"data.batch_size: is {batch_size}, but there are only {num_images} training images"
        )


def generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator for one sample in one epoch.

    Args:
        seed: the seed of the recipe.
        epoch: from 0.
        index: of the sample in the data set, from 0.

    Returns:
        torch's generator on the CPU; two calls with the same arguments give the same numbers.
    """
    word, _, _ = _draw_words(seed, epoch, index)
    return torch.Generator().manual_seed(word)


def seed_for_sample(seed: int, epoch: int, index: int) -> None:
    """Seed the global generators for one sample in one epoch; torch's as `generator` does.

    Args:
        seed, epoch, index: as for `generator`.
    """
    set_generators(*_draw_words(seed, epoch, index))


def _draw_words(seed: int, epoch: int, index: int) -> tuple[int, int, int]:
    words = philox.words(seed, Domain.SAMPLE, (epoch, 0, 0), first_block=index, n_blocks=1)
    word, numpy_word, python_word, _ = words.tolist()
    return word, numpy_word, python_word


def step_generator_seed(seed: int, step: int) -> int:
    """A seed for what is drawn once for the whole batch of a step, such as how much to mix."""
    words = philox.words(seed, Domain.MIXING, (step, 0, 0), first_block=0, n_blocks=1)
    return int(words[0])
