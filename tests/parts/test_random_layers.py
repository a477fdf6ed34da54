"""Random numbers of a network's own layers, as a function of (seed, step, micro step, rank)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lrd import philox
from lrd import recipe as recipes
from lrd.generators import seeded_generators
from lrd.parts.random_layers import (
    needs_seeds,
    read_generators,
    seed_generators,
)

CPU = torch.device("cpu")


def draw(seed: int = 0, step: int = 0, micro_step: int = 0, rank: int = 0) -> tuple:
    """What a random layer draws in a forward pass: from torch, NumPy and Python."""
    seed_generators(seed, step, micro_step, rank, CPU)
    mask = nn.functional.dropout(torch.ones(64))
    return tuple(mask.tolist()), tuple(np.random.rand(8)), random.random()


@pytest.fixture(autouse=True)
def _undisturbed():
    """The tests that follow find the generators as they were."""
    with seeded_generators(0):
        yield


def test_the_same_position_gives_the_same_numbers():
    position = {"seed": (1 << 63) - 1, "step": 1 << 40, "micro_step": 3, "rank": 2}
    first = draw(**position)
    draw(step=17)
    assert draw(**position) == first


@pytest.mark.parametrize("name", ["seed", "step", "micro_step", "rank"])
def test_another_position_gives_other_numbers(name):
    draws = [draw(**{name: value}) for value in (0, 1, 2)]
    for i in range(3):  # torch's, NumPy's and Python's
        assert len({numbers[i] for numbers in draws}) == 3


def test_the_seeds_are_philoxs_words():
    words = philox.words(7, philox.Domain.LAYERS, (5, 1, 3), 0, 1)
    seed_generators(7, 5, 1, 3, CPU)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(int(words[0])))
    assert torch.equal(torch.rand(4), expected)
    assert random.random() == random.Random(int(words[2])).random()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": {"arch": "resnet18"}}, False),
        ({"model": {"arch": "torchvision:vgg11"}}, True),
        ({"model": {"arch": "my_parts.nets:net"}}, True),
        ({"trainer": {"loss": "my_parts.losses:loss"}}, True),
    ],
)
def test_only_parts_that_are_not_lrds_need_seeds(values, expected):
    assert needs_seeds(recipes.parse(values, "test")) is expected


def test_an_error_within_the_context_leaves_the_generators_as_they_were():
    before = read_generators(CPU)
    with pytest.raises(ValueError, match="own"), seeded_generators(3):
        raise ValueError("own")
    assert read_generators(CPU) == before


@pytest.mark.parametrize(
    "draw_once", [torch.rand, np.random.rand, np.random.randn, lambda _: random.random()]
)
def test_each_draw_is_noticed(draw_once):
    before = read_generators(CPU)
    assert read_generators(CPU) == before
    draw_once(1)
    assert read_generators(CPU) != before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_generator_of_a_cuda_device_is_seeded_too():
    device = torch.device("cuda")
    draws = []
    for step in (0, 1, 0):
        seed_generators(0, step, 0, 0, device)
        draws.append(torch.rand(8, device=device).tolist())
    assert draws[0] == draws[2] != draws[1]

    before = read_generators(device)
    torch.rand(8, device=device)
    assert read_generators(device) != before
