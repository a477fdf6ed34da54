"""Data sets in memory, and batches that are a function of (seed, position) whatever the number of ranks."""

import hashlib
import pickle
from collections import Counter
from dataclasses import replace
from itertools import product
from urllib.error import URLError

import numpy as np
import pytest
import torch

from lrd import data
from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.vision import torchvision

SIZE = 8


def section(**values) -> recipes.Data:
    return recipes.Data(**{"dataset": "synthetic", "image_size": SIZE, "num_samples": 100, "batch_size": 48, **values})


def batches(seed: int = 0, rank: int = 0, world_size: int = 1, accumulation_steps: int = 1, **values) -> data.Batches:
    part = section(**values)
    return data.Batches(data.load(part, 0).train, part, seed, rank, world_size, accumulation_steps)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load(recipes.Data(dataset="digits"), seed=0)


def test_digits_has_its_images_and_every_class_in_both_parts(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    for part in (digits.train, digits.test):
        assert part.pixels.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.pixels.shape == (len(part), 3, 8, 8)
        assert set(part.labels.tolist()) == set(range(10))
        assert int(part.pixels.max()) == 255
    assert digits.classes == tuple("0123456789")


def test_digits_are_those_that_scikit_learn_loads(digits, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert data.load(recipes.Data(dataset="digits"), seed=0).fingerprint() == digits.fingerprint()


def test_no_digit_is_in_both_parts(digits):
    from sklearn.datasets import load_digits

    def count(pixels) -> Counter:
        return Counter(np.asarray(pixels, dtype=np.uint8).tobytes() for pixels in pixels)

    both = torch.cat([digits.train.pixels, digits.test.pixels])[:, 0]
    assert count(both.numpy()) == count(np.rint(load_digits().images * 255 / 16))


def test_synthetic_is_a_function_of_the_seed():
    first, again, other = (data.load(section(num_samples=50), seed) for seed in (1, 1, 2))
    assert first.train.pixels.shape == (50, 3, SIZE, SIZE)
    assert first.test.pixels.shape == (10, 3, SIZE, SIZE)
    assert first.train.pixels.dtype == torch.uint8
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != other.fingerprint()
    assert not torch.equal(first.train.pixels[:10], first.test.pixels)


@pytest.mark.parametrize("size", [5, 16])
def test_images_are_brought_to_image_size(digits, size):
    resized = data.load(recipes.Data(dataset="digits", image_size=size), seed=0)
    for part, original in ((resized.train, digits.train), (resized.test, digits.test)):
        assert part.pixels.shape == (len(original), 3, size, size)
        assert part.pixels.dtype == torch.uint8
        assert torch.equal(part.labels, original.labels)
        assert abs(part.pixels.float().mean() - original.pixels.float().mean()) < 3


def test_the_own_size_as_image_size_changes_nothing(digits):
    assert data.load(recipes.Data(dataset="digits", image_size=8), 0).fingerprint() == digits.fingerprint()


@pytest.mark.parametrize("part", ["train", "test"])
def test_fingerprint_changes_with_one_pixel_or_label(part):
    dataset = data.load(section(), 0)
    images = getattr(dataset, part)
    pixels, labels = images.pixels.clone(), images.labels.clone()
    pixels[-1, 2, -1, -1] ^= 1
    labels[0] += 1
    for changed in (data.Images(pixels, images.labels), data.Images(images.pixels, labels)):
        assert replace(dataset, **{part: changed}).fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_training_images_are_counted_without_reading_them(dataset):
    part = section(dataset=dataset)
    assert data.count_training_images(part) == len(data.load(part, 0).train)


@pytest.fixture(params=["cifar10", "cifar100"])
def fake_cifar(request, tmp_path, monkeypatch):
    """A data set of a few images in torchvision's on-disk format: its section, pixels (N, H, W, C) and labels."""
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[request.param]
    label_key = {"cifar10": "labels", "cifar100": "fine_labels"}[request.param]
    folder = tmp_path / cls.base_folder
    folder.mkdir()

    def write(name: str, content: dict) -> list[str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    labels = [3, 1, 0, 2, 1, 0, 3, 2]
    rows = pixels.transpose(0, 3, 1, 2).reshape(8, -1)
    train = [write(f"part{i}", {"data": rows[i : i + 3], label_key: labels[i : i + 3]}) for i in (0, 3)]
    test = [write("test", {"data": rows[6:], label_key: labels[6:]})]
    name, md5 = write("names", {cls.meta["key"]: ["a", "b", "c", "d"]})
    monkeypatch.setattr(cls, "train_list", train)
    monkeypatch.setattr(cls, "test_list", test)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "filename": name, "md5": md5})
    return recipes.Data(dataset=request.param, root=str(tmp_path)), pixels, labels


def test_cifar_is_read_from_its_files(fake_cifar):
    part, pixels, labels = fake_cifar
    dataset = data.load(part, seed=0)
    both = torch.cat([dataset.train.pixels, dataset.test.pixels])
    assert (len(dataset.train), len(dataset.test)) == (6, 2)
    assert np.array_equal(both.permute(0, 2, 3, 1).numpy(), pixels)
    assert torch.cat([dataset.train.labels, dataset.test.labels]).tolist() == labels
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), RuntimeError("File not found or corrupted."), TimeoutError()], ids=repr
)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_that_is_not_there_and_cannot_be_downloaded_is_refused(tmp_path, monkeypatch, dataset, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    with pytest.raises(UserError) as caught:
        data.load(recipes.Data(dataset=dataset, root=str(tmp_path)), seed=0)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("data.root: ")
    assert str(tmp_path) in line
    assert str(error) in line


def test_the_order_is_a_permutation_that_seed_and_epoch_decide():
    first = batches(seed=1).order(0)
    assert sorted(first.tolist()) == list(range(100))
    assert torch.equal(batches(seed=1).order(0), first)
    others = [batches(seed=1).order(1), batches(seed=2).order(0), torch.arange(100)]
    for other in others:
        assert (other == first).float().mean() < 0.2


def test_an_epoch_can_be_asked_for_out_of_turn():
    in_turn, at_once = batches(), batches()
    for epoch in range(5):
        in_turn.order(epoch)
    assert torch.equal(in_turn.order(4), at_once.order(4))
    assert torch.equal(in_turn.order(0), at_once.order(0))


def test_every_sample_at_most_once_an_epoch_and_the_last_incomplete_batch_dropped():
    whole = batches(batch_size=16)
    assert whole.steps_per_epoch == 6
    for epoch in (0, 1):
        seen = torch.cat([whole.indices(epoch * 6 + step) for step in range(6)])
        assert seen.tolist() == whole.order(epoch)[:96].tolist()
        assert len(set(seen.tolist())) == 96


@pytest.mark.parametrize(("world_size", "accumulation_steps"), list(product((1, 2, 3, 4), (1, 2))))
def test_ranks_and_micro_steps_share_the_same_global_batch(world_size, accumulation_steps):
    whole = batches(augment="crop_flip")
    ranks = [batches(0, rank, world_size, accumulation_steps, augment="crop_flip") for rank in range(world_size)]
    for step in (0, 1, 2, 7):
        inputs, labels = whole(step)
        expected = {int(i): (x, int(y)) for i, x, y in zip(whole.indices(step), inputs, labels, strict=True)}
        shared = []
        for micro_step, rank in product(range(accumulation_steps), ranks):
            samples = rank.indices(step, micro_step)
            assert len(samples) == 48 // (world_size * accumulation_steps)
            shared += samples.tolist()
            for i, x, y in zip(samples, *rank(step, micro_step), strict=True):
                assert torch.equal(x, expected[int(i)][0])
                assert int(y) == expected[int(i)][1]
        assert shared == whole.indices(step).tolist()


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation_steps", "said"),
    [(30, 4, 1, "28 or 32"), (30, 2, 2, "28 or 32"), (3, 4, 1, "4"), (101, 1, 1, "100 training images")],
)
def test_a_batch_that_cannot_be_shared_or_filled_is_refused(batch_size, world_size, accumulation_steps, said):
    with pytest.raises(UserError) as caught:
        batches(0, 0, world_size, accumulation_steps, batch_size=batch_size)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"data.batch_size: is {batch_size}, ")
    assert said in line


