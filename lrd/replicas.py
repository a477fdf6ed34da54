"""Fingerprints of the replicas: whether all ranks hold the same parameters and optimizer state, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd import kernels
from lrd.distributed import describe_rank, gather
from lrd.errors import RunError


def fingerprint(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The settings of each parameter group, and an integer for each parameter and each tensor of optimizer state.

    BatchNorm's running statistics are no part: they differ by design. A CPU-GPU sync point, one for all.
    """
    settings = {
        f"{key} of group {number}": repr(value.item() if isinstance(value, Tensor) else value)
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[id(parameter)]} ({key})"] = value
    device = next(model.parameters()).device
    sums = [kernels.digest(tensor).to(device, non_blocking=True) for tensor in tensors.values()]
    return settings | dict(zip(tensors, torch.stack(sums).tolist(), strict=True))


def compare_replicas(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Stop where the replicas are no longer bit-identical.

    Raises:
        RunError: names the ranks in the minority and the first setting or tensor that differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    everyone = gather((describe_rank(), fingerprint(model, optimizer)))
    for name in dict.fromkeys(name for _, digests in everyone for name in digests):
        values = [digests.get(name) for _, digests in everyone]
        if len(set(values)) > 1:
            majority = max(values, key=values.count)
            odd = [who for (who, _), value in zip(everyone, values, strict=True) if value != majority]
            those = "those on the other ranks"
            if 2 * len(odd) >= len(everyone):
                those = "rank 0, and which is right cannot be told"
            raise RunError(
                f"step {step}: the replicas differ, first in {name}: {', '.join(odd)} differs from {those}; "
                "no checkpoint is written after it"
            )
