"""Data sets in memory as uint8: digits, CIFAR-10 and -100, folders of images, synthetic noise."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrd import philox
from lrd import recipe as recipes
from lrd.data.folder_lock import one_process_at_a_time
from lrd.data.image_folder import list_folder, read_folder
from lrd.errors import UserError, first_line
from lrd.philox import Domain
from lrd.torchvision_compat import torchvision

_WORD_BYTES = philox.WORD_BITS // 8


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
        num_held_out = round(fraction * count)
        if not 0 < num_held_out < count:
            raise UserError(
                f"data.validation: is {fraction}, which is {num_held_out} of "
                f"{count} training images"
            )

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


def load_dataset(section: recipes.Data, seed: int) -> Dataset:
    """Load the data set that a recipe names, and hold out a part of it if the recipe says so.

    Args:
        section: the `data` section of the recipe.
        seed: the seed of the recipe; `synthetic` and the part that is held out depend on it.

    Returns:
        The data set, on the host.

    Raises:
        UserError: the data set is missing, empty or damaged, or cannot be downloaded.
    """
    dataset = _load_all(section, seed)
    if section.validation > 0.0:
        dataset = dataset.hold_out(section.validation, seed)
    return dataset


def _load_all(section: recipes.Data, seed: int) -> Dataset:
    """Load the training and test images."""
    if section.dataset == "imagefolder":
        return _load_image_folder(section)

    if section.dataset == "digits":
        dataset = _load_digits()
    elif section.dataset == "synthetic":
        dataset = _make_synthetic(section, seed)
    else:
        dataset = _load_cifar(section)

    size = section.image_size
    if size is None or size == dataset.train.pixels.shape[-1]:
        return dataset
    return Dataset(_resize(dataset.train, size), _resize(dataset.test, size), dataset.classes)


def count_training_images(section: recipes.Data) -> int:
    """Count the training images of a recipe's data set, if possible without reading them.

    Args:
        section: the `data` section of the recipe.

    Raises:
        UserError: the folder of images is missing.
    """
    if section.dataset == "imagefolder":
        files, _ = list_folder(Path(section.root) / "train")
        count = len(files)
    elif section.dataset == "digits":
        count = 1437
    elif section.dataset == "synthetic":
        count = section.num_samples
    else:
        count = 50_000  # CIFAR-10 and CIFAR-100

    return count - round(section.validation * count)


def _load_digits() -> Dataset:
    """Load the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels.

    Each fifth image is a test image.
    """
    table = _read_digits_table()  # float64 (1797, 65)
    gray = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    gray_pixels = torch.from_numpy(gray)[:, None]  # uint8 (N, 1, 8, 8)
    pixels = gray_pixels.expand(-1, 3, -1, -1).contiguous()  # uint8 (N, 3, 8, 8)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))  # int64 (N,)

    is_test = torch.arange(len(labels)) % 5 == 0
    train = Images(pixels[~is_test], labels[~is_test])
    test = Images(pixels[is_test], labels[is_test])
    return Dataset(train, test, classes=tuple(str(digit) for digit in range(10)))


def _read_digits_table() -> NDArray[np.float64]:
    """Read the file of digits that comes with scikit-learn.

    Returns:
        float64 (1797, 65): in each row the 64 gray values of an image, in [0, 16], and its digit.
    """
    package = find_spec("sklearn")
    if package is not None and package.origin:
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")

    # This import takes a second, and the ranks of a host would do it one after the other.
    from sklearn.datasets import load_digits

    return np.column_stack(load_digits(return_X_y=True))


def _load_cifar(section: recipes.Data) -> Dataset:
    """Load CIFAR-10 or CIFAR-100 from `section.root`, and download it there first if need be."""
    if section.dataset == "cifar10":
        cifar = torchvision.datasets.CIFAR10
    else:
        cifar = torchvision.datasets.CIFAR100

    parts = []
    for is_train in (True, False):
        try:
            with one_process_at_a_time(Path(section.root)):
                source = cifar(section.root, train=is_train, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.root: {section.dataset} is not in {section.root} "
                f"and cannot be downloaded: {first_line(error)}"
            ) from None

        pixels = torch.from_numpy(source.data)  # uint8 (N, 32, 32, 3)
        pixels = pixels.permute(0, 3, 1, 2).contiguous()  # uint8 (N, 3, 32, 32)
        parts.append(Images(pixels, torch.tensor(source.targets)))

    return Dataset(train=parts[0], test=parts[1], classes=tuple(source.classes))


def _load_image_folder(section: recipes.Data) -> Dataset:
    """Load `train/` and `test/` under `section.root`; test images get the training images' size."""
    root = Path(section.root)
    train_pixels, train_labels, classes = read_folder(
        root / "train", section.image_size, section.skip_corrupt
    )
    size = train_pixels.shape[-1]
    test_pixels, test_labels, test_classes = read_folder(root / "test", size, section.skip_corrupt)

    if classes != test_classes:
        unpaired = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise UserError(
            f"data.root: {root}/train and {root}/test have different classes; "
            f"only in one of them: {unpaired}"
        )

    train = Images(train_pixels, train_labels)
    test = Images(test_pixels, test_labels)
    return Dataset(train, test, classes)


def _make_synthetic(section: recipes.Data, seed: int) -> Dataset:
    """Make noise with labels, for speed tests: a network can only memorize it."""
    size = section.image_size or 32
    num_train = section.num_samples
    num_test = max(1, section.num_samples // 5)

    parts = []
    for part, count in enumerate((num_train, num_test)):
        num_bytes = count * 3 * size * size
        words = philox.words(
            seed,
            Domain.SYNTHETIC,
            position=(part, 0, 0),
            first_block=0,
            n_blocks=-(-num_bytes // (philox.WORDS_PER_BLOCK * _WORD_BYTES)),
        )
        noise = words.view(np.uint8)[:num_bytes]
        pixels = torch.from_numpy(noise).view(count, 3, size, size)
        parts.append(Images(pixels, labels=torch.arange(count) % 10))

    return Dataset(train=parts[0], test=parts[1], classes=tuple(str(i) for i in range(10)))


def _resize(images: Images, size: int) -> Images:
    """Resize images to `size` x `size` pixels."""
    from torchvision.transforms.v2.functional import resize  # only here: its import takes a while

    return Images(resize(images.pixels, [size, size], antialias=True), images.labels)
