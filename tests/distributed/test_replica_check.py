"""Fingerprints of the replicas: every single bit counts, and a report names rank and tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lrd
from lrd.distributed.replica_check import compare_replicas, fingerprint
from lrd.errors import RunError
from lrd.optim import tensor_bits

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]

# Views of a tensor with 16 elements.
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
    "channels_last at an odd offset": lambda flat: flat[:13].as_strided(
        (1, 3, 2, 2), (12, 1, 6, 3), 1
    ),
}


def bytes_of(tensor: torch.Tensor) -> list[int]:
    """Return the positions in its storage of a tensor's bytes, element by element."""
    element_size = tensor.element_size()
    positions = []
    for index in itertools.product(*map(range, tensor.shape)):
        offset = tensor.storage_offset()
        for i, stride in zip(index, tensor.stride(), strict=True):
            offset += i * stride
        positions += range(element_size * offset, element_size * (offset + 1))
    return positions


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_single_bit_changes_the_digest(dtype, view):
    torch.manual_seed(0)
    is_bool = dtype is torch.bool
    num_values = 2 if is_bool else 256
    num_bits = 1 if is_bool else 8
    element_size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, num_values, (16 * element_size,)).to(torch.uint8)

    tensor = VIEWS[view](raw.view(dtype))
    before = tensor_bits.digest(tensor)
    assert (before.dtype, before.shape) == (torch.int64, ())

    positions = bytes_of(tensor)
    assert len(positions) == tensor.numel() * element_size
    missed = []
    for position, bit in itertools.product(positions, range(num_bits)):
        raw[position] ^= 1 << bit
        if tensor_bits.digest(tensor) == before:
            missed.append((position, bit))
        raw[position] ^= 1 << bit
    assert missed == []

    # What is in the storage beside the tensor does not count.
    for position in set(range(len(raw))) - set(positions):
        raw[position] ^= 1
    assert tensor_bits.digest(tensor) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3, 2, 2)])
