"""Which updates a masked step in one pass takes over from torch: SGD, Adam and AdamW on float32 tensors.

`LRDropout` asks before each step. What is taken over is done here, in the optimizer's own state, with the gradients out
of the optimizer's sight afterwards; everything else the optimizer does itself, and dropped elements are put back.
Which way it goes is a matter of speed alone. On a CPU the bits are those of torch's for-loop, on a CUDA device those of
its `fused=True`: `is_trusted` compares them with torch's optimizer before the first step, and where they differ nothing
is taken over.

LRD_FUSED in the environment: 0 takes nothing over, 1 on a CPU small groups too.
"""

from __future__ import annotations

import inspect
import os
import warnings
from functools import cache
from importlib import import_module
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from lrd import mask, settings, trial
from lrd.errors import first_line

_LEAST = 1 << 18  # elements for which loading Numba, a second, is worth while on a CPU
Update = tuple[int, Tensor, dict[str, Any]]  # the parameter's index in the optimizer, the parameter, its group
_TINY, _HUGE = 2.0**-126, 2.0**127  # numbers that float32 makes no zero of, and no infinity
_TYPES = (Tensor, torch.nn.Parameter)  # others' memory may not be what it seems: DTensor, for one, has none
_MASKED = ("update", "element")
_STATE: dict[Any, tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
}


def updates(optimizer: Optimizer) -> list[Update]:
    """The updates of the optimizer's next step, where the kernels know every one of them; otherwise none.

    All or nothing: what torch refuses in one group it must refuse before another has moved.
    """
    found: list[Update] = []
    first = 0
    for group in optimizer.param_groups:
        found += [(first + i, param, group) for i, param in enumerate(group["params"]) if param.grad is not None]
        first += len(group["params"])
    found = [update for update in found if update[1].numel() > 0]
    kind, groups = _kind(optimizer), list({id(group): group for _, _, group in found}.values())
    is_scaled = getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None
    if kind is None or is_scaled or all(group["keep_prob"] == 1.0 for group in groups):
        return []
    device = found[0][1].device
    if device.type == "cpu" and os.environ.get("LRD_FUSED") != "1" and sum(p.numel() for _, p, _ in found) < _LEAST:
        return []
    dense = (_is_dense(param, [param.grad, *_states(optimizer, kind, param)], device) for _, param, _ in found)
    can = device.type in _MODULES and all(_is_plain(group, device) for group in groups) and all(dense)
    return found if can and _are_apart(found) and is_trusted(kind, device) else []


def _is_plain(group: dict[str, Any], device: torch.device) -> bool:
    """Whether a group's mask, if it has one, and its arithmetic are of those that the kernels know."""
    is_masked = group["keep_prob"] < 1.0
    if settings.is_zero(group["lr"]) or (is_masked and (group["masks"], group["mask_granularity"]) != _MASKED):
        return False
    return _is_plain_on_cpu(group) if device.type == "cpu" else _is_plain_on_cuda(group)


def _kind(optimizer: Optimizer) -> Any:
    """torch's class whose step an optimizer takes, of those that can be taken over."""
    own: Any = type(optimizer)
    step = inspect.unwrap(own.step)
    kind: Any = next((kind for kind in _STATE if step is inspect.unwrap(kind.step)), None)
    return kind if kind is not None and own._init_group is kind._init_group else None


def _numbers(group: dict[str, Any]) -> list[Any]:
    keys = ("weight_decay", "momentum", "dampening", "eps")
    return [*(group[key] for key in keys if key in group), *group.get("betas", ())]


def _is_plain_on_cpu(group: dict[str, Any]) -> bool:
    """Whether the arithmetic is that of torch's for-loop; that of `fused=True` depends on the number of threads."""
    odd = any(group.get(key) for key in ("fused", "capturable", "amsgrad", "differentiable"))
    tensors = any(isinstance(number, Tensor) for number in (group["lr"], *_numbers(group)))
    if odd or tensors or np.float32(1 - group.get("betas", (0.9,))[0]) >= 0.5:  # torch's lerp has another formula then
        return False
    return all(number == 0 or _TINY <= abs(number) <= _HUGE for number in (group["lr"], *_numbers(group)))


