"""Data sets in memory as uint8, and every batch a function of (seed, position).

The order of an epoch comes from (seed, epoch), the augmentation of a sample from (seed, epoch, sample's index): the
same on any number of ranks. Batches are gathered, augmented and normalized by tensor operations on the training
device; torchvision's transforms would draw one crop for a whole batch, and from a running generator.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrd import philox
from lrd import recipe as recipes
from lrd.errors import UserError, first_line
from lrd.images import in_turn, list_folder, read_folder
from lrd.philox import Domain
from lrd.vision import torchvision


@dataclass(frozen=True)
class Images:
    """Labelled images: `pixels` uint8 (N, 3, H, W), `labels` int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training and test images and the names of the classes."""

    train: Images
    test: Images
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> Dataset:
        return Dataset(self.train.to(device), self.test.to(device), self.classes)

    def fingerprint(self) -> str:
        """SHA-256 of all pixels and labels: what two hosts compare to know that they train on the same data."""
        digest = hashlib.sha256()
        for tensor in (self.train.pixels, self.train.labels, self.test.pixels, self.test.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def load(section: recipes.Data, seed: int) -> Dataset:
    """Read the data set a recipe names.

    Raises:
        UserError: it is missing, empty, damaged or cannot be downloaded.
    """
    if section.dataset == "digits":
        dataset = _digits()
    elif section.dataset == "synthetic":
        dataset = _synthetic(section, seed)
    elif section.dataset == "imagefolder":
        return _folder(section)
    else:
        dataset = _cifar(section)
    size = section.image_size
    if size is None or size == dataset.train.pixels.shape[-1]:
        return dataset
    return Dataset(_resized(dataset.train, size), _resized(dataset.test, size), dataset.classes)


def count_training_images(section: recipes.Data) -> int:
    """How many training images a recipe's data set has, without reading them.

    Raises:
        UserError: an image folder that is not there.
    """
    if section.dataset == "imagefolder":
        return len(list_folder(Path(section.root) / "train")[0])
    return {"digits": 1437, "synthetic": section.num_samples}.get(section.dataset, 50_000)


def _digits() -> Dataset:
    """The 1,797 handwritten digits that come with scikit-learn, 8x8; each fifth one is for the test."""
    table = _digits_table()
    gray = torch.from_numpy(np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8))
    pixels = gray[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    test = torch.arange(len(labels)) % 5 == 0
    classes = tuple(str(digit) for digit in range(10))
    return Dataset(Images(pixels[~test], labels[~test]), Images(pixels[test], labels[test]), classes)


def _digits_table() -> NDArray[np.float64]:
    """64 gray values in [0, 16] and the digit, image by image."""
    found = find_spec("sklearn")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz" if found and found.origin else None
    if file is not None and file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # takes a second, and on each rank of a host in turn

    return np.column_stack(load_digits(return_X_y=True))


def _cifar(section: recipes.Data) -> Dataset:
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[section.dataset]
    parts = []
    for train in (True, False):
        try:
            with in_turn(Path(section.root)):
                part = cls(section.root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(
                f"data.root: no {section.dataset} under {section.root}, nor to be downloaded: {reason}"
            ) from None
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Images(pixels, torch.tensor(part.targets)))
    return Dataset(parts[0], parts[1], tuple(part.classes))


def _folder(section: recipes.Data) -> Dataset:
    root = Path(section.root)
    train_pixels, train_labels, classes = read_folder(root / "train", section.image_size, section.skip_corrupt)
    size = train_pixels.shape[-1]
    test_pixels, test_labels, test_classes = read_folder(root / "test", size, section.skip_corrupt)
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise UserError(f"data.root: {root}/train and {root}/test have not the same classes; in one only: {odd}")
    train, test = Images(train_pixels, train_labels), Images(test_pixels, test_labels)
    return Dataset(train, test, classes)


def _synthetic(section: recipes.Data, seed: int) -> Dataset:
    """Noise with labels, for speed tests. Nothing can be learned from it but by heart."""
    size = section.image_size or 32
    parts = []
    for part, count in enumerate((section.num_samples, max(1, section.num_samples // 5))):
        octets = count * 3 * size * size
        blocks = -(-octets // (philox.WORDS_PER_BLOCK * 8))
        noise = philox.words(seed, Domain.SYNTHETIC, (part, 0, 0), 0, blocks).view(np.uint8)[:octets]
        pixels = torch.from_numpy(noise).view(count, 3, size, size)
        parts.append(Images(pixels, torch.arange(count) % 10))
    return Dataset(parts[0], parts[1], tuple(str(i) for i in range(10)))


def _resized(images: Images, size: int) -> Images:
    from torchvision.transforms.v2.functional import resize  # only here: its import takes a while

    return Images(resize(images.pixels, [size, size], antialias=True), images.labels)


class Batches:
    """The training batches: which samples, augmented how, at which step, for which rank.

    The position is the step alone: `steps_per_epoch` full batches make an epoch, the last incomplete one is dropped.
    A batch is cut into `accumulation_steps * world_size` equal contiguous pieces, micro step by micro step.

    Args:
        images: the training images, on the training device.
        section: the recipe's `data`.
        seed: the recipe's seed.
        rank, world_size: this rank and how many there are.
        accumulation_steps: micro steps of one step.

    Raises:
        UserError: the batch cannot be shared evenly, or is larger than the data set.
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
        pieces = world_size * accumulation_steps
        if section.batch_size % pieces:
            below = section.batch_size // pieces * pieces
            may = f"{below} or {below + pieces}" if below else f"{pieces}"
            raise UserError(
                f"data.batch_size: is {section.batch_size}, which {world_size} rank(s) x {accumulation_steps} "
                f"accumulation step(s) cannot share evenly; may be {may}"
            )
        if section.batch_size > len(images):
            raise UserError(
                f"data.batch_size: is {section.batch_size}, but there are only {len(images)} training images"
            )
        self.images = images
        self.batch_size = section.batch_size
        self.micro_batch_size = section.batch_size // pieces
        self.steps_per_epoch = len(images) // section.batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.crop = section.augment in ("crop", "crop_flip")
        self.flip = section.augment == "crop_flip"
        height, width = images.pixels.shape[2:]
        self.padding = (width // 8 if section.padding is None else section.padding) if self.crop else 0
        self.mean, self.std = _channel_statistics(images.pixels)
        self.order = lru_cache(maxsize=2)(self._order)
        self.shifts = lru_cache(maxsize=2)(self._shifts)
        self._plan = lru_cache(maxsize=2)(self._planned)
        self._padded = (height + 2 * self.padding, width + 2 * self.padding)  # pixels of a padded image
        self._rows = self._row_starts().to(images.pixels.device)

    def indices(self, step: int, micro_step: int = 0) -> Tensor:
        """The sample indices of this rank at a micro step: int64 (micro_batch_size,), on the host."""
        epoch, part = self._part(step, micro_step)
        return self.order(epoch)[part]

    def __call__(self, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs float32 (micro_batch_size, 3, H, W), normalized, and labels int64 (micro_batch_size,)."""
        epoch, part = self._part(step, micro_step)
        samples, corners = self._plan(epoch)
        own = samples[part]
        pixels = self.images.pixels.index_select(0, own)  # copies image by image; pixels[own] goes byte by byte
        if self.crop:
            pixels = self._augmented(pixels, corners[part])
        return self.normalized(pixels), self.images.labels.index_select(0, own)

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32, zero mean and unit variance over the training set, channel by channel."""
        return pixels.float().sub_(self.mean).div_(self.std)  # in place: one allocation of a batch's size, not three

    def _part(self, step: int, micro_step: int) -> tuple[int, slice]:
        """The epoch, and where in its order this rank's samples stand."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.batch_size + (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return epoch, slice(start, start + self.micro_batch_size)

    def _order(self, epoch: int) -> Tensor:
        count = len(self.images)
        keys = philox.words(self.seed, Domain.ORDER, (epoch, 0, 0), 0, -(-count // philox.WORDS_PER_BLOCK))[:count]
        return torch.from_numpy(np.argsort(keys, kind="stable"))

    def _shifts(self, epoch: int) -> Tensor:
        """Each sample's crop and flip in an epoch: int64 (N, 3) of row, column in [0, 2 * padding], and flip."""
        draws = philox.words(self.seed, Domain.AUGMENT, (epoch, 0, 0), 0, len(self.images)).reshape(-1, 4) >> 32
        choices = np.array([2 * self.padding + 1, 2 * self.padding + 1, 2 if self.flip else 1], dtype=np.uint64)
        return torch.from_numpy((draws[:, :3] * choices >> 32).astype(np.int64))

    def _planned(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Samples in the epoch's order and the corners of their crops, both int64 (N,), on the training device.

        Copied there once an epoch: a copy in each step would make the host wait for a GPU. A corner is where the crop
        begins in `_augmented`'s two padded images, the sample and its mirror image, laid out one after the other.
        """
        order, device = self.order(epoch), self.images.pixels.device
        row, column, flip = self.shifts(epoch)[order].T
        height, width = self._padded
        column = torch.where(flip == 1, 2 * self.padding - column, column)
        return order.to(device), (flip * 3 * height * width + row * width + column).to(device)

    def _row_starts(self) -> Tensor:
        """Where each row of each crop begins whose corner is 0, in `_augmented`'s bytes: int64 (micro_batch, 3 * H)."""
        height, width = self._padded
        sample = torch.arange(self.micro_batch_size) * ((1 + self.flip) * 3 * height * width)
        row = torch.arange(3)[:, None] * (height * width) + torch.arange(height - 2 * self.padding) * width
        return sample[:, None] + row.flatten()

    def _augmented(self, pixels: Tensor, corners: Tensor) -> Tensor:
        """Crop with zero padding and flip, each sample its own: uint8 (B, 3, H, W), int64 (B,) -> uint8 (B, 3, H, W).

        A flipped crop is a crop of the mirror image, and a crop is 3 * H runs of W bytes. `unfold` is a view of the run
        that begins at each byte; from it index_select copies whole runs, where an index of pixels copies bytes.
        """
        padded = torch.nn.functional.pad(pixels, [self.padding] * 4)
        if self.flip:
            padded = torch.stack([padded, padded.flip(-1)], 1)
        runs = padded.flatten().unfold(0, pixels.shape[-1], 1)
        return runs.index_select(0, (self._rows + corners[:, None]).flatten()).view(pixels.shape)


def _channel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from integer sums and so the same everywhere: float32 (3, 1, 1)."""
    count = pixels.shape[0] * pixels.shape[2] * pixels.shape[3]
    histogram = torch.stack([torch.bincount(pixels[:, c].flatten().int().cpu(), minlength=256) for c in range(3)])
    values = torch.arange(256)
    mean = (histogram * values).sum(1).double() / count
    square = (histogram * values**2).sum(1).double() / count
    std = (square - mean**2).clamp_min(1e-12).sqrt()
    return mean.float()[:, None, None].to(pixels.device), std.float()[:, None, None].to(pixels.device)