def test_an_empty_tensor_has_a_digest(dtype, shape):
    assert tensor_bits.digest(torch.empty(shape, dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_depends_on_the_tensor_alone(dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(4, 3, 5, 5) * 50).to(dtype)
    assert tensor_bits.digest(tensor) == tensor_bits.digest(tensor.clone())

    channels_last = tensor.contiguous(memory_format=torch.channels_last)
    assert tensor_bits.digest(channels_last) == tensor_bits.digest(channels_last.clone())


def test_zeros_of_both_signs_and_different_nans_have_different_digests():
    zeros = torch.zeros(3)
    with_negative_zero = torch.tensor([0.0, -0.0, 0.0])
    assert tensor_bits.digest(zeros) != tensor_bits.digest(with_negative_zero)

    nan_bits = torch.tensor([0x7FC00000], dtype=torch.int32)
    nan = nan_bits.view(torch.float32)
    other_nan = (nan_bits + 1).view(torch.float32)
    assert tensor_bits.digest(nan) != tensor_bits.digest(other_nan)


def make_replica() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network that took a step with momentum and LRDropout, in two groups."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 2)
    )
    groups = [
        {"params": list(network[:2].parameters())},
        {"params": list(network[3].parameters()), "lr": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=3)

    network(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    return network, optimizer


def test_a_fingerprint_has_settings_and_tensors_by_name():
    network, optimizer = make_replica()
    values = fingerprint(network, optimizer)
    assert values["lr of group 0"] == "0.1"
    assert values["lr of group 1"] == "0.5"
    assert values["mask_seed of group 0"] == values["mask_seed of group 1"] == "3"
    assert not [name for name in values if name.startswith("params ")]

    for name, _ in network.named_parameters():
        assert isinstance(values[name], int)
        assert isinstance(values[f"{name} (momentum_buffer)"], int)
    assert values == fingerprint(*make_replica())


def change_replica(name: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Change what a fingerprint has under a name."""
    if name == "0.weight":
        with torch.no_grad():
            network[0].weight[2, 1, 0, 1] *= 1 + 2**-20
    elif name == "3.bias (momentum_buffer)":
        optimizer.state[network[3].bias]["momentum_buffer"][1] += 1
    elif name == "lr of group 1":
        optimizer.param_groups[1]["lr"] = torch.tensor(0.25)
    elif name == "mask_seed of group 0":
        optimizer.param_groups[0]["mask_seed"] = 4


@pytest.mark.parametrize(
    "name", ["0.weight", "3.bias (momentum_buffer)", "lr of group 1", "mask_seed of group 0"]
)
def test_a_fingerprint_shows_what_changed_and_nothing_else(name):
    before = fingerprint(*make_replica())
    network, optimizer = make_replica()
    change_replica(name, network, optimizer)

    after = fingerprint(network, optimizer)
    assert [key for key in before if after[key] != before[key]] == [name]


def test_a_setting_may_be_a_number_or_a_tensor():
    network, optimizer = make_replica()
    before = fingerprint(network, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    assert fingerprint(network, optimizer) == before


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_of_sharded_tensors_shape_and_shards_are_compared_and_counters_bit_for_bit(mesh):
    network = nn.Linear(3, 4)
    network.weight = nn.Parameter(distribute_tensor(network.weight.detach(), mesh, [Shard(0)]))
    network.bias = nn.Parameter(distribute_tensor(network.bias.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    values = fingerprint(network, optimizer)
    for name in ("weight", "weight (exp_avg)", "weight (exp_avg_sq)"):
        assert values[name].startswith("torch.float32 (4, 3) (Shard(dim=0),) over ")
    assert values["weight (step)"] == tensor_bits.digest(torch.tensor(1.0)).item()


def test_running_statistics_are_not_part_of_a_fingerprint():
    network, optimizer = make_replica()
    network[1].running_mean += 1
    assert fingerprint(network, optimizer) == fingerprint(*make_replica())


@pytest.fixture
def compare_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Compares a replica with itself on several ranks, and returns the error; empty: none.

    It takes a change to the fingerprint for each rank.
    """

    def compare(*changes: dict[str, object]) -> str:
        network, optimizer = make_replica()

        def all_gather_values(report: tuple[str, dict]) -> list[tuple[str, dict]]:
            _, values = report
            assert values == fingerprint(network, optimizer)
            return [
                (f"rank {rank} on host", {**values, **change})
                for rank, change in enumerate(changes)
            ]

        dist = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: len(changes))
        monkeypatch.setattr("lrd.distributed.replica_check.dist", dist)
        monkeypatch.setattr("lrd.distributed.replica_check.all_gather_values", all_gather_values)
        try:
            compare_replicas(network, optimizer, step=7)
        except RunError as error:
            return str(error)
        return ""

    return compare


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_equal_replicas_pass(compare_ranks, ranks):
    changes = [{}] * ranks
    assert compare_ranks(*changes) == ""


@pytest.mark.parametrize("different_rank", [0, 1, 2])
def test_of_three_ranks_the_one_that_differs_is_named(compare_ranks, different_rank):
    changes = [{}, {}, {}]
    changes[different_rank] = {"3.weight": 1}
    assert compare_ranks(*changes) == (
        f"step 7: the replicas differ, first in 3.weight: rank {different_rank} on host "
        "differs from the other ranks; no checkpoint is written after it"
    )


def test_two_of_five_ranks_are_named_even_if_they_differ_from_each_other(compare_ranks):
    message = compare_ranks({}, {"3.weight": 1}, {}, {"3.weight": 2}, {})
    minority = "rank 1 on host, rank 3 on host differ from the other ranks"
    assert f"first in 3.weight: {minority}" in message


@pytest.mark.parametrize("values", [[1, 2, 2, 3], [1, 2, 2, 3, 4]])
def test_rank_0_may_be_in_the_minority(compare_ranks, values):
    message = compare_ranks(*[{"3.weight": value} for value in values])
    minority = ", ".join(f"rank {rank} on host" for rank, value in enumerate(values) if value != 2)
    assert f"first in 3.weight: {minority} differ from the other ranks" in message


def test_of_two_ranks_both_are_named(compare_ranks):
    message = compare_ranks({}, {"0.bias": 1})
    sides = "rank 0 on host against rank 1 on host, which is right cannot be told"
    assert f"first in 0.bias: {sides}" in message


def test_a_setting_is_named_before_the_tensors_that_differ_because_of_it(compare_ranks):
    message = compare_ranks({}, {"0.weight": 1, "mask_seed of group 0": "9"})
    assert "first in mask_seed of group 0: rank 0 on host against rank 1 on host, " in message


def test_a_tensor_that_only_one_rank_has_is_named(compare_ranks):
    message = compare_ranks({}, {"0.weight (new)": 1}, {})
    assert "first in 0.weight (new): rank 1 on host differs from the other ranks" in message
