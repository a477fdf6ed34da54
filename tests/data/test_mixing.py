"""Mixup and CutMix are torchvision's on the global batch, whatever the number of ranks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from lrd import recipe as recipes
from lrd.data import datasets, positions
from lrd.data.batches import Batches
from lrd.data.mixing import Mixing, build_mixing
from lrd.errors import UserError
from tests.helpers.synthetic_data import data_section

CLASSES = 5
SEED = 3
TRANSFORMS = {
    "mixup": v2.MixUp(alpha=0.4, num_classes=CLASSES),
    "cutmix": v2.CutMix(alpha=1.5, num_classes=CLASSES),
}
SETTINGS = {
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.5},
    "both": {"mixup": 0.4, "cutmix": 1.5},
}


def make_mixing(seed: int = SEED, **values: float) -> Mixing:
    mixing = build_mixing(data_section(**values), CLASSES, seed)
    assert mixing is not None
    return mixing


def make_batch(size: int = 12, height: int = 9, width: int = 7) -> tuple[Tensor, Tensor]:
    """Normalized images, float32 (N, 3, H, W), and labels, int64 (N,)."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, 3, height, width, generator=generator)
    return inputs, torch.randint(CLASSES, (size,), generator=generator)


def mix_ring(mixing: Mixing, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Mix a whole global batch: its last sample is the one before its first."""
    return mixing.mix(torch.cat([inputs[-1:], inputs]), torch.cat([labels[-1:], labels]), step)


def mix_by_torchvision(
    kind: str, inputs: Tensor, labels: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """torchvision's transform of a whole global batch, after the seed of a step."""
    with torch.random.fork_rng():
        torch.manual_seed(positions.step_generator_seed(SEED, step))
        if kind == "both":
            transform = v2.RandomChoice(list(TRANSFORMS.values()))
        else:
            transform = TRANSFORMS[kind]
        mixed_inputs, mixed_labels = transform(inputs, labels)
    return mixed_inputs, mixed_labels


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_on_the_same_draws_it_is_torchvisions_transform(kind):
    mixing = make_mixing(**SETTINGS[kind])
    inputs, labels = make_batch()

    for step in range(20):
        mixed_inputs, mixed_labels = mix_ring(mixing, inputs, labels, step)
        expected_inputs, expected_labels = mix_by_torchvision(kind, inputs, labels, step)

        assert mixed_inputs.dtype == mixed_labels.dtype == torch.float32
        assert mixed_labels.shape == (12, CLASSES)
        assert torch.equal(mixed_inputs, expected_inputs)
        assert torch.equal(mixed_labels, expected_labels)


def test_the_given_batch_stays_as_it_was():
    inputs, labels = make_batch()
    saved = inputs.clone()
    for step in range(4):
        make_mixing(mixup=1.0, cutmix=1.0).mix(inputs, labels, step)
    assert torch.equal(inputs, saved)


def test_mixup_takes_the_same_part_of_images_and_labels():
    inputs, _ = make_batch(size=5)
    labels = torch.arange(5)

    mixed_inputs, mixed_labels = mix_ring(make_mixing(mixup=1.0), inputs, labels, step=0)

    part = float(mixed_labels[0, 0])  # of each sample itself
    assert 0.01 < part < 0.99
    for i in range(5):
        expected = part * inputs[i] + (1.0 - part) * inputs[i - 1]
        torch.testing.assert_close(mixed_inputs[i], expected)
        torch.testing.assert_close(mixed_labels[i, i - 1], torch.tensor(1.0 - part))


def test_cutmix_labels_are_the_parts_of_the_area():
    inputs, _ = make_batch(size=5, height=32, width=24)
    labels = torch.arange(5)
    mixing = make_mixing(cutmix=1.0)

    areas = []
    for step in range(20):
        mixed_inputs, mixed_labels = mix_ring(mixing, inputs, labels, step)
        for i in range(5):
            is_own = (mixed_inputs[i] == inputs[i]).all(0)  # bool (H, W)
            is_before = (mixed_inputs[i] == inputs[i - 1]).all(0)  # bool (H, W)
            assert torch.equal(is_own, ~is_before)

            torch.testing.assert_close(mixed_labels[i, i], is_own.float().mean())
            torch.testing.assert_close(mixed_labels[i, i - 1], is_before.float().mean())
        areas.append(float(mixed_labels[0, 0]))
    assert len(set(areas)) > 10


@pytest.mark.parametrize("kind", list(SETTINGS))
@pytest.mark.parametrize(("world_size", "accumulation_steps"), list(product((1, 2, 4), (1, 2))))
def test_ranks_and_micro_steps_have_the_slices_of_the_whole_batch(
    kind, world_size, accumulation_steps
):
    section = data_section(augment="crop_flip", **SETTINGS[kind])
    images = datasets.load_dataset(data_section(), seed=0).train
    num_classes = int(images.labels.max()) + 1
    whole = Batches(images, data_section(augment="crop_flip"), SEED)
    on_ranks = [
        Batches(
            images,
            section,
            SEED,
            rank,
            world_size,
            accumulation_steps,
            mixing=build_mixing(section, num_classes, SEED),
        )
        for rank in range(world_size)
    ]
    ring = Mixing(section, num_classes, SEED)

    for step in (0, 1, 2, 7):
        expected_inputs, expected_labels = mix_ring(ring, *whole.micro_batch(step), step)
        parts = [
            batches.micro_batch(step, micro_step)
            for micro_step, batches in product(range(accumulation_steps), on_ranks)
        ]
        inputs, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))

        assert torch.equal(inputs, expected_inputs)
        assert torch.equal(labels, expected_labels)