def _is_plain_on_cuda(group: dict[str, Any]) -> bool:
    """Whether torch's fused step may stand for it: nobody has asked for another."""
    odd = group.get("fused") is False or any(group.get(key) for key in ("foreach", "amsgrad", "differentiable"))
    lr = group["lr"]
    is_number = not isinstance(lr, Tensor) or not lr.is_cuda or (lr.dtype is torch.float32 and lr.dim() == 0)
    return not odd and is_number and not any(isinstance(number, Tensor) for number in _numbers(group))


def _states(optimizer: Optimizer, kind: Any, param: Tensor) -> list[Tensor]:
    kept = optimizer.state.get(param)
    return [kept[key] for key in _STATE[kind] if kept.get(key) is not None] if kept else []


def _is_dense(param: Tensor, others: list[Any], device: torch.device) -> bool:
    """Whether all are float32 of one shape and order on the device: row-major, on CUDA channels_last too."""
    is_row_major = True
    for t in (param, *others):
        is_float = type(t) in _TYPES and t.dtype is torch.float32 and t.layout is torch.strided and t.device == device
        if not is_float or t.shape != param.shape or t.is_neg() or (t.data_ptr() == 0 and t.numel() > 0):
            return False
        is_row_major = is_row_major and t.is_contiguous()
    is_last = not is_row_major and device.type == "cuda" and param.dim() == 4 and param.numel() < 1 << 31
    return is_row_major or (
        is_last and all(t.is_contiguous(memory_format=torch.channels_last) for t in (param, *others))
    )


