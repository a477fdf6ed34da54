"""Fingerprints of the replicas: no single bit goes unnoticed, and who differs in what is named."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lrd
from lrd import kernels
from lrd.errors import RunError
from lrd.replicas import compare_replicas, fingerprint

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
VIEWS = {
    "whole": lambda flat: flat[:12],
    "of odd length": lambda flat: flat[:11],
    "of one element": lambda flat: flat[:1],
    "at an odd offset": lambda flat: flat[1:12],
    "at an even offset": lambda flat: flat[2:13],
    "no dimension": lambda flat: flat[3],
    "every other": lambda flat: flat[1:14:2],
    "columns": lambda flat: flat[:12].view(3, 4)[:, 1:3],
    "transposed": lambda flat: flat[:12].view(3, 4).t(),
    "channels_last": lambda flat: flat[:12].as_strided((1, 3, 2, 2), (12, 1, 6, 3)),
    "channels_last at an odd offset": lambda flat: flat[:13].as_strided((1, 3, 2, 2), (12, 1, 6, 3), 1),
}


def places(tensor: torch.Tensor) -> list[int]:
    """The bytes of the storage that are a tensor's, one element after the other."""
    size = tensor.element_size()
    starts = [
        size * (tensor.storage_offset() + sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True)))
        for index in itertools.product(*map(range, tensor.shape))
    ]
    return [start + byte for start in starts for byte in range(size)]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_single_bit_changes_the_digest(dtype, view):
    torch.manual_seed(0)
    is_bool = dtype is torch.bool
    raw = torch.randint(0, 2 if is_bool else 256, (16 * torch.empty(0, dtype=dtype).element_size(),)).to(torch.uint8)
    tensor = VIEWS[view](raw.view(dtype))
    before = kernels.digest(tensor)
    assert (before.dtype, before.shape) == (torch.int64, ())
    own = places(tensor)
    assert len(own) == tensor.numel() * tensor.element_size()
    missed = []
    for place, bit in itertools.product(own, range(1 if is_bool else 8)):
        raw[place] ^= 1 << bit
        if kernels.digest(tensor) == before:
            missed.append((place, bit))
        raw[place] ^= 1 << bit
    assert missed == []
    for place in set(range(len(raw))) - set(own):
        raw[place] ^= 1
    assert kernels.digest(tensor) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3, 2, 2)])