def test_a_part_of_a_single_sample_is_mixed_with_the_one_before_it():
    inputs, labels = make_batch()
    mixing = make_mixing(mixup=1.0)
    whole_inputs, whole_labels = mix_ring(mixing, inputs, labels, step=5)

    mixed_inputs, mixed_labels = mixing.mix(inputs[6:8], labels[6:8], step=5)
    assert torch.equal(mixed_inputs, whole_inputs[7:8])
    assert torch.equal(mixed_labels, whole_labels[7:8])


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_the_draws_are_a_function_of_seed_and_step_alone(kind):
    # Two rectangles in a small image may be the same.
    inputs, labels = make_batch(height=64, width=64)
    mixing = make_mixing(**SETTINGS[kind])
    mixed = [mix_ring(mixing, inputs, labels, step)[0] for step in range(10)]

    torch.rand(7)  # moves the global generator
    again = mix_ring(make_mixing(**SETTINGS[kind]), inputs, labels, 4)[0]
    assert torch.equal(again, mixed[4])

    for step in (*range(4), *range(5, 10)):
        assert not torch.equal(mixed[step], mixed[4])
    other_seed = mix_ring(make_mixing(seed=SEED + 1, **SETTINGS[kind]), inputs, labels, 4)[0]
    assert not torch.equal(other_seed, mixed[4])


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_the_global_generator_is_left_as_it_was(kind):
    state = torch.get_rng_state()
    mix_ring(make_mixing(**SETTINGS[kind]), *make_batch(), step=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_the_probabilities_of_a_sample_sum_to_one(kind):
    inputs, labels = make_batch()
    mixing = make_mixing(**SETTINGS[kind])
    for step in range(50):
        _, mixed_labels = mix_ring(mixing, inputs, labels, step)
        assert (mixed_labels >= 0.0).all()
        torch.testing.assert_close(mixed_labels.sum(1), torch.ones(12))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_parts_over_many_steps_have_the_beta_distribution(alpha):
    mixing = make_mixing(mixup=alpha)
    inputs = torch.zeros(2, 3, 1, 1)
    labels = torch.tensor([0, 1])
    parts = torch.stack([mixing.mix(inputs, labels, step)[1][0, 1] for step in range(1000)])

    variance = 1.0 / (4.0 * (2.0 * alpha + 1.0))  # of Beta(alpha, alpha), whose mean is 1/2
    assert abs(float(parts.mean()) - 0.5) < 4.0 * (variance / 1000) ** 0.5
    assert float(parts.var()) == pytest.approx(variance, rel=0.1)


def test_with_both_each_is_drawn_in_half_of_the_steps():
    mixing = make_mixing(mixup=4.0, cutmix=1.0)
    inputs = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    labels = torch.tensor([0, 1])

    num_mixup = 0
    for step in range(400):
        mixed_inputs, _ = mixing.mix(inputs, labels, step)
        num_mixup += bool(((mixed_inputs > 0.0) & (mixed_inputs < 1.0)).any())
    assert abs(num_mixup - 200) < 40  # four standard deviations


def test_without_mixup_and_cutmix_nothing_is_mixed():
    assert build_mixing(recipes.Data(), CLASSES, SEED) is None


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [1e-320, 1e-10, 1e39])
def test_a_distribution_that_torch_cannot_draw_from_is_refused(key, alpha):
    with pytest.raises(UserError) as caught:
        build_mixing(data_section(**{key: alpha}), CLASSES, SEED)
    expected = f"data.{key}: is {alpha:g}, must be 0, or from 0.001 to 1000"
    assert str(caught.value) == expected
