"""Training batches as functions of a position.

Those of images in memory are here, and those that worker processes read in `lrd.data.streaming`.

Tensor operations on the training device gather, augment and normalize a batch. torchvision's
transforms are of no use here: they would draw one crop for a whole batch, and they draw it from a
running generator.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lrd import recipe as recipes
from lrd.data.images import Images
from lrd.data.mixing import Mixing
from lrd.data.positions import BatchOrder, draw_shifts
from lrd.host import require_memory


class TrainingBatches(BatchOrder):
    """What training needs of its batches: in memory (`Batches`), or read by worker processes.

    Below, B is `micro_batch_size`.

    Args:
        num_samples, batch_size, seed, rank, world_size, accumulation_steps: as for `BatchOrder`.
        image_shape: of an input, (3, H, W).
        mean: of each channel over the training set, from 0 to 255, float32 (3, 1, 1).
        std: standard deviation of each channel, float32 (3, 1, 1).
        mixing: mixes each sample with the one before it; None: they stay as they are.

    Attributes:
        image_shape, mean, std, mixing: the same; mean and std are on the training device.
        end_step: the step before which batches need not be read ahead; None: it is not known.
        wait_seconds: how long the training process has waited for images that are read.
        num_replaced: images of this rank that took the place of one that could not be decoded.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulation_steps: int,
        *,
        image_shape: tuple[int, int, int],
        mean: Tensor,
        std: Tensor,
        mixing: Mixing | None,
    ) -> None:
        super().__init__(num_samples, batch_size, seed, rank, world_size, accumulation_steps)
        self.image_shape = image_shape
        self.mean = mean
        self.std = std
        self.mixing = mixing
        self.end_step: int | None = None
        self.wait_seconds = 0.0
        self.num_replaced = 0

    def micro_batch(self, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
        """Make the batch that this rank has in a micro step.

        Returns:
            The normalized inputs, float32 (B, 3, H, W), and the labels, int64 (B,), or what
            `Mixing` makes of them; both on the training device.

        Raises:
            RankError: an image cannot be read, or a worker process died.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the processes that read ahead, if there are any."""

    def normalize(self, pixels: Tensor) -> Tensor:
        """Scale each channel to mean 0 and variance 1 over the training set.

        Args:
            pixels: uint8 or float32 (any number, 3, H, W).

        Returns:
            float32 of the same shape.
        """
        return normalize(pixels, self.mean, self.std)

    def _finish(self, pixels: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Normalize the samples of a batch, and mix them if the recipe says so.

        Args:
            pixels: (B, 3, H, W), or (B + 1, 3, H, W) to be mixed; see `Mixing.mix`.
            labels: int64, as many.
            step: the step of the batch.
        """
        inputs = self.normalize(pixels)
        if self.mixing is not None:
            return self.mixing.mix(inputs, labels, step)
        return inputs, labels


class Batches(TrainingBatches):
    """The training batches of one rank, from images in memory; see `BatchOrder` for their order.

    Below, N is the number of training images and B is `micro_batch_size`.

    Args:
        images: the training images, on the training device.
        section: the `data` section of the recipe.
        seed: the seed of the recipe.
        rank: the rank whose part of each batch this is.
        world_size: the number of ranks.
        accumulation_steps: micro steps in a step.
        mixing: mixes each sample with the one before it; None: they stay as they are.

    Attributes:
        images: the training images.
        padding: pixels of zero padding on each side of an image, before it is cropped.
        shifts: function of the epoch: crop and flip of each sample, int64 (N, 3), on the host; see
            `draw_shifts`.

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
        mixing: Mixing | None = None,
    ) -> None:
        mean, std = normalization(section, images.pixels)
        super().__init__(
            len(images),
            section.batch_size,
            seed,
            rank,
            world_size,
            accumulation_steps,
            image_shape=images.image_shape,
            mean=mean,
            std=std,
            mixing=mixing,
        )
        self.images = images

        height, width = images.pixels.shape[2:]
        self.crop, self.flip, self.padding = crop_settings(section, width)
        self._padded_height = height + 2 * self.padding  # pixels
        self._padded_width = width + 2 * self.padding  # pixels
        num_loaded = self.micro_batch_size + (mixing is not None)
        require_memory(
            num_bytes=3 * num_loaded * self._padded_height * self._padded_width,
            key=f"data.padding: is {self.padding}",
            what=f"{num_loaded:,} padded images",
        )
        row_offsets = self._crop_row_offsets(num_loaded)  # int64 (images, 3 * H)
        self._row_offsets = row_offsets.to(images.pixels.device)

        # The caches hold two epochs, so that an epoch is still there while the next one begins.
        self.shifts = lru_cache(maxsize=2)(self._draw_shifts)
        self._epoch_on_device = lru_cache(maxsize=2)(self._move_epoch_to_device)

    def micro_batch(self, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
        """See `TrainingBatches`."""
        epoch, positions = self.locate(step, micro_step)
        order, crop_corners = self._epoch_on_device(epoch)  # int64 (N,), int64 (N,)
        samples = order[positions]  # int64 (B,)
        corners = crop_corners[positions]  # int64 (B,)
        if self.mixing is not None:
            position = self.position_before(positions)
            before = slice(position, position + 1)
            samples = torch.cat([order[before], samples])  # int64 (B + 1,)
            corners = torch.cat([crop_corners[before], corners])  # int64 (B + 1,)

        # index_select copies image by image, where `pixels[samples]` copies byte by byte.
        pixels = self.images.pixels.index_select(0, samples)  # uint8 (B, 3, H, W)
        labels = self.images.labels.index_select(0, samples)  # int64 (B,)
        if self.crop:
            pixels = self._crop_and_flip(pixels, corners)

        return self._finish(pixels, labels, step)

    def _draw_shifts(self, epoch: int) -> Tensor:
        return draw_shifts(self.seed, epoch, 0, self.num_samples, self.padding, self.flip)

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

    def _crop_row_offsets(self, num_images: int) -> Tensor:
        """Positions of all rows of all crops in the bytes of `_crop_and_flip`, for corners at 0.

        Returns:
            int64 (num_images, 3 * H).
        """
        channel_size = self._padded_height * self._padded_width  # bytes
        sample_size = (1 + self.flip) * 3 * channel_size  # bytes; with a flip there are two images
        height = self._padded_height - 2 * self.padding

        sample_offsets = torch.arange(num_images) * sample_size  # int64 (num_images,)
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


def crop_settings(section: recipes.Data, width: int) -> tuple[bool, bool, int]:
    """Whether images are cropped after padding, whether they are mirrored, and the padding.

    Args:
        section: the `data` section of the recipe.
        width: of the images, in pixels.
    """
    crop = section.augment in ("crop", "crop_flip")
    flip = section.augment == "crop_flip"
    default = width // 8 if section.padding is None else section.padding
    return crop, flip, default if crop else 0


def normalization(section: recipes.Data, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel: the recipe's, or else those of some images.

    Args:
        section: the `data` section of the recipe.
        pixels: uint8 (N, 3, H, W).

    Returns:
        Both float32 (3, 1, 1), in [0, 255], on the device of `pixels`.
    """
    mean, std = _channel_statistics(pixels)
    if section.mean is not None:
        mean = 255.0 * torch.tensor(section.mean, device=pixels.device)[:, None, None]
    if section.std is not None:
        std = 255.0 * torch.tensor(section.std, device=pixels.device)[:, None, None]
    return mean, std


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
