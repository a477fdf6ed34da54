"""What each rank of a test runs: learning rate dropout, exchanging all elements or the kept ones.

    run_exchange.py CASES

CASES is JSON, a list of objects: `options` of SGD, `keep_probs` of two groups, `dtype`, `steps`,
`micro_steps` of each step, further arguments of LRDropout (`mask`) and of DDP (`ddp`). Rank 0
prints a JSON list with the results of each case.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import lrd

BATCH_SIZE = 8  # of a rank


def make_network() -> nn.Module:
    """A smooth network: at a kink, a rounding error would become a large difference."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 400),
        nn.Tanh(),
        nn.Linear(400, 10),
    )


def make(network: nn.Module, case: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    network = copy.deepcopy(network)
    parameters = list(network.parameters())
    groups = [
        {"params": parameters[number::2], "keep_prob": keep_prob}
        for number, keep_prob in enumerate(case["keep_probs"])
    ]
    optimizer = torch.optim.SGD(groups, **case["options"])
    lrd.LRDropout(optimizer, seed=5, **case.get("mask", {}))
    # Small buckets, so that there are several.
    options = {"bucket_cap_mb": 0.1, **case.get("ddp", {})}
    return DistributedDataParallel(network, **options), optimizer


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of two tensors, relative to the largest element."""
    pairs = zip(actual, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def is_same_on_all_ranks(tensors: list[Tensor]) -> bool:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return all(torch.equal(other, flat) for other in others)


def refuses_other_masks(network: nn.Module) -> bool:
    """Whether ranks with different seeds are refused."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    lrd.LRDropout(optimizer, seed=dist.get_rank())
    try:
        lrd.exchange_kept(DistributedDataParallel(network), optimizer)
    except ValueError as error:
        return "on all ranks, and they differ" in str(error)
    return False


def momentum_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]


def run(case: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, case["dtype"])
    torch.manual_seed(0)
    network = make_network().to(dtype)
    models = [make(network, case) for _ in range(2)]
    exchange = lrd.exchange_kept(*models[1])
    generator = torch.Generator().manual_seed(dist.get_rank())

    for _ in range(case["steps"]):
        batches = [
            (
                torch.randn(BATCH_SIZE, 3, 8, 8, generator=generator, dtype=dtype),
                torch.randint(0, 10, (BATCH_SIZE,), generator=generator),
            )
            for _ in range(case.get("micro_steps", 1))
        ]
        for ddp_model, optimizer in models:
            optimizer.zero_grad()
            for inputs, labels in batches:
                is_last = inputs is batches[-1][0]
                with nullcontext() if is_last else ddp_model.no_sync():
                    cross_entropy(ddp_model(inputs), labels).backward()
            optimizer.step()

    (dense_model, dense_optimizer), (kept_model, kept_optimizer) = models
    parameters = [parameter.detach() for parameter in kept_model.parameters()]
    expected = [parameter.detach() for parameter in dense_model.parameters()]
    facts = {
        "refuses_other_masks": refuses_other_masks(network),
        "difference": difference(parameters, expected),
        "is_same_on_all_ranks": is_same_on_all_ranks(parameters),
    }
    if case["options"].get("momentum"):
        facts["is_own"] = not is_same_on_all_ranks(momentum_of(kept_optimizer))
        exchange.average_momentum()
        averaged = momentum_of(kept_optimizer)
        facts["is_averaged_same"] = is_same_on_all_ranks(averaged)
        facts["momentum_difference"] = difference(averaged, momentum_of(dense_optimizer))
    return facts


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "two optimizers step in turn")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = [run(case) for case in json.loads(sys.argv[1])]
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()
