"""The moving average of the weights: its formula, BatchNorm's statistics, and a resume."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lrd.job.ema import WeightAverage

DECAY = 0.75  # exact in binary, and so is 1 - DECAY
NUM_UPDATES = 5


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def change(network: nn.Module, step: int) -> None:
    """Give all weights new values, and BatchNorm new statistics."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network(torch.randn(8, 3, 4, 4, generator=generator))


def weighted_sum(states: list[dict[str, Tensor]], name: str) -> Tensor:
    """The average in its closed form, float64: the first state, then each later one decayed."""
    weights = [DECAY ** (len(states) - 1)]
    for age in range(len(states) - 2, -1, -1):
        weights.append((1 - DECAY) * DECAY**age)
    assert sum(weights) == pytest.approx(1.0)

    terms = [weight * state[name].double() for weight, state in zip(weights, states, strict=True)]
    return torch.stack(terms).sum(0)


def test_the_average_is_the_weighted_sum_of_the_weights_after_each_step() -> None:
    network = make_network()
    average = WeightAverage(network, DECAY)
    states = []
    for step in range(NUM_UPDATES):
        change(network, step)
        average.update(network)
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})

    averaged = average.state_dict()
    assert averaged.keys() == states[0].keys()
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), weighted_sum(states, name))


def test_the_network_itself_is_not_changed() -> None:
    network = make_network()
    average = WeightAverage(network, DECAY)
    change(network, 1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    average.update(network)
    change(average.network, 2)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


@pytest.mark.parametrize("num_updates", [0, 1, 3])
def test_an_average_that_was_saved_goes_on_as_if_nothing_had_happened(num_updates: int) -> None:
    network = make_network()
    whole = WeightAverage(network, DECAY)
    for step in range(num_updates):
        change(network, step)
        whole.update(network)

    resumed = WeightAverage(make_network(), DECAY)
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    resumed.load_state_dict(saved, num_updates)
    for step in range(num_updates, NUM_UPDATES):
        change(network, step)
        whole.update(network)
        resumed.update(network)

    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_it_can_begin_anew_at_the_weights_of_a_network() -> None:
    network = make_network()
    average = WeightAverage(network, DECAY)
    average.update(network)
    change(network, 1)
    average.begin_at(network)
    change(network, 2)
    average.update(network)  # the first update after the beginning copies
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, average.state_dict()[name]), name
