"""A program for several ranks: masked steps of sharded parameters, against steps of whole ones.

    accelerate launch ... tests/helpers/run_shards.py masks | save FOLDER | load FOLDER

The reference takes no part in any of lrd's steps: it is torch's own step of the whole parameters,
after which the dropped elements of `lrd.mask.draw` get their old values back.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lrd

SEED = 5
STEPS = 3
KEEP_PROB = 0.7

# Uneven on 2, 3 and 4 ranks, of less rows than ranks, and with blocks of 256 elements cut in two.
SHAPES = [(7, 9), (3, 2, 5), (2,), (40, 30)]

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.1}),
]


def main() -> None:
    if "RANK" not in os.environ:  # a single rank needs no launcher
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ["MASTER_PORT"] = "0"
    dist.init_process_group("gloo")
    command, *arguments = sys.argv[1:]
    {"masks": check_masks, "save": save, "load": load}[command](*arguments)

    dist.barrier()
    if dist.get_rank() == 0:
        print("all equal")
    dist.destroy_process_group()


def check_masks() -> None:
    """Every placement on meshes of 1 to 4 ranks, and FSDP2 in its ways, equals whole parameters."""
    for mesh in make_meshes():
        if mesh.get_coordinate() is None:
            continue

        placements = itertools.product([Shard(0), Shard(1), Replicate()], repeat=mesh.ndim)
        for placement, (cls, options) in itertools.product(placements, OPTIMIZERS):
            check_distributed_tensors(mesh, placement, cls, options, "element")
        for granularity in ("row", "column", "tensor"):
            check_distributed_tensors(mesh, (Shard(0),) * mesh.ndim, *OPTIMIZERS[0], granularity)

    check_fully_shard({})
    hybrid = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("copies", "shards"))
    check_fully_shard({"mesh": hybrid})  # HSDP
    check_fully_shard({"offload_policy": CPUOffloadPolicy(pin_memory=False)})
    check_fully_shard({"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}, 2e-2)
    check_tensor_parallel()


def make_meshes() -> list[DeviceMesh]:
    """Meshes of 1, 2, 3 and 4 of the four ranks, and one of two dimensions."""
    meshes = [DeviceMesh("cpu", list(range(n))) for n in (1, 2, 3, 4)]
    return [*meshes, DeviceMesh("cpu", torch.arange(4).view(2, 2))]


def check_distributed_tensors(
    mesh: DeviceMesh,
    placements: tuple[Any, ...],
    cls: Any,
    options: dict[str, Any],
    granularity: str,
) -> None:
    """Steps with given gradients: all bits of parameters are those of whole ones."""
    generator = torch.Generator().manual_seed(0)
    whole_params = [torch.randn(shape, generator=generator) for shape in SHAPES]
    # A vector has no second dimension to shard.
    placements_of = [
        tuple(Shard(0) if p == Shard(1) and len(shape) == 1 else p for p in placements)
        for shape in SHAPES
    ]
    params = [
        nn.Parameter(distribute(whole, mesh, placement))
        for whole, placement in zip(whole_params, placements_of, strict=True)
    ]

    optimizer = cls(params, **options)
    dropout = lrd.LRDropout(optimizer, keep_prob=KEEP_PROB, seed=SEED, granularity=granularity)
    reference = cls(whole_params, **options)

    for step in range(STEPS):
        for param, whole, placement in zip(params, whole_params, placements_of, strict=True):
            whole.grad = torch.randn(whole.shape, generator=generator)
            param.grad = distribute(whole.grad, mesh, placement)
        optimizer.step()
        masked_reference_step(reference, step, granularity)

    for param, whole in zip(params, whole_params, strict=True):
        assert torch.equal(param.full_tensor(), whole), (mesh, placements, cls, granularity)

    # Every rank reports what the latest update kept of the whole parameters.
    masks = [
        draw(whole.shape, index, STEPS - 1, granularity).expand(whole.shape)
        for index, whole in enumerate(whole_params)
    ]
    n_kept = sum(int(keep.sum()) for keep in masks)
    assert dropout.kept_fractions() == [n_kept / sum(keep.numel() for keep in masks)]


def distribute(whole: Tensor, mesh: DeviceMesh, placements: tuple[Any, ...]) -> Tensor:
    """This rank's part of a tensor that every rank has."""
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def masked_reference_step(optimizer: Any, step: int, granularity: str = "element") -> None:
    """torch's step, after which dropped elements get their old values back."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    old_values = [param.detach().clone() for param in params]
    optimizer.step()

    with torch.no_grad():
        for index, (param, old) in enumerate(zip(params, old_values, strict=True)):
            param.copy_(torch.where(draw(param.shape, index, step, granularity), param, old))


def draw(shape: torch.Size, index: int, step: int, granularity: str = "element") -> Tensor:
    """The mask of a whole parameter."""
    drawn_shape = [
        size if granularity == "element" or dim == {"row": 0, "column": 1}.get(granularity) else 1
        for dim, size in enumerate(shape)
    ]
    flat = lrd.mask.draw(
        math.prod(drawn_shape), seed=SEED, step=step, index=index, keep_prob=KEEP_PROB
    )
    return flat.view(drawn_shape)


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 5, bias=False))


def make_batch(step: int) -> Tensor:
    """The same batch on every rank, so that the mean of the ranks' gradients is the gradient."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(100 + step))


