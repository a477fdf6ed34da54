"""Batches are a function of (seed, position), whatever the number of ranks."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from lrd import philox
from lrd.data import datasets
from lrd.data.batches import Batches
from lrd.data.datasets import Images
from lrd.errors import UserError
from tests.helpers.synthetic_data import SIZE, data_section


def make_batches(
    seed: int = 0, rank: int = 0, world_size: int = 1, accumulation_steps: int = 1, **values
) -> Batches:
    section = data_section(**values)
    images = datasets.load_dataset(section, seed=0).train
    return Batches(images, section, seed, rank, world_size, accumulation_steps)


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch():
    order = make_batches(seed=1).order(0)

    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(make_batches(seed=1).order(0), order)

    other_epoch = make_batches(seed=1).order(1)
    other_seed = make_batches(seed=2).order(0)
    for other in (other_epoch, other_seed, torch.arange(100)):
        assert (other == order).float().mean() < 0.2


def test_the_order_of_an_epoch_does_not_depend_on_what_was_asked_before():
    in_turn = make_batches()
    for epoch in range(5):
        in_turn.order(epoch)

    at_once = make_batches()
    assert torch.equal(in_turn.order(4), at_once.order(4))
    assert torch.equal(in_turn.order(0), at_once.order(0))


def test_an_epoch_has_each_sample_at_most_once_and_drops_the_last_incomplete_batch():
    batches = make_batches(batch_size=16)
    assert batches.steps_per_epoch == 6

    for epoch in (0, 1):
        seen = torch.cat([batches.indices(epoch * 6 + step) for step in range(6)])
        assert seen.tolist() == batches.order(epoch)[:96].tolist()
        assert len(set(seen.tolist())) == 96


@pytest.mark.parametrize(("world_size", "accumulation_steps"), list(product((1, 2, 3, 4), (1, 2))))
def test_ranks_and_micro_steps_share_the_same_global_batch(world_size, accumulation_steps):
    on_one_rank = make_batches(augment="crop_flip")
    on_ranks = [
        make_batches(0, rank, world_size, accumulation_steps, augment="crop_flip")
        for rank in range(world_size)
    ]

    for step in (0, 1, 2, 7):
        global_indices = on_one_rank.indices(step).tolist()
        inputs, labels = on_one_rank.micro_batch(step)
        input_of_sample = dict(zip(global_indices, inputs, strict=True))
        label_of_sample = dict(zip(global_indices, labels.tolist(), strict=True))

        shared_indices = []
        for micro_step, batches in product(range(accumulation_steps), on_ranks):
            indices = batches.indices(step, micro_step).tolist()
            assert len(indices) == 48 // (world_size * accumulation_steps)
            shared_indices += indices

            inputs, labels = batches.micro_batch(step, micro_step)
            for sample, sample_input, label in zip(indices, inputs, labels, strict=True):
                assert torch.equal(sample_input, input_of_sample[sample])
                assert int(label) == label_of_sample[sample]

        assert shared_indices == global_indices


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation_steps", "expected"),
    [
        (30, 4, 1, "28 or 32"),
        (30, 2, 2, "28 or 32"),
        (3, 4, 1, "4"),
        (101, 1, 1, "100 training images"),
    ],
)
def test_a_batch_that_cannot_be_split_or_filled_is_refused(
    batch_size, world_size, accumulation_steps, expected
):
    with pytest.raises(UserError) as caught:
        make_batches(0, 0, world_size, accumulation_steps, batch_size=batch_size)

    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"data.batch_size: is {batch_size}, ")
    assert expected in line


def test_the_whole_training_set_can_be_a_batch():
    assert make_batches(batch_size=100).steps_per_epoch == 1


def augment_by_hand(
    image: np.ndarray,  # uint8 (3, H, W)
    padding: int,
    row: int,
    column: int,
    flip: int,
) -> np.ndarray:
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    crop = padded[:, row : row + height, column : column + width]
    return crop[:, :, ::-1] if flip else crop


def augment_all_by_hand(
    pixels: torch.Tensor,  # uint8 (B, 3, H, W)
    padding: int,
    shifts: torch.Tensor,  # int64 (B, 3)
) -> torch.Tensor:
    images = [
        augment_by_hand(image, padding, row, column, flip)
        for image, (row, column, flip) in zip(pixels.numpy(), shifts.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(images))


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
@pytest.mark.parametrize(("padding", "width"), [(None, 1), (0, 0), (3, 3)])
def test_each_image_is_padded_cropped_and_flipped_by_itself(augment, padding, width):
    batches = make_batches(augment=augment, padding=padding)

    for epoch in (0, 1):
        step = epoch * batches.steps_per_epoch
        samples = batches.indices(step)
        shifts = batches.shifts(epoch)[samples]
        pixels = batches.images.pixels[samples]
        expected = batches.normalize(augment_all_by_hand(pixels, width, shifts))

        inputs, labels = batches.micro_batch(step)
        assert torch.equal(inputs, expected)
        assert torch.equal(labels, batches.images.labels[samples])

        is_always_the_same = padding == 0 and augment == "crop"
        assert is_always_the_same or len(shifts.unique(dim=0)) > 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (11, 11), (32, 32), (9, 14)])
@pytest.mark.parametrize(
    ("augment", "padding"), [("none", 0), ("crop", 4), ("crop_flip", 0), ("crop_flip", 5)]
)
def test_inputs_are_bit_for_bit_the_arithmetic_on_each_rank_and_micro_step(
    height, width, augment, padding
):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, height, width), dtype=torch.uint8, generator=generator)
    original_pixels = pixels.clone()
    mean, std = channel_moments(pixels)
    section = data_section(augment=augment, padding=padding)

    for rank, micro_step in product(range(2), range(3)):
        batches = Batches(
            Images(pixels, labels=torch.arange(50)),
            section,
            seed=5,
            rank=rank,
            world_size=2,
            accumulation_steps=3,
        )
        for step in (0, 1, 7):  # one step an epoch
            samples = batches.indices(step, micro_step)
            shifts = batches.shifts(step)[samples]
            augmented = augment_all_by_hand(pixels[samples], batches.padding, shifts)

            inputs, labels = batches.micro_batch(step, micro_step)
            assert torch.equal(inputs, (augmented.float() - mean) / std)
            assert inputs.is_contiguous()
            assert labels.tolist() == samples.tolist()

    assert torch.equal(pixels, original_pixels)


def channel_moments(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, float32 (3, 1, 1)."""
    values = pixels.transpose(0, 1).flatten(1).double()
    mean = values.mean(1).float()
    std = values.std(1, correction=0).float()
    return mean[:, None, None], std[:, None, None]


