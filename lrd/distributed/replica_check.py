"""Whether all ranks hold the same parameters and optimizer state, bit for bit.

A tensor that is sharded exists once, so there is nothing to compare its bits with: its shape and
how it is sharded are compared.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd.distributed.communication import all_gather_values, describe_rank
from lrd.errors import RunError
from lrd.optim import placement, tensor_bits


def fingerprint(
    model: nn.Module, optimizer: Optimizer, has_local_momentum: bool = False
) -> dict[str, Any]:
    """A fingerprint of a replica.

    BatchNorm's running statistics are not part of it: they differ by design. The CPU waits for the
    GPU once, for all tensors.

    Args:
        has_local_momentum: whether optimizer state differs by design too, and is not part of it.

    Returns:
        The settings of each parameter group as text, and a 64-bit integer for each parameter and
        each tensor of optimizer state, by name. For one that is sharded it is a text instead.
    """
    settings = {
        f"{key} of group {number}": repr(value.item() if isinstance(value, Tensor) else value)
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    }

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for parameter, state in {} if has_local_momentum else optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[id(parameter)]} ({key})"] = value

    shards = {
        name: describe_shards(tensor)
        for name, tensor in tensors.items()
        if placement.is_dtensor(tensor)
    }
    tensors = {name: tensor for name, tensor in tensors.items() if name not in shards}
    if not tensors:
        return settings | shards

    # All digests go to one device, so that one copy to the CPU brings them all.
    device = next(model.parameters()).device
    digests = [
        tensor_bits.digest(tensor).to(device, non_blocking=True) for tensor in tensors.values()
    ]
    values = torch.stack(digests).tolist()
    return settings | shards | dict(zip(tensors, values, strict=True))


def describe_shards(tensor: Any) -> str:
    """What all ranks must have in common of a DTensor, as text."""
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.placements} over {tensor.device_mesh}"


def compare_replicas(
    model: nn.Module, optimizer: Optimizer, step: int, has_local_momentum: bool = False
) -> None:
    """Stop where the replicas are no longer bit-identical. All ranks must call this.

    Args:
        has_local_momentum: see `fingerprint`.

    Raises:
        RunError: names the ranks in the minority and the first setting or tensor that differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return

    reports: list[Any] = all_gather_values(
        [describe_rank(), fingerprint(model, optimizer, has_local_momentum)]
    )
    rank_names = [rank_name for rank_name, _ in reports]
    fingerprints = [rank_fingerprint for _, rank_fingerprint in reports]

    # A rank may lack a tensor that another one has. dict.fromkeys keeps the order and drops
    # doubles.
    tensor_names = dict.fromkeys(name for tensors in fingerprints for name in tensors)
    for name in tensor_names:
        values = [tensors.get(name) for tensors in fingerprints]
        if len(set(values)) > 1:
            minority = _describe_minority(rank_names, values)
            raise RunError(
                f"step {step}: the replicas differ, first in {name}: {minority}; "
                "no checkpoint is written after it"
            )


def _describe_minority(rank_names: list[str], values: list[Any]) -> str:
    ranks_by_value: dict[Any, list[str]] = {}
    for rank_name, value in zip(rank_names, values, strict=True):
        ranks_by_value.setdefault(value, []).append(rank_name)

    majority, *others = sorted(ranks_by_value.values(), key=len, reverse=True)
    # With two ranks, for example, there is no majority.
    if len(majority) == len(others[0]):
        sides = " against ".join(", ".join(ranks) for ranks in ranks_by_value.values())
        return f"{sides}, which is right cannot be told"

    minority = [rank_name for ranks in others for rank_name in ranks]
    verb = "differs" if len(minority) == 1 else "differ"
    return f"{', '.join(minority)} {verb} from the other ranks"