def _are_apart(updates: list[Update]) -> bool:
    """Whether no parameter shares memory with another or with a gradient: then the order of updates matters."""
    tensors = [tensor for _, param, _ in updates for tensor in (param, param.grad) if tensor is not None]
    spans = sorted((tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors)
    return all(start + size <= after for (start, size), (after, _) in pairwise(spans))


def take(optimizer: Optimizer, updates: list[Update]) -> None:
    """Update and mask parameters in one pass: what `updates` found."""
    kind = _kind(optimizer)
    _TAKES[updates[0][1].device.type](kind, optimizer, updates)
    params = [param for _, param, _ in updates]
    moved = [tensor for param in params for tensor in (param, *_states(optimizer, kind, param))]
    increment_version([tensor for tensor in moved if not tensor.is_inference()])  # or autograd would not notice


def _take_on_cpu(kind: Any, optimizer: Optimizer, updates: list[Update]) -> None:
    cpu_step, row, rows = _module("cpu"), _ROWS[kind], []
    for _, same in groupby(updates, lambda update: id(update[2])):
        of_group = list(same)
        group = of_group[0][2]
        place = group["mask_step"], group["mask_seed"], mask.threshold(group["keep_prob"]), _rescale(group)
        for index, param, _ in of_group:
            assert param.grad is not None
            data = param.numel(), param.data_ptr(), param.grad.data_ptr(), group["maximize"], group["weight_decay"]
            rows.append((*data, *row(optimizer, param, group), index, *place))
    cpu_step.step(np.array(rows, cpu_step.SGD if kind is torch.optim.SGD else cpu_step.ADAM))


def _sgd_row(optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> tuple[Any, ...]:
    buffer, is_first = _momentum_buffer(optimizer, param, group)
    address, undamped = (param if buffer is None else buffer).data_ptr(), 1 - group["dampening"]
    return address, is_first, -group["lr"], group["momentum"], undamped, group["nesterov"]


def _adam_row(optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> tuple[Any, ...]:
    state = _moments(optimizer, param, group)
    state["step"] += 1
    step, lr, (beta_1, beta_2) = state["step"].item(), group["lr"], group["betas"]
    moments = state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr()
    decay, root_correction = 1 - lr * group["weight_decay"], (1 - beta_2**step) ** 0.5
    weights, step_size = (1 - beta_1, beta_2, 1 - beta_2), lr / (1 - beta_1**step)
    return *moments, group["decoupled_weight_decay"], decay, *weights, root_correction, group["eps"], -step_size


_ROWS = {torch.optim.SGD: _sgd_row, torch.optim.Adam: _adam_row}


def _take_on_cuda(kind: Any, optimizer: Optimizer, updates: list[Update]) -> None:
    """A launch for each list of tensors that have all their numbers in common: in general one a group."""
    calls: dict[Any, Any] = {}
    own: Any
    for index, param, group in updates:
        if kind is torch.optim.SGD:
            buffer, own = _momentum_buffer(optimizer, param, group)
            tensors = [buffer]
        else:
            state = _moments(optimizer, param, group)
            state["step"] += 1
            tensors = [state["exp_avg"], state["exp_avg_sq"], state["step"]]
            own = None if _counts_on_device(group) else state["step"].item()
        _, lists = calls.setdefault((id(group), own), (group, []))
        lists.append((param, param.grad, *tensors, index))
    for (_, own), (group, lists) in calls.items():
        params, grads, *states, indices = (list(column) for column in zip(*lists, strict=True))
        place = {"seed": group["mask_seed"], "mask_step": group["mask_step"], "rescale": _rescale(group)}
        common = {**place, "limit": mask.threshold(group["keep_prob"])}
        common |= {key: group[key] for key in ("weight_decay", "maximize")}
        common["lr"] = (
            group["lr"].item() if isinstance(group["lr"], Tensor) and not group["lr"].is_cuda else group["lr"]
        )
        if kind is torch.optim.SGD:
            common |= {key: group[key] for key in ("momentum", "dampening", "nesterov")}
            buffers = states[0] if group["momentum"] else []
            _module("cuda").sgd(params, grads, buffers, indices, is_first=own, **common)
        else:
            common |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
            common |= {"eps": group["eps"], "decoupled": group["decoupled_weight_decay"]}
            step = states[2] if own is None else own
            _module("cuda").adam(params, grads, *states[:2], indices, step=step, **common)


_TAKES = {"cpu": _take_on_cpu, "cuda": _take_on_cuda}


def _rescale(group: dict[str, Any]) -> float:
    """0: none."""
    keep_prob = group["keep_prob"]
    return mask.effective_keep_prob(keep_prob) if group["mask_rescale"] and keep_prob < 1.0 else 0.0


def _momentum_buffer(optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """SGD's state as torch makes it, and whether this is its first step: then what the buffer holds does not matter."""
    if group["momentum"] == 0:
        return None, False
    buffer: Tensor | None = optimizer.state[param].get("momentum_buffer")
    if buffer is not None:
        return buffer, False
    buffer = optimizer.state[param]["momentum_buffer"] = torch.empty_like(param)
    return buffer, True


def _moments(optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Adam's state as torch makes it."""
    state: dict[str, Any] = optimizer.state[param]
    if not state:
        device = param.device if _counts_on_device(group) else "cpu"
        is_double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        state["step"] = torch.zeros((), dtype=torch.float64 if is_double else torch.float32, device=device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
    return state


def _counts_on_device(group: dict[str, Any]) -> bool:
    """Whether Adam's `step` is on the parameter's device: torch has it there for its fused and its captured steps."""
    return bool(group.get("fused") or group["capturable"])


_MODULES = {"cpu": "lrd.cpu_step", "cuda": "lrd.cuda_step"}


@cache
def _module(device_type: str) -> Any:
    """The kernels for a kind of device; None where the compiler that they need is missing."""
    try:
        return None if os.environ.get("LRD_FUSED") == "0" else import_module(_MODULES[device_type])
    except ImportError:  # no Numba or no Triton, or none that goes with this NumPy or torch
        return None


@cache
def is_trusted(kind: Any, device: torch.device) -> bool:
    """Whether the kernels do on this device what torch's optimizer does: some steps of odd-sized tensors.

    On a CPU all bits must be torch's, on a CUDA device all values to within rounding.
    """
    if _module(device.type) is None:
        return False
    try:
        return all(trial.agrees(kind, device, options, _TAKES[device.type]) for options in trial.OPTIONS[kind])
    except Exception as error:  # a compiler that does not know this device, for one
        reason = f"{type(error).__name__}: {first_line(error)}"
        warnings.warn(f"no masked step in one pass on {device} ({reason}); it goes on more slowly", stacklevel=2)
        return False