def test_an_epoch_is_drawn_once_and_kept_while_the_next_begins(monkeypatch):
    drawn = []
    words = philox.words

    def record_and_draw(seed, domain, position, **blocks):
        epoch = position[0]
        drawn.append((domain.name, epoch))
        return words(seed, domain, position, **blocks)

    batches = make_batches(augment="crop_flip", batch_size=16)
    assert batches.steps_per_epoch == 6

    monkeypatch.setattr(philox, "words", record_and_draw)
    for step in (0, 1, 5, 6, 5, 7):
        batches.micro_batch(step)
        batches.indices(step)
    assert drawn == [("ORDER", 0), ("AUGMENT", 0), ("ORDER", 1), ("AUGMENT", 1)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gets_the_inputs_of_the_cpu_and_the_host_waits_once_an_epoch():
    section = data_section(augment="crop_flip", padding=3)
    images = datasets.load_dataset(section, seed=0).train
    on_cpu = Batches(images, section, seed=0)
    on_device = Batches(images.to(torch.device("cuda")), section, seed=0)

    on_device(0)  # the host waits here
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs, labels = on_device(1)
    finally:
        torch.cuda.set_sync_debug_mode(mode)

    expected_inputs, expected_labels = on_cpu(1)
    assert inputs.device.type == "cuda"
    assert torch.equal(inputs.cpu(), expected_inputs)
    assert torch.equal(labels.cpu(), expected_labels)


def test_without_augmentation_the_images_are_not_changed():
    batches = make_batches(augment="none", padding=3)
    inputs, _ = batches.micro_batch(0)
    pixels = batches.images.pixels[batches.indices(0)]
    assert torch.equal(inputs, batches.normalize(pixels))


@pytest.mark.parametrize(("augment", "num_flips"), [("crop", 1), ("crop_flip", 2)])
def test_crops_and_flips_are_spread_evenly(augment, num_flips):
    count = 16_200
    section = data_section(num_samples=count, augment=augment, padding=4)
    images = Images(
        pixels=torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64),
    )
    shifts = Batches(images, section, seed=3).shifts(0)

    num_seen = Counter(tuple(shift) for shift in shifts.tolist())
    assert set(num_seen) == set(product(range(9), range(9), range(num_flips)))

    num_cells = 9 * 9 * num_flips
    expected = count / num_cells
    chi_square = sum((number - expected) ** 2 / expected for number in num_seen.values())
    degrees_of_freedom = num_cells - 1
    assert abs(chi_square - degrees_of_freedom) < 4 * (2 * degrees_of_freedom) ** 0.5


def test_the_augmentation_is_a_function_of_seed_epoch_and_sample():
    shifts = make_batches(augment="crop_flip", padding=4).shifts(0)

    fewer_samples = make_batches(augment="crop_flip", padding=4, num_samples=60).shifts(0)
    assert torch.equal(fewer_samples, shifts[:60])

    other_epoch = make_batches(augment="crop_flip", padding=4).shifts(1)
    other_seed = make_batches(seed=1, augment="crop_flip", padding=4).shifts(0)
    for other in (other_epoch, other_seed):
        assert (other == shifts).all(1).float().mean() < 0.1


def test_normalized_images_have_mean_0_and_variance_1_in_each_channel():
    pixels = datasets.load_dataset(data_section(), seed=0).train.pixels.clone()
    pixels[:, 1] //= 3
    pixels[:, 2] = pixels[:, 2] // 8 + 200
    images = Images(pixels, labels=torch.zeros(100, dtype=torch.int64))
    inputs = Batches(images, data_section(), seed=0).normalize(pixels)

    assert inputs.dtype == torch.float32
    mean = inputs.double().mean((0, 2, 3))
    variance = inputs.double().var((0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(variance, torch.ones(3, dtype=torch.float64), atol=1e-4)


def test_a_channel_with_a_single_value_normalizes_to_finite_numbers():
    images = Images(
        pixels=torch.full((48, 3, SIZE, SIZE), 77, dtype=torch.uint8),
        labels=torch.zeros(48, dtype=torch.int64),
    )
    inputs, _ = Batches(images, data_section(), seed=0).micro_batch(0)
    assert torch.isfinite(inputs).all()
