"""Data sets in memory: their images, labels, classes and fingerprints."""

import hashlib
import pickle
from collections import Counter
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from lrd import recipe as recipes
from lrd.data import datasets
from lrd.data.datasets import Dataset, Images
from lrd.errors import UserError
from lrd.torchvision_compat import torchvision
from tests.helpers.synthetic_data import SIZE, data_section


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return datasets.load_dataset(recipes.Data(dataset="digits"), seed=0)


def test_digits_has_its_images_and_every_class_in_both_parts(digits):
    assert len(digits.train) == 1437
    assert len(digits.test) == 360
    assert digits.classes == tuple("0123456789")

    for images in (digits.train, digits.test):
        assert images.pixels.dtype == torch.uint8
        assert images.pixels.shape == (len(images), 3, 8, 8)
        assert int(images.pixels.max()) == 255
        assert images.labels.dtype == torch.int64
        assert set(images.labels.tolist()) == set(range(10))


def test_digits_are_those_that_scikit_learn_loads(digits, monkeypatch):
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    by_scikit_learn = datasets.load_dataset(recipes.Data(dataset="digits"), seed=0)
    assert by_scikit_learn.fingerprint() == digits.fingerprint()


def test_no_digit_is_in_both_parts(digits):
    from sklearn.datasets import load_digits

    def count_images(images) -> Counter:
        return Counter(np.asarray(image, dtype=np.uint8).tobytes() for image in images)

    pixels = torch.cat([digits.train.pixels, digits.test.pixels])
    expected_gray = np.rint(load_digits().images * 255 / 16)
    assert count_images(pixels[:, 0].numpy()) == count_images(expected_gray)


def test_synthetic_is_a_function_of_the_seed():
    section = data_section(num_samples=50)
    dataset = datasets.load_dataset(section, seed=1)
    assert dataset.train.pixels.shape == (50, 3, SIZE, SIZE)
    assert dataset.train.pixels.dtype == torch.uint8
    assert dataset.test.pixels.shape == (10, 3, SIZE, SIZE)
    assert not torch.equal(dataset.train.pixels[:10], dataset.test.pixels)

    fingerprint = dataset.fingerprint()
    assert datasets.load_dataset(section, seed=1).fingerprint() == fingerprint
    assert datasets.load_dataset(section, seed=2).fingerprint() != fingerprint


@pytest.mark.parametrize("size", [5, 16])
def test_images_are_resized_to_image_size(digits, size):
    resized = datasets.load_dataset(recipes.Data(dataset="digits", image_size=size), seed=0)

    for images, original in ((resized.train, digits.train), (resized.test, digits.test)):
        assert images.pixels.shape == (len(original), 3, size, size)
        assert images.pixels.dtype == torch.uint8
        assert torch.equal(images.labels, original.labels)
        assert abs(images.pixels.float().mean() - original.pixels.float().mean()) < 3


def test_an_image_size_that_the_images_have_changes_nothing(digits):
    same_size = datasets.load_dataset(recipes.Data(dataset="digits", image_size=8), seed=0)
    assert same_size.fingerprint() == digits.fingerprint()


@pytest.mark.parametrize("part", ["train", "test"])
def test_fingerprint_changes_with_one_pixel_or_label(part):
    dataset = datasets.load_dataset(data_section(), seed=0)
    images = getattr(dataset, part)
    other_pixels = images.pixels.clone()
    other_pixels[-1, 2, -1, -1] ^= 1
    other_labels = images.labels.clone()
    other_labels[0] += 1

    for changed in (Images(other_pixels, images.labels), Images(images.pixels, other_labels)):
        other_dataset = replace(dataset, **{part: changed})
        assert other_dataset.fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_training_images_are_counted_without_reading_them(dataset):
    section = data_section(dataset=dataset)
    images = datasets.load_dataset(section, seed=0).train
    assert datasets.count_training_images(section) == len(images)


@pytest.fixture(params=["cifar10", "cifar100"])
def fake_cifar(request, tmp_path, monkeypatch):
    """A data set of eight images in torchvision's format on disk.

    Returns its `data` section, the pixels (8, 32, 32, 3) and the labels.
    """
    if request.param == "cifar10":
        cifar = torchvision.datasets.CIFAR10
        label_key = "labels"
    else:
        cifar = torchvision.datasets.CIFAR100
        label_key = "fine_labels"
    folder = tmp_path / cifar.base_folder
    folder.mkdir()

    def write(name: str, content: dict) -> list[str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    labels = [3, 1, 0, 2, 1, 0, 3, 2]
    rows = pixels.transpose(0, 3, 1, 2).reshape(8, -1)
    train_files = [
        write("part0", {"data": rows[0:3], label_key: labels[0:3]}),
        write("part3", {"data": rows[3:6], label_key: labels[3:6]}),
    ]
    test_files = [write("test", {"data": rows[6:], label_key: labels[6:]})]
    names_file, md5 = write("names", {cifar.meta["key"]: ["a", "b", "c", "d"]})

    monkeypatch.setattr(cifar, "train_list", train_files)
    monkeypatch.setattr(cifar, "test_list", test_files)
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "filename": names_file, "md5": md5})
    return recipes.Data(dataset=request.param, root=str(tmp_path)), pixels, labels


def test_cifar_is_read_from_its_files(fake_cifar):
    section, expected_pixels, expected_labels = fake_cifar
    dataset = datasets.load_dataset(section, seed=0)
    pixels = torch.cat([dataset.train.pixels, dataset.test.pixels])
    labels = torch.cat([dataset.train.labels, dataset.test.labels])

    assert len(dataset.train) == 6
    assert len(dataset.test) == 2
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), expected_pixels)
    assert labels.tolist() == expected_labels
    assert labels.dtype == torch.int64
    assert dataset.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    "error",
    [URLError("no route to host"), RuntimeError("File not found or corrupted."), TimeoutError()],
    ids=repr,
)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_that_is_missing_and_cannot_be_downloaded_is_refused(
    tmp_path, monkeypatch, dataset, error
):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    with pytest.raises(UserError) as caught:
        datasets.load_dataset(recipes.Data(dataset=dataset, root=str(tmp_path)), seed=0)

    (line,) = str(caught.value).splitlines()
    assert line.startswith("data.root: ")
    assert str(tmp_path) in line
    assert str(error) in line