def test_an_empty_tensor_has_a_digest(dtype, shape):
    assert kernels.digest(torch.empty(shape, dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_depends_on_the_tensor_alone(dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(4, 3, 5, 5) * 50).to(dtype)
    assert kernels.digest(tensor) == kernels.digest(tensor.clone())
    last = tensor.contiguous(memory_format=torch.channels_last)
    assert kernels.digest(last) == kernels.digest(last.clone())


def test_zeros_of_either_sign_and_nans_of_any_kind_are_told_apart():
    zeros, nan = torch.zeros(3), torch.tensor([0x7FC00000], dtype=torch.int32)
    assert kernels.digest(zeros) != kernels.digest(torch.tensor([0.0, -0.0, 0.0]))
    assert kernels.digest(nan.view(torch.float32)) != kernels.digest((nan + 1).view(torch.float32))


def make_replica() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network that took a step with momentum and LRDropout, in two groups."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 2))
    groups = [{"params": list(network[:2].parameters())}, {"params": list(network[3].parameters()), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=3)
    network(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    return network, optimizer


def test_a_fingerprint_has_settings_and_tensors_by_name():
    network, optimizer = make_replica()
    own = fingerprint(network, optimizer)
    assert (own["lr of group 0"], own["lr of group 1"]) == ("0.1", "0.5")
    assert own["mask_seed of group 0"] == own["mask_seed of group 1"] == "3"
    assert not [name for name in own if name.startswith("params ")]
    for name, _ in network.named_parameters():
        assert isinstance(own[name], int)
        assert isinstance(own[f"{name} (momentum_buffer)"], int)
    assert own == fingerprint(*make_replica())


def change_of(kind: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if kind == "0.weight":
        with torch.no_grad():
            network[0].weight[2, 1, 0, 1] *= 1 + 2**-20
    elif kind == "3.bias (momentum_buffer)":
        optimizer.state[network[3].bias]["momentum_buffer"][1] += 1
    elif kind == "lr of group 1":
        optimizer.param_groups[1]["lr"] = torch.tensor(0.25)
    elif kind == "mask_seed of group 0":
        optimizer.param_groups[0]["mask_seed"] = 4


@pytest.mark.parametrize("kind", ["0.weight", "3.bias (momentum_buffer)", "lr of group 1", "mask_seed of group 0"])
def test_a_fingerprint_shows_what_changed_and_nothing_else(kind):
    before = fingerprint(*make_replica())
    network, optimizer = make_replica()
    change_of(kind, network, optimizer)
    after = fingerprint(network, optimizer)
    assert [name for name in before if after[name] != before[name]] == [kind]


def test_a_setting_is_the_same_as_number_and_as_tensor():
    network, optimizer = make_replica()
    before = fingerprint(network, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    assert fingerprint(network, optimizer) == before


def test_running_statistics_are_no_part_of_a_fingerprint():
    network, optimizer = make_replica()
    network[1].running_mean += 1
    assert fingerprint(network, optimizer) == fingerprint(*make_replica())


@pytest.fixture
def compare_ranks(monkeypatch):
    """Compares a replica with others, of which each is a change to its fingerprint; returns what is said."""

    def compare(*changes: dict[str, object]) -> str:
        network, optimizer = make_replica()

        def gather(own: tuple[str, dict]) -> list[tuple[str, dict]]:
            assert own[1] == fingerprint(network, optimizer)
            return [(f"rank {rank} on host", {**own[1], **change}) for rank, change in enumerate(changes)]

        group = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: len(changes))
        monkeypatch.setattr("lrd.replicas.dist", group)
        monkeypatch.setattr("lrd.replicas.gather", gather)
        try:
            compare_replicas(network, optimizer, 7)
        except RunError as error:
            return str(error)
        return ""

    return compare


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_replicas_that_are_equal_pass(compare_ranks, ranks):
    assert compare_ranks(*[{}] * ranks) == ""


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_of_three_ranks_the_odd_one_is_named(compare_ranks, odd):
    changes = [{}, {}, {}]
    changes[odd] = {"3.weight": 1}
    assert compare_ranks(*changes) == (
        f"step 7: the replicas differ, first in 3.weight: rank {odd} on host differs from the other ranks; "
        "no checkpoint is written after it"
    )


def test_two_of_five_ranks_are_named_whatever_they_hold(compare_ranks):
    message = compare_ranks({}, {"3.weight": 1}, {}, {"3.weight": 2}, {})
    assert "first in 3.weight: rank 1 on host, rank 3 on host differ from the other ranks" in message


@pytest.mark.parametrize("held", [[1, 2, 2, 3], [1, 2, 2, 3, 4]])
def test_rank_0_may_be_in_the_minority(compare_ranks, held):
    message = compare_ranks(*[{"3.weight": value} for value in held])
    odd = ", ".join(f"rank {rank} on host" for rank, value in enumerate(held) if value != 2)
    assert f"first in 3.weight: {odd} differ from the other ranks" in message


def test_of_two_ranks_it_cannot_be_told_which_is_right(compare_ranks):
    message = compare_ranks({}, {"0.bias": 1})
    assert "first in 0.bias: rank 0 on host against rank 1 on host, which is right cannot be told" in message


def test_a_setting_is_named_before_the_tensors_that_it_made_differ(compare_ranks):
    message = compare_ranks({}, {"0.weight": 1, "mask_seed of group 0": "9"})
    assert "first in mask_seed of group 0: rank 0 on host against rank 1 on host, " in message


def test_what_one_rank_alone_has_is_named(compare_ranks):
    message = compare_ranks({}, {"0.weight (new)": 1}, {})
    assert "first in 0.weight (new): rank 1 on host differs from the other ranks" in message
