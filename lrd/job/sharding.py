"""`trainer.sharding: full`: each rank holds a shard of every parameter (FSDP2).

Gradients and optimizer state are sharded like the parameters. A block of the network is whole on a
rank only while it computes. See Rajbhandari et al., arXiv 1910.02054 (ZeRO, stage 3), and
Zhao et al., arXiv 2304.11277.

The results are those of DDP up to the rounding of the gradients' mean. Checkpoints contain whole
tensors, so a run may go on with or without shards, and on another number of ranks. A parameter's
masks are drawn at its elements' positions in the whole parameter, so these are the same bits too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from lrd.checkpoint.store import TrainState
from lrd.errors import UserError, first_line
from lrd.optim import placement


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` has sharded a network."""
    return isinstance(model, FSDPModule)


def shard_model(model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """Replace each parameter of a network by this rank's shard of it: part of its first dimension.

    The parameters are DTensors then. Forward and backward passes are collectives: all ranks must
    make them together.

    Args:
        model: the network, the same on every rank. Its parameters must be row-major.
        blocks: the parts of it that are gathered one at a time; what is in none of them is gathered
            for the whole pass.
        device: what the ranks compute on.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    # Left to itself FSDP2 would keep the root's parameters whole after a forward pass, so that
    # after an evaluation `model.parameters()` would not be the optimizer's.
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def require_optimizer_support(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step does not work on shards, by a step of a tiny copy of it.

    Raises:
        UserError: Rprop, for example, sets elements by an index, which torch refuses for DTensors.
    """
    mesh = optimizer.param_groups[0]["params"][0].device_mesh
    whole = torch.ones(2 * dist.get_world_size(), 2, device=mesh.device_type)

    groups = []
    for group in optimizer.param_groups:
        parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        parameter.grad = torch.ones_like(parameter)
        groups.append({**group, "params": [parameter]})

    optimizer_class: Any = type(optimizer)
    try:
        optimizer_class(groups).step()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"trainer.sharding: full does not work with {type(optimizer).__name__} "
            f"as it is set here: {first_line(error)}"
        ) from None


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate this rank's gradients, whole, in backward passes inside this context."""
    fsdp_model = cast(FSDPModule, model)
    fsdp_model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        fsdp_model.set_requires_gradient_sync(True)


def keep_local_gradients(model: nn.Module) -> None:
    """Let backward passes leave this rank's gradients in whole parameters, from now on.

    No step can follow.
    """
    fsdp_model = cast(FSDPModule, model)
    fsdp_model.set_requires_gradient_sync(False)
    fsdp_model.set_reshard_after_backward(False)


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale the gradient down to `max_norm` if it is longer, as `nn.utils.clip_grad_norm_` does.

    Args:
        model: a sharded network after a backward pass.
        max_norm: None: the gradient stays as it is.

    Returns:
        The norm of the whole gradient before, float32 (), the same bits on every rank.
    """
    shards = [
        placement.local(parameter.grad)
        for parameter in model.parameters()
        if parameter.grad is not None
    ]

    # Norms are gathered and not reduced, so that all ranks add them in the same order.
    local_norm = nn.utils.get_total_norm(shards).double()
    norms = [torch.empty_like(local_norm) for _ in range(dist.get_world_size())]
    dist.all_gather(norms, local_norm)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms)).float()

    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(shards, factor)
    return norm


def gather_state(state: TrainState, is_kept: bool) -> TrainState:
    """Put whole tensors in the place of the shards in a state. All ranks must call this together.

    One tensor after the other is gathered. So a rank needs memory for one whole tensor on its
    device, and a rank that keeps them needs it for the whole state on its host.

    Args:
        state: with this rank's shards.
        is_kept: whether this rank keeps the whole tensors, which are on the CPU then. Otherwise it
            gets empty ones.
    """
    return replace(
        state,
        model=_gather(state.model, is_kept),
        optimizer=_gather(state.optimizer, is_kept),
    )


def _gather(value: Any, is_kept: bool) -> Any:
    """`gather_state` for nested dicts, lists and tuples; other values are returned as they are."""
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if is_kept else whole.new_empty(0)

    if isinstance(value, dict):
        # The order of an optimizer's states may differ between ranks: it takes a small shard in
        # another way than a large one.
        gathered = {key: _gather(value[key], is_kept) for key in sorted(value, key=repr)}
        return {key: gathered[key] for key in value}
    if isinstance(value, list | tuple):
        return type(value)(_gather(item, is_kept) for item in value)
    return value


def shard_state(state: TrainState, model: nn.Module, optimizer: Optimizer) -> TrainState:
    """Put this rank's shards in the place of the whole tensors in a state, with no communication.

    What does not fit stays whole: whoever loads the state reports it.

    Args:
        state: the same on every rank, with whole tensors.
        model: the sharded network that the state is for.
        optimizer: the optimizer of its parameters.
    """
    model_shards = dict(state.model)
    for name, parameter in model.named_parameters():
        if name in model_shards:
            model_shards[name] = _shard_like(parameter, model_shards[name])

    saved = state.optimizer["optimizer"]
    parameters = [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]  # in the order in which a state_dict counts them
    states = {}
    for index, parameter_state in saved["state"].items():
        states[index] = dict(parameter_state)
        if index < len(parameters):
            for key, value in parameter_state.items():
                states[index][key] = _shard_like(parameters[index], value)

    return replace(
        state,
        model=model_shards,
        optimizer={**state.optimizer, "optimizer": {**saved, "state": states}},
    )


@torch.no_grad()
def _shard_like(parameter: Tensor, value: Any) -> Any:
    """This rank's shard of a tensor of a sharded parameter's shape; any other value as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value

    shard = torch.empty_like(parameter, dtype=value.dtype)
    place = placement.of_parameter(parameter)
    local_value = value if place is None else place.box(value)
    placement.local(shard).copy_(local_value)
    return shard