def test_the_whole_set_may_be_one_batch():
    assert batches(batch_size=100).steps_per_epoch == 1


def augmented_by_hand(image: np.ndarray, padding: int, row: int, column: int, flip: int) -> np.ndarray:
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    crop = padded[:, row : row + height, column : column + width]
    return crop[:, :, ::-1] if flip else crop


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
@pytest.mark.parametrize("padding", [None, 0, 3])
def test_augmentation_is_pad_crop_flip_of_each_image_by_itself(augment, padding):
    some = batches(augment=augment, padding=padding)
    width = {None: 1, 0: 0, 3: 3}[padding]
    for step in (0, some.steps_per_epoch):
        samples = some.indices(step)
        shifts = some.shifts(step // some.steps_per_epoch)[samples].tolist()
        pixels = some.images.pixels[samples].numpy()
        by_hand = [augmented_by_hand(image, width, *shift) for image, shift in zip(pixels, shifts, strict=True)]
        inputs, labels = some(step)
        assert torch.equal(inputs, some.normalized(torch.from_numpy(np.stack(by_hand))))
        assert torch.equal(labels, some.images.labels[samples])
        assert len({tuple(shift) for shift in shifts}) > 1 or (padding == 0 and augment == "crop")


@pytest.mark.parametrize(("height", "width"), [(8, 8), (11, 11), (32, 32), (9, 14)])
@pytest.mark.parametrize(("augment", "padding"), [("none", 0), ("crop", 4), ("crop_flip", 0), ("crop_flip", 5)])
def test_inputs_are_bit_for_bit_what_the_arithmetic_says_on_each_rank_and_micro_step(height, width, augment, padding):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, height, width), dtype=torch.uint8, generator=generator)
    before = pixels.clone()
    mean, std = (moment[:, None, None] for moment in moments(pixels))
    part = section(augment=augment, padding=padding)
    for rank, micro_step in product(range(2), range(3)):
        some = data.Batches(data.Images(pixels, torch.arange(50)), part, 5, rank, 2, 3)
        for step in (0, 1, 7):
            samples = some.indices(step, micro_step)
            shifts = some.shifts(step)[samples].tolist()
            images = pixels[samples].numpy()
            by_hand = [
                augmented_by_hand(image, some.padding, *shift) for image, shift in zip(images, shifts, strict=True)
            ]
            inputs, labels = some(step, micro_step)
            assert torch.equal(inputs, (torch.from_numpy(np.stack(by_hand)).float() - mean) / std)
            assert inputs.is_contiguous()
            assert labels.tolist() == samples.tolist()
    assert torch.equal(pixels, before)


