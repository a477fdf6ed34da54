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
            who = _describe_minority([who for who, _ in everyone], values)
            raise RunError(
                f"step {step}: the replicas differ, first in {name}: {who}; no checkpoint is written after it"
            )


def _describe_minority(ranks: list[str], values: list[Any]) -> str:
    groups: dict[Any, list[str]] = {}
    for rank, value in zip(ranks, values, strict=True):
        groups.setdefault(value, []).append(rank)
    most, *others = sorted(groups.values(), key=len, reverse=True)
    if len(most) == len(others[0]):
        return f"{' against '.join(', '.join(group) for group in groups.values())}, which is right cannot be told"
    odd = [rank for group in others for rank in group]
    return f"{', '.join(odd)} {'differs' if len(odd) == 1 else 'differ'} from the other ranks"