def check_fully_shard(options: dict[str, Any], tolerance: float = 1e-6) -> None:
    """FSDP2 moves the elements that one process moves, by as much up to the gradients' rounding."""
    model = make_model()
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    train_like_one_process(model, tolerance)


def check_tensor_parallel() -> None:
    """Tensor parallelism, and FSDP2 around it, which makes a _StridedShard of dimension 0."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(make_even_model(), mesh["tensor"], plan)
    train_like_one_process(model, 1e-5, make_even_model())

    model = parallelize_module(make_even_model(), mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    train_like_one_process(model, 1e-5, make_even_model())


def make_even_model() -> nn.Sequential:
    """FSDP2 around tensor parallelism wants shards of equal size."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4, bias=False))


def train_like_one_process(
    model: nn.Module, tolerance: float, reference: nn.Module | None = None
) -> None:
    """Train a sharded model and a whole one, and compare after each step which elements moved."""
    reference = make_model() if reference is None else reference
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    lrd.LRDropout(optimizer, keep_prob=KEEP_PROB, seed=SEED)
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)

    for step in range(STEPS):
        before = [param.full_tensor().clone() for param in model.parameters()]
        for network in (model, reference):
            network(make_batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        masked_reference_step(reference_optimizer, step)
        reference_optimizer.zero_grad()

        pairs = zip(model.parameters(), reference.parameters(), before, strict=True)
        for index, (param, whole, old) in enumerate(pairs):
            new = param.full_tensor()
            assert torch.equal(new != old, draw(new.shape, index, step)), (index, step)
            torch.testing.assert_close(new, whole.detach(), rtol=tolerance, atol=tolerance)


def make_sharded_training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    lrd.LRDropout(optimizer, keep_prob=KEEP_PROB, seed=SEED)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(make_batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: str) -> None:
    """Train three steps, save by DCP in both forms, train on, and save the end as whole tensors."""
    model, optimizer = make_sharded_training()
    train(model, optimizer, range(3))

    for form, options in state_dict_forms():
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{form}")

    train(model, optimizer, range(3, 6))
    whole = [param.full_tensor() for param in model.parameters()]
    if dist.get_rank() == 0:
        torch.save(whole, f"{folder}/end.pt")


def load(folder: str) -> None:
    """Load each form into shards of this number of ranks, and go on to the same end."""
    for form, options in state_dict_forms():
        model, optimizer = make_sharded_training()
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{form}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=state,
            options=options,
        )
        assert optimizer.param_groups[0]["mask_step"] == 3
        train(model, optimizer, range(3, 6))

        end = torch.load(f"{folder}/end.pt")
        for param, whole in zip(model.parameters(), end, strict=True):
            torch.testing.assert_close(param.full_tensor(), whole, rtol=1e-5, atol=1e-6)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        assert state, form


def state_dict_forms() -> list[tuple[str, StateDictOptions]]:
    return [
        ("nested", StateDictOptions()),
        ("flat", StateDictOptions(flatten_optimizer_state_dict=True)),
    ]


if __name__ == "__main__":
    main()
