"""What rank processes of test_ranks.py do: each scenario writes what it found to a file.

    python -m tests.clients.run_two_ranks RANK N_RANKS FOLDER

All scenarios run in one process: most of a test's time would be the import of torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import lrd
from lrd import LRDropout
from tests.clients.reference import values
from tests.clients.small_training import make_batch, make_model

STEPS = 4
SEED = 5
KEEP_PROB = 0.5
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
RANK = int(sys.argv[1]) if __name__ == "__main__" else 0


def train_on_my_half(
    model: nn.Module, optimizer: Any, steps: range, raw_model: nn.Module | None = None
) -> list[Tensor]:
    """Train on this rank's half of each batch; the model averages the gradients.

    Returns:
        Copies of the whole parameters.
    """
    for step in steps:
        features, labels = make_batch(step)
        half = slice(RANK * 4, RANK * 4 + 4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(features[half]), labels[half]).backward()
        optimizer.step()

    return values([whole(param) for param in (raw_model or model).parameters()])


def whole(param: Tensor) -> Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def ddp(folder: Path) -> Any:
    """The gradients of each step as well, for the steps that are masked by hand."""
    raw_model = make_model()
    model = DistributedDataParallel(raw_model)
    optimizer = torch.optim.SGD(model.parameters(), **MOMENTUM)
    LRDropout(optimizer, KEEP_PROB, SEED)

    gradients: list[list[Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append([param.grad.clone() for param in raw_model.parameters()])
    )
    params = train_on_my_half(model, optimizer, range(STEPS), raw_model)
    return {"params": params, "gradients": gradients}


def zero(folder: Path) -> Any:
    """ZeroRedundancyOptimizer with LRDropout around it."""
    raw_model = make_model()
    model = DistributedDataParallel(raw_model)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.SGD, **MOMENTUM
    )
    LRDropout(optimizer, KEEP_PROB, SEED)
    return train_on_my_half(model, optimizer, range(STEPS), raw_model)


def zero_resumed(folder: Path) -> Any:
    """The same, from a checkpoint that is consolidated on rank 0."""
    path = folder / "zero.pt"
    for steps in (range(2), range(2, STEPS)):
        raw_model = make_model()
        model = DistributedDataParallel(raw_model)
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=torch.optim.SGD, **MOMENTUM
        )
        LRDropout(optimizer, KEEP_PROB, SEED if steps.start == 0 else SEED + 1)
        if steps.start > 0:
            state = torch.load(path, weights_only=True)
            raw_model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

        params = train_on_my_half(model, optimizer, steps, raw_model)
        optimizer.consolidate_state_dict(to=0)
        if RANK == 0:
            torch.save({"model": raw_model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        dist.barrier()
    return params


def zero_of_lrd_optimizers(folder: Path) -> Any:
    model = DistributedDataParallel(make_model())
    ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=lrd.optim.SGD, seed=SEED, **MOMENTUM
    )


def fsdp1(use_orig_params: bool) -> Any:
    raw_model = make_model()
    model = FullyShardedDataParallel(
        raw_model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = torch.optim.SGD(model.parameters(), **MOMENTUM)
    before = values(list(model.parameters()))
    error = ""
    try:
        LRDropout(optimizer, KEEP_PROB, SEED)
        train_on_my_half(model, optimizer, range(1))
    except ValueError as refusal:
        error = str(refusal)

    params = list(model.parameters())
    return {
        "error": error,
        "moved": any(not torch.equal(a, b) for a, b in zip(before, params, strict=True)),
        "keys": sorted(optimizer.param_groups[0]),
    }


def fsdp1_after_attaching(folder: Path) -> Any:
    """As where a trainer shards the model of a finished optimizer: refused at the first step."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), **MOMENTUM)
    LRDropout(optimizer, KEEP_PROB, SEED)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    before = values(list(sharded.parameters()))
    error = ""
    try:
        train_on_my_half(sharded, optimizer, range(1))
    except ValueError as refusal:
        error = str(refusal)

    params = list(sharded.parameters())
    moved = any(not torch.equal(a, b) for a, b in zip(before, params, strict=True))
    return {"error": error, "moved": moved}


def fsdp1_original_params(folder: Path) -> Any:
    return fsdp1(use_orig_params=True)


def fsdp1_flat_params(folder: Path) -> Any:
    return fsdp1(use_orig_params=False)


def make_sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.SGD(model.parameters(), **MOMENTUM)


def fsdp2(folder: Path) -> Any:
    model, optimizer = make_sharded()
    LRDropout(optimizer, KEEP_PROB, SEED)
    return train_on_my_half(model, optimizer, range(STEPS))


def fsdp2_resumed(folder: Path) -> Any:
    """The same through a sharded checkpoint."""
    for steps in (range(2), range(2, STEPS)):
        model, optimizer = make_sharded()
        LRDropout(optimizer, KEEP_PROB, SEED if steps.start == 0 else SEED + 1)
        if steps.start > 0:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=folder / "dcp")
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )

        params = train_on_my_half(model, optimizer, steps)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        if steps.start == 0:
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.save(state, checkpoint_id=folder / "dcp")
    return params


SCENARIOS = [
    ddp,
    zero,
    zero_resumed,
    zero_of_lrd_optimizers,
    fsdp1_after_attaching,
    fsdp1_original_params,
    fsdp1_flat_params,
    fsdp2,
    fsdp2_resumed,
]


def main() -> None:
    n_ranks = int(sys.argv[2])
    folder = Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=RANK, world_size=n_ranks
    )

    for scenario in SCENARIOS:
        try:
            result = scenario(folder)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        torch.save(result, folder / f"{scenario.__name__}.{RANK}.pt")
        dist.barrier()

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
