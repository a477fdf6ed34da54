"""A trial of the masked step in one pass against torch's optimizers, on this machine: some steps of odd-sized tensors.

On a CPU all bits must be those of torch's for-loop, on a CUDA device all values those of its `fused=True` to within
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

OPTIONS: dict[Any, list[dict[str, Any]]] = {
    torch.optim.SGD: [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        {"lr": 0.3, "momentum": 0.8, "dampening": 0.1, "maximize": True},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    ],
    torch.optim.Adam: [
        {"lr": 1e-3},
        {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "maximize": True},
        {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
}


def agrees(kind: Any, device: torch.device, options: dict[str, Any], take: Callable[..., None]) -> bool:
    """Whether `take(kind, optimizer, updates)` does what the optimizer's own step does, its state included."""
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = (1, 7, 16, 33, 255, 1030, 5000)
    plain: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    theirs = [torch.randn(size, **plain).to(device) for size in sizes]
    ours = [tensor.clone() for tensor in theirs]
    cls: Any = kind
    stock, own = (cls(tensors, fused=device.type == "cuda", **options) for tensors in (theirs, ours))
    group = own.param_groups[0]
    group |= {"keep_prob": 1.0, "mask_rescale": False, "mask_step": 0, "mask_seed": 0}
    with torch.no_grad():
        for scale in (1e-3, 1e3, 1e-12):
            for one, other in zip(ours, theirs, strict=True):
                one.grad = (torch.randn(one.shape, **plain) * scale).to(device)
                other.grad = one.grad.clone()
            stock.step()
            take(kind, own, [(i, param, group) for i, param in enumerate(ours)])
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True)]
    pairs += [(own.state[one][key], stock.state[other][key]) for one, other in pairs for key in own.state.get(one, {})]
    if device.type == "cuda":
        return all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in pairs)
    return all(torch.equal(one, other) for one, other in pairs)