def moments(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = pixels.transpose(0, 1).flatten(1).double()
    return values.mean(1).float(), values.std(1, correction=0).float()


def test_an_epoch_is_drawn_once_and_remembered_while_the_next_begins(monkeypatch):
    drawn, words = [], data.philox.words

    def noted(seed, domain, position, *blocks):
        drawn.append((domain.name, position[0]))
        return words(seed, domain, position, *blocks)

    monkeypatch.setattr(data.philox, "words", noted)
    some = batches(augment="crop_flip", batch_size=16)  # 6 steps an epoch
    drawn.clear()
    for step in (0, 1, 5, 6, 5, 7):
        some(step)
        some.indices(step)
    assert drawn == [("ORDER", 0), ("AUGMENT", 0), ("ORDER", 1), ("AUGMENT", 1)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gets_the_inputs_of_the_cpu_and_the_host_waits_once_an_epoch():
    part = section(augment="crop_flip", padding=3)
    images = data.load(part, 0).train
    on_cpu, on_device = (data.Batches(images.to(torch.device(name)), part, seed=0) for name in ("cpu", "cuda"))
    on_device(0)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs, labels = on_device(1)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert inputs.device.type == "cuda"
    assert torch.equal(inputs.cpu(), on_cpu(1)[0])
    assert torch.equal(labels.cpu(), on_cpu(1)[1])


def test_without_augmentation_the_images_are_left_alone():
    plain = batches(augment="none", padding=3)
    assert torch.equal(plain(0)[0], plain.normalized(plain.images.pixels[plain.indices(0)]))


@pytest.mark.parametrize(("augment", "flips"), [("crop", 1), ("crop_flip", 2)])
def test_crops_and_flips_are_spread_evenly(augment, flips):
    count, padding = 16_200, 4
    part = section(num_samples=count, augment=augment, padding=padding)
    images = data.Images(torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    shifts = data.Batches(images, part, seed=3).shifts(0)
    cells = (2 * padding + 1) ** 2 * flips
    seen = Counter(map(tuple, shifts.tolist()))
    assert set(seen) == set(product(range(9), range(9), range(flips)))
    chi_square = sum((n - count / cells) ** 2 / (count / cells) for n in seen.values())
    freedom = cells - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_augmentation_of_a_sample_is_a_function_of_seed_epoch_and_sample():
    first = batches(augment="crop_flip", padding=4).shifts(0)
    assert torch.equal(batches(augment="crop_flip", padding=4, num_samples=60).shifts(0), first[:60])
    other_epoch = batches(augment="crop_flip", padding=4).shifts(1)
    other_seed = batches(seed=1, augment="crop_flip", padding=4).shifts(0)
    for other in (other_epoch, other_seed):
        assert (other == first).all(1).float().mean() < 0.1


def test_normalized_images_have_mean_0_and_variance_1_in_each_channel():
    pixels = data.load(section(), 0).train.pixels.clone()
    pixels[:, 1] //= 3
    pixels[:, 2] = pixels[:, 2] // 8 + 200
    some = data.Batches(data.Images(pixels, torch.zeros(100, dtype=torch.int64)), section(), seed=0)
    inputs = some.normalized(pixels)
    assert inputs.dtype == torch.float32
    assert torch.allclose(inputs.double().mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(inputs.double().var((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-4)


def test_a_channel_of_one_value_normalizes_to_finite_numbers():
    images = data.Images(torch.full((48, 3, SIZE, SIZE), 77, dtype=torch.uint8), torch.zeros(48, dtype=torch.int64))
    inputs, _ = data.Batches(images, section(), seed=0)(0)
    assert torch.isfinite(inputs).all()
