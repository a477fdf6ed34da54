"""Data sets in memory: their images, labels, classes and fingerprints."""

import hashlib
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from lrd import recipe as recipes
from lrd.data import Dataset, Images, datasets, image_folder
from lrd.data.batches import Batches
from lrd.errors import UserError
from lrd.torchvision_compat import torchvision
from tests.clients.reference import philox_block
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


@pytest.mark.parametrize("part", ["train", "test", "validation"])
def test_fingerprint_changes_with_one_pixel_or_label(part):
    dataset = datasets.load_dataset(data_section(validation=0.2), seed=0)
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
    assert datasets.count_training_images(section, seed=0) == len(images)

    section = data_section(dataset=dataset, validation=0.3)
    images = datasets.load_dataset(section, seed=0).train
    assert datasets.count_training_images(section, seed=0) == len(images)


def test_images_of_one_class_are_refused():
    with pytest.raises(UserError, match=r"^data\.dataset: .* synthetic are of one class, '0'"):
        datasets.load_dataset(data_section(num_samples=1), seed=0)


# Images held out for validation


def number_images(count: int) -> Dataset:
    """Images that hold their own number, in their pixels and their labels."""
    numbers = torch.arange(count)
    pixels = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    images = Images(pixels, numbers)
    return Dataset(images, images, classes=tuple(str(i) for i in range(count)))


def held_out_numbers(count: int, fraction: float, seed: int) -> list[int]:
    return number_images(count).hold_out(fraction, seed).validation.labels.tolist()


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, 20), (0.333, 67), (0.99, 198)])
def test_held_out_images_and_the_rest_are_all_images_in_their_order(fraction, expected):
    dataset = number_images(200)
    parted = dataset.hold_out(fraction, seed=3)
    train = parted.train.labels.tolist()
    held_out = parted.validation.labels.tolist()

    assert len(held_out) == expected
    assert sorted(train + held_out) == list(range(200))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    for images in (parted.train, parted.validation):
        assert torch.equal(images.pixels[:, 2, 1, 0].long(), images.labels)
    assert parted.test is dataset.test
    assert parted.classes == dataset.classes


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1])
def test_held_out_images_are_those_with_the_smallest_keys_of_philox(seed):
    count = 50
    words = []
    for block in range(13):
        bits = philox_block((block, 0, 0, 0), (seed, 4))
        words += [bits >> 64 * i & (1 << 64) - 1 for i in range(4)]

    by_key = sorted(range(count), key=lambda i: words[i])
    assert held_out_numbers(count, 0.2, seed) == sorted(by_key[:10])
    # A larger part contains the smaller one.
    assert held_out_numbers(count, 0.3, seed) == sorted(by_key[:15])


def test_each_image_is_held_out_about_equally_often():
    counts = Counter()
    for seed in range(1000):
        counts.update(held_out_numbers(40, 0.25, seed))
    # 250 times on average, with a standard deviation of 14: 5 of them.
    assert all(abs(counts[number] - 250) < 70 for number in range(40))


def test_held_out_images_are_the_same_on_any_number_of_ranks(monkeypatch):
    section = data_section(validation=0.2, batch_size=40)
    dataset = datasets.load_dataset(section, seed=7)
    assert len(dataset.train) == 80
    assert len(dataset.validation) == 20

    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        of_rank = datasets.load_dataset(section, seed=7)
        assert of_rank.fingerprint() == dataset.fingerprint()
        batches = Batches(of_rank.train, section, seed=7, rank=rank, world_size=2)
        seen += [i for step in range(2) for i in batches.indices(step).tolist()]
    assert sorted(seen) == list(range(80))


def test_the_fingerprint_tells_what_is_held_out():
    dataset = number_images(100)
    fingerprints = {dataset.fingerprint()}
    for fraction, seed in ((0.1, 0), (0.1, 1), (0.2, 0)):
        parted = dataset.hold_out(fraction, seed)
        fingerprints.add(parted.fingerprint())
        assert dataset.hold_out(fraction, seed).fingerprint() == parted.fingerprint()
    assert len(fingerprints) == 4


def test_held_out_images_are_evaluated_and_moved_with_the_others():
    dataset = number_images(10)
    assert list(dataset.evaluated_parts) == ["test"]

    parted = dataset.hold_out(0.5, seed=0).to(torch.device("cpu"))
    assert list(parted.evaluated_parts) == ["test", "validation"]
    assert parted.evaluated_parts["validation"] is parted.validation


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_part_that_is_nothing_or_everything_is_refused(fraction):
    section = data_section(validation=fraction)
    for load in (datasets.load_dataset, datasets.count_training_images):
        with pytest.raises(UserError, match=rf"^data\.validation: is {fraction}, .* of 100 "):
            load(section, 0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan"), True, "half"])
def test_a_part_that_is_no_part_is_refused(fraction):
    with pytest.raises(UserError, match=r"^r\.yaml: data\.validation: "):
        recipes.parse({"data": {"validation": fraction}}, "r.yaml")


# The structure of a folder of images


def save_images(root: Path, *classes: str) -> None:
    for name in classes:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (10, 20, 30)).save(root / name / "x.png")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["train/a", "train/b"], ["/test is not a folder"]),
        (["train/a", "train/b", "val/a", "val/b"], ["/test", "/val;", "ln -s val "]),
        (["train/a", "train/b", "valid/a", "valid/b"], ["/test", "/valid;", "ln -s valid "]),
        (["train/a", "train/b", "test/a"], ["different classes", "b"]),
        (["train/a", "test/a"], ["/train has only one class, a"]),
        (["val/a", "val/b"], ["/train is not a folder"]),
    ],
)
def test_a_folder_of_images_is_checked_before_any_of_them_is_decoded(
    tmp_path, monkeypatch, classes, expected
):
    save_images(tmp_path, *classes)
    monkeypatch.setattr(image_folder, "_decode_all", lambda *_: pytest.fail("images are decoded"))

    with pytest.raises(UserError) as caught:
        datasets.load_dataset(recipes.Data(dataset="imagefolder", root=str(tmp_path)), seed=0)

    (line,) = str(caught.value).splitlines()
    assert line.startswith("data.root: ")
    for text in expected:
        assert text in line


def test_a_test_folder_beside_val_is_taken(tmp_path):
    save_images(tmp_path, "train/a", "train/b", "val/a", "test/a", "test/b")
    section = recipes.Data(dataset="imagefolder", root=str(tmp_path))
    assert len(datasets.load_dataset(section, seed=0).test) == 2


# CIFAR


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
