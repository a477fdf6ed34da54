"""Compares the one-pass step with torch's optimizers on this machine.

It takes a few steps of tensors of odd sizes, some of them under a mask. On a CPU all bits must be
those of torch's for-loop. On a CUDA device all values must be those of torch's `fused=True` to
within rounding. Dropped elements must have their old bits on both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrd.optim import mask


class _Step(NamedTuple):
    """One step of the comparison."""

    gradient_scale: float
    keep_prob: float = 1.0
    is_rescaled: bool = False


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
_SIZES = (1, 7, 16, 33, 255, 1030, 5000)  # elements of each tensor
_SEED = 1 << 63  # needs all 64 bits
_STOCK_STEPS = (_Step(1e-3), _Step(1e3), _Step(1e-12))

# With the first options only: on a CUDA device other options take other masked kernels to compile.
# 0.625 is 0.101 in binary, so its mask takes three bit planes, and both ways to combine them.
_MASKED_STEPS = (_Step(1.0, keep_prob=0.625), _Step(1.0, keep_prob=0.625, is_rescaled=True))


def matches(
    optimizer_class: Any, device: torch.device, one_pass_step: Callable[[Optimizer], None]
) -> bool:
    """Whether the one-pass step and torch's own leave the same parameters and optimizer state.

    Args:
        optimizer_class: torch.optim.SGD or torch.optim.Adam.
        device: where the parameters lie.
        one_pass_step: updates all parameters of the optimizer that it is given.
    """
    first_options, *other_options = OPTIONS[optimizer_class]
    steps = (*_STOCK_STEPS, *_MASKED_STEPS)
    if not _steps_agree(optimizer_class, device, first_options, steps, one_pass_step):
        return False

    return all(
        _steps_agree(optimizer_class, device, options, _STOCK_STEPS, one_pass_step)
        for options in other_options
    )


def _steps_agree(
    optimizer_class: Any,
    device: torch.device,
    options: dict[str, Any],
    steps: tuple[_Step, ...],
    one_pass_step: Callable[[Optimizer], None],
) -> bool:
    """Take the same steps both ways and compare the results."""
    # The process may have set another default generator, dtype or device.
    generator = torch.Generator("cpu").manual_seed(0)
    randn_options: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}

    torch_params = [torch.randn(size, **randn_options).to(device) for size in _SIZES]
    one_pass_params = [param.clone() for param in torch_params]

    is_fused = device.type == "cuda"
    torch_optimizer = optimizer_class(torch_params, fused=is_fused, **options)
    one_pass_optimizer = optimizer_class(one_pass_params, fused=is_fused, **options)

    with torch.no_grad():
        for mask_step, step in enumerate(steps):
            for one_pass_param, torch_param in zip(one_pass_params, torch_params, strict=True):
                grad = torch.randn(torch_param.shape, **randn_options) * step.gradient_scale
                one_pass_param.grad = grad.to(device)
                torch_param.grad = one_pass_param.grad.clone()

            # The kernels read the mask's settings from the group.
            one_pass_optimizer.param_groups[0] |= {
                "keep_prob": step.keep_prob,
                "mask_rescale": step.is_rescaled,
                "mask_step": mask_step,
                "mask_seed": _SEED,
                "mask_granularity": "element",
                "masks": "update",
            }
            old_values = [param.clone() for param in one_pass_params]
            one_pass_step(one_pass_optimizer)
            _masked_torch_step(torch_optimizer, torch_params, step, mask_step)
            if not _keep_dropped_bits(one_pass_params, old_values, step, mask_step):
                return False

    pairs = list(zip(one_pass_params, torch_params, strict=True))
    for one_pass_param, torch_param in list(pairs):
        one_pass_state = one_pass_optimizer.state.get(one_pass_param, {})
        torch_state = torch_optimizer.state.get(torch_param, {})
        if one_pass_state.keys() != torch_state.keys():
            return False
        pairs += [(one_pass_state[key], torch_state[key]) for key in torch_state]

    if device.type == "cuda":
        return all(
            torch.allclose(actual, expected, rtol=1e-5, atol=1e-7) for actual, expected in pairs
        )
    return all(torch.equal(actual, expected) for actual, expected in pairs)


def _masked_torch_step(
    optimizer: Optimizer, params: list[Tensor], step: _Step, mask_step: int
) -> None:
    """torch's step, after which dropped elements get their old values back."""
    old_values = [param.clone() for param in params]
    optimizer.step()
    if step.keep_prob == 1.0:
        return

    for index, (param, old) in enumerate(zip(params, old_values, strict=True)):
        if step.is_rescaled:
            param.sub_(old).div_(mask.effective_keep_prob(step.keep_prob)).add_(old)
        param.copy_(torch.where(_draw_mask(param, index, step, mask_step), param, old))


def _keep_dropped_bits(
    params: list[Tensor], old_values: list[Tensor], step: _Step, mask_step: int
) -> bool:
    """Whether no dropped element has moved, not even within the tolerance of rounding."""
    if step.keep_prob == 1.0:
        return True

    for index, (param, old) in enumerate(zip(params, old_values, strict=True)):
        is_dropped = ~_draw_mask(param, index, step, mask_step)
        if not torch.equal(param[is_dropped], old[is_dropped]):
            return False
    return True


def _draw_mask(param: Tensor, index: int, step: _Step, mask_step: int) -> Tensor:
    """The mask as `lrd.optim.mask` defines it, bool of the parameter's shape."""
    return mask.draw(
        param.numel(),
        seed=_SEED,
        step=mask_step,
        index=index,
        keep_prob=step.keep_prob,
        device=param.device,
    )
