"""Training batches as functions of a position.

The order of an epoch is a function of (seed, epoch), and the augmentation of a sample is a function
of (seed, epoch, sample's index). Both are the same on any number of ranks.

Tensor operations on the training device gather, augment and normalize a batch. torchvision's
transforms are of no use here: they would draw one crop for a whole batch, and they draw it from a
running generator.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lrd import philox
from lrd import recipe as recipes
from lrd.data.images import Images
from lrd.errors import UserError
from lrd.memory import require_memory
from lrd.philox import Domain


class Batches:
    """The training batches of one rank, each a function of the step and the micro step.

    An epoch is `steps_per_epoch` full batches; its last, incomplete batch is dropped. The global
    batch of a step is cut into `accumulation_steps * world_size` contiguous parts of equal size:
    the first micro step of each rank, then the second of each rank, and so on.

    Below, N is the number of training images and B is `micro_batch_size`.

    Args:
        images: the training images, on the training device.
        section: the `data` section of the recipe.
        seed: the seed of the recipe.
        rank: the rank whose part of each batch this is.
        world_size: the number of ranks.
        accumulation_steps: micro steps in a step.

    Attributes:
        images: the training images.
        batch_size: samples in the global batch of one step.
        micro_batch_size: samples in one micro step on one rank.
        steps_per_epoch: steps in one epoch.
        padding: pixels of zero padding on each side of an image, before it is cropped.
        mean: mean of each channel over the training set, float32 (3, 1, 1).
        std: standard deviation of each channel over the training set, float32 (3, 1, 1).
        order: function of the epoch: the order of its samples, int64 (N,), on the host.
        shifts: function of the epoch: crop and flip of each sample, int64 (N, 3), on the host; see
            `_draw_shifts`.

    Raises:
        UserError: the batch cannot be split evenly, or it is larger than the training set.
    """

    def __init__(
        self,
        images: Images,
        section: recipes.Data,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
    ) -> None:
        _check_batch_size(section.batch_size, len(images), world_size, accumulation_steps)

        self.images = images
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batch_size = section.batch_size
        self.micro_batch_size = section.batch_size // (world_size * accumulation_steps)
        self.steps_per_epoch = len(images) // section.batch_size
        self.mean, self.std = _channel_statistics(images.pixels)

        height, width = images.pixels.shape[2:]
        self.crop = section.augment in ("crop", "crop_flip")
        self.flip = section.augment == "crop_flip"
        self.padding = 0
        if self.crop:
            self.padding = width // 8 if section.padding is None else section.padding
        self._padded_height = height + 2 * self.padding  # pixels
        self._padded_width = width + 2 * self.padding  # pixels
        require_memory(
            num_bytes=3 * self.micro_batch_size * self._padded_height * self._padded_width,
            key=f"data.padding: is {self.padding}",
            what=f"{self.micro_batch_size:,} padded images",
        )
        self._row_offsets = self._crop_row_offsets().to(images.pixels.device)  # int64 (B, 3 * H)

        # The caches hold two epochs, so that an epoch is still there while the next one begins.
        self.order = lru_cache(maxsize=2)(self._draw_order)
        self.shifts = lru_cache(maxsize=2)(self._draw_shifts)
        self._epoch_on_device = lru_cache(maxsize=2)(self._move_epoch_to_device)

    def indices(self, step: int, micro_step: int = 0) -> Tensor:
        """Indices of the samples that this rank has in a micro step.

        Returns:
            int64 (B,), on the host.
        """
        epoch, positions = self._locate(step, micro_step)
        return self.order(epoch)[positions]

    def micro_batch(self, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
        """Make the batch that this rank has in a micro step.

        Returns:
            The normalized inputs, float32 (B, 3, H, W), and the labels, int64 (B,), both on the
            training device.
        """
        epoch, positions = self._locate(step, micro_step)
        order, crop_corners = self._epoch_on_device(epoch)  # int64 (N,), int64 (N,)
        samples = order[positions]  # int64 (B,)

        # index_select copies image by image, where `pixels[samples]` copies byte by byte.
        pixels = self.images.pixels.index_select(0, samples)  # uint8 (B, 3, H, W)
        labels = self.images.labels.index_select(0, samples)  # int64 (B,)
        if self.crop:
            pixels = self._crop_and_flip(pixels, crop_corners[positions])

        return self.normalize(pixels), labels

    def normalize(self, pixels: Tensor) -> Tensor:
        """Scale each channel to mean 0 and variance 1 over the training set.

        Args:
            pixels: uint8 (any number, 3, H, W).

        Returns:
            float32 of the same shape.
        """
        return normalize(pixels, self.mean, self.std)

    def _locate(self, step: int, micro_step: int) -> tuple[int, slice]:
        """Find the epoch, and the positions of this rank's samples in the epoch's order."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        part = micro_step * self.world_size + self.rank
        start = batch * self.batch_size + part * self.micro_batch_size
        return epoch, slice(start, start + self.micro_batch_size)

    def _draw_order(self, epoch: int) -> Tensor:
        """Draw the order of an epoch: the samples sorted by a random 64-bit key of each.

        Returns:
            int64 (N,), on the host.
        """
        count = len(self.images)
        words = philox.words(
            self.seed,
            Domain.ORDER,
            position=(epoch, 0, 0),
            first_block=0,
            n_blocks=-(-count // philox.WORDS_PER_BLOCK),
        )
        keys = words[:count]  # uint64 (N,)
        return torch.from_numpy(np.argsort(keys, kind="stable"))

    def _draw_shifts(self, epoch: int) -> Tensor:
        """Draw the crop and flip of each sample in an epoch: one Philox block for each sample.

        Returns:
            int64 (N, 3), on the host: the row and the column of the crop's corner in the padded
            image, each in [0, 2 * padding], and 1 if the crop is mirrored, else 0.
        """
        words = philox.words(
            self.seed,
            Domain.AUGMENT,
            position=(epoch, 0, 0),
            first_block=0,
            n_blocks=len(self.images),
        )
        draws = words.reshape(-1, philox.WORDS_PER_BLOCK) >> 32  # uint64 (N, 4), in [0, 2**32)

        # draw * count >> 32 maps a 32-bit draw to [0, count) without a division.
        offsets = 2 * self.padding + 1
        counts = np.array([offsets, offsets, 2 if self.flip else 1], dtype=np.uint64)
        shifts = draws[:, :3] * counts >> 32  # uint64 (N, 3)
        return torch.from_numpy(shifts.astype(np.int64))

    def _move_epoch_to_device(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Compute an epoch's order and crop corners and copy them to the training device.

        This is done once an epoch: a copy in each step would make the host wait for a GPU.

        Returns:
            The samples in the epoch's order, int64 (N,), and the corners of their crops, int64
            (N,). A corner is the position at which the crop begins in the two padded images that
            `_crop_and_flip` makes of a sample, the image and its mirror image, one after the other.
        """
        order = self.order(epoch)  # int64 (N,)
        row, column, flip = self.shifts(epoch)[order].T  # int64 (N,), three times

        # In the mirror image the columns count from the other side.
        column = torch.where(flip == 1, 2 * self.padding - column, column)
        image_size = 3 * self._padded_height * self._padded_width  # bytes
        corners = flip * image_size + row * self._padded_width + column  # int64 (N,)

        device = self.images.pixels.device
        return order.to(device), corners.to(device)

    def _crop_row_offsets(self) -> Tensor:
        """Positions of all rows of all crops in the bytes of `_crop_and_flip`, for corners at 0.

        Returns:
            int64 (B, 3 * H).
        """
        channel_size = self._padded_height * self._padded_width  # bytes
        sample_size = (1 + self.flip) * 3 * channel_size  # bytes; with a flip there are two images
        height = self._padded_height - 2 * self.padding

        sample_offsets = torch.arange(self.micro_batch_size) * sample_size  # int64 (B,)
        channel_offsets = torch.arange(3) * channel_size  # int64 (3,)
        row_offsets = torch.arange(height) * self._padded_width  # int64 (H,)
        within_sample = channel_offsets[:, None] + row_offsets  # int64 (3, H)
        return sample_offsets[:, None] + within_sample.flatten()

    def _crop_and_flip(self, pixels: Tensor, corners: Tensor) -> Tensor:
        """Pad each image with zeros, cut its crop out and mirror it where that was drawn.

        A mirrored crop is a crop of the mirror image, and a crop is 3 * H runs of W bytes. `unfold`
        views the bytes as the runs that begin at each byte. From this view index_select copies
        whole runs, where an index of pixels would copy single bytes.

        Args:
            pixels: uint8 (B, 3, H, W).
            corners: where each crop begins, int64 (B,); see `_move_epoch_to_device`.

        Returns:
            uint8 (B, 3, H, W).
        """
        padded = torch.nn.functional.pad(pixels, [self.padding] * 4)
        if self.flip:
            padded = torch.stack([padded, padded.flip(-1)], dim=1)  # uint8 (B, 2, 3, H', W')

        width = pixels.shape[-1]
        runs = padded.flatten().unfold(0, width, 1)  # uint8 (bytes - W + 1, W), a view
        starts = self._row_offsets + corners[:, None]  # int64 (B, 3 * H)
        return runs.index_select(0, starts.flatten()).view(pixels.shape)


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean of each channel and divide by its standard deviation.

    Args:
        pixels: uint8 (any number, 3, H, W).
        mean: float32 (3, 1, 1).
        std: float32 (3, 1, 1).

    Returns:
        float32 of the shape of `pixels`.
    """
    # In place: one allocation of a batch's size instead of three.
    return pixels.float().sub_(mean).div_(std)


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


def _channel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each channel.

    They come from sums of integers, so they are the same bits on every device.

    Args:
        pixels: uint8 (N, 3, H, W).

    Returns:
        Mean and standard deviation, both float32 (3, 1, 1), on the device of `pixels`.
    """
    values_per_channel = pixels.shape[0] * pixels.shape[2] * pixels.shape[3]
    histograms = []
    for channel in range(3):
        values = pixels[:, channel].flatten().int().cpu()
        histograms.append(torch.bincount(values, minlength=256))
    histogram = torch.stack(histograms)  # int64 (3, 256)

    value = torch.arange(256)
    mean = (histogram * value).sum(1).double() / values_per_channel  # float64 (3,)
    mean_square = (histogram * value**2).sum(1).double() / values_per_channel  # float64 (3,)
    variance = mean_square - mean**2  # float64 (3,)
    std = variance.clamp_min(1e-12).sqrt()  # above zero even where a channel has a single value

    mean = mean.float()[:, None, None]  # float32 (3, 1, 1)
    std = std.float()[:, None, None]  # float32 (3, 1, 1)
    return mean.to(pixels.device), std.to(pixels.device)
