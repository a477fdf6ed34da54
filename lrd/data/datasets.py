"""Data sets in memory as uint8: digits, CIFAR, folders of images, noise, and the user's own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lrd import philox
from lrd import recipe as recipes
from lrd.data.folder_lock import one_process_at_a_time
from lrd.data.image_folder import list_classes, list_folder, read_folder
from lrd.data.images import Dataset, Images, count_held_out
from lrd.data.own_data import load_own_data
from lrd.data.storage import choose_storage
from lrd.errors import UserError, first_line
from lrd.host import require_memory
from lrd.philox import Domain
from lrd.recipe.schema import is_own
from lrd.torchvision_compat import torchvision

__all__ = ["Dataset", "Images", "count_training_images", "load_dataset"]

_WORD_BYTES = philox.WORD_BITS // 8


def load_dataset(section: recipes.Data, seed: int) -> Dataset:
    """Load the data set that a recipe names, and hold out a part of it if the recipe says so.

    Args:
        section: the `data` section of the recipe.
        seed: the seed of the recipe; `synthetic` and the part that is held out depend on it.

    Returns:
        The data set, on the host.

    Raises:
        UserError: the data set is missing, empty or damaged, cannot be downloaded, or has only one
            class.
    """
    dataset = _load_all(section, seed)
    if section.validation > 0.0:
        dataset = dataset.hold_out(section.validation, seed)

    labels = dataset.train.labels if isinstance(dataset.train, Images) else None
    # The loss would be zero after a few steps.
    if labels is not None and bool((labels == labels[0]).all()):
        name = dataset.classes[int(labels[0])]
        raise UserError(
            f"data.dataset: all training images of {section.dataset} are of one class, {name!r}; "
            "training needs at least two"
        )
    return dataset


def count_training_images(section: recipes.Data, seed: int) -> int:
    """Count the training images of a recipe's data set, if possible without reading them.

    Args:
        section: the `data` section of the recipe.
        seed: the seed of the recipe.

    Raises:
        UserError: the folder of images is missing, the user's own data set cannot be loaded, or no
            images would be left.
    """
    if is_own(section.dataset):
        count = len(load_own_data(section, seed).train)
    elif section.dataset == "imagefolder":
        count = _count_files(section)
    elif section.dataset == "digits":
        count = 1437
    elif section.dataset == "synthetic":
        count = section.num_samples
    else:
        count = 50_000  # CIFAR-10 and CIFAR-100

    if section.validation > 0.0:
        count -= count_held_out(section.validation, count)
    return count


def _count_files(section: recipes.Data) -> int:
    root = Path(section.root)
    if choose_storage(section) == "packed":
        from lrd.data.streaming.packed import open_pack

        pack = open_pack(root, "train")
        if pack is not None:
            return len(pack)
    files, _ = list_folder(root / "train")
    return len(files)


def _load_all(section: recipes.Data, seed: int) -> Dataset:
    """Load the training and test images, or find them where they are to stay on disk."""
    storage = choose_storage(section)
    if storage in ("files", "packed"):
        from lrd.data.streaming.folders import load_folder  # only here: it imports torchvision

        check_folders(Path(section.root), storage)
        return load_folder(section, seed, storage)
    if section.dataset == "imagefolder":
        return _load_image_folder(section)

    if is_own(section.dataset):
        dataset = load_own_data(section, seed)
    elif section.dataset == "digits":
        dataset = _load_digits()
    elif section.dataset == "synthetic":
        dataset = _make_synthetic(section, seed)
    else:
        dataset = _load_cifar(section)

    train = dataset.train
    test = dataset.test
    if section.image_size is None or not isinstance(train, Images) or not isinstance(test, Images):
        return dataset
    return Dataset(
        train=_resize(train, section.image_size),
        test=_resize(test, section.image_size),
        classes=dataset.classes,
    )


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
    classes = check_folders(root, "memory")
    train_pixels, train_labels, _ = read_folder(
        root / "train", section.image_size, section.skip_corrupt, section.resize
    )
    size = train_pixels.shape[-1]
    test_pixels, test_labels, _ = read_folder(
        root / "test", size, section.skip_corrupt, section.resize
    )

    train = Images(train_pixels, train_labels)
    test = Images(test_pixels, test_labels)
    return Dataset(train, test, classes)


def check_folders(root: Path, storage: str) -> tuple[str, ...]:
    """Check the structure of a folder of images, before images are decoded, which may take hours.

    Returns:
        The names of the classes; none where only a pack is there.

    Raises:
        UserError: a folder or an image is missing, or the classes differ, or there is only one.
    """
    if storage == "packed" and not (root / "train").exists():
        return ()

    def find_classes(folder: Path) -> tuple[str, ...]:
        return list_folder(folder)[1] if storage == "memory" else list_classes(folder)

    classes = find_classes(root / "train")
    if not (root / "test").exists():
        for name in ("val", "valid", "validation"):
            if (root / name).is_dir():
                raise UserError(
                    f"data.root: there is no folder {root}/test, but {root}/{name}; rename it to "
                    f"test, or link it: ln -s {name} {root}/test"
                )
    test_classes = find_classes(root / "test")

    if classes != test_classes:
        unpaired = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise UserError(
            f"data.root: {root}/train and {root}/test have different classes; "
            f"only in one of them: {unpaired}"
        )
    if len(classes) < 2:
        raise UserError(
            f"data.root: {root}/train has only one class, {classes[0]}; training needs at least two"
        )
    return classes


def _make_synthetic(section: recipes.Data, seed: int) -> Dataset:
    """Make noise with labels, for speed tests: a network can only memorize it."""
    size = section.image_size or 32
    num_train = section.num_samples
    num_test = max(1, section.num_samples // 5)
    require_memory(
        num_bytes=(num_train + num_test) * 3 * size * size,
        key=f"data.num_samples: is {num_train}, data.image_size: is {size}",
        what="the images",
    )

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
    if images.pixels.shape[2:] == (size, size):
        return images
    require_memory(
        num_bytes=len(images) * 3 * size * size,
        key=f"data.image_size: is {size}",
        what=f"{len(images):,} images",
    )

    from torchvision.transforms.v2.functional import resize  # only here: its import takes a while

    return Images(resize(images.pixels, [size, size], antialias=True), images.labels)
