"""Decides which steps are taken over from torch and done in one pass, and does them.

`LRDropout` asks `find_updates` before each step. Where the kernels can do the whole step,
`step_in_one_pass` updates and masks the parameters in the optimizer's own state, and the optimizer
then finds no gradients. Otherwise the optimizer steps by itself, and `LRDropout` restores the
dropped elements. Taken over are SGD, Adam and AdamW on float32 tensors.

The choice affects speed alone. On a CPU the bits are those of torch's for-loop; on a CUDA device
those of torch's `fused=True`. `matches_torch` compares them before the first step. Where they
differ, nothing is taken over and a warning says so.

The environment variable LRD_FUSED, read at each step:
    0: nothing is taken over.
    1: on a CPU small models are taken over too, for which compiling the kernels takes longer than
       they save.
    Not set: on a CPU only steps of at least 2**18 elements, on a CUDA device all.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import groupby, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from lrd.errors import first_line
from lrd.optim import group_settings, mask, mask_targets
from lrd.optim.fused import selftest

# Below this many elements, the second it takes to load Numba is never regained.
_MIN_ELEMENTS_ON_CPU = 1 << 18

# Numbers between these are neither zero nor infinite in float32.
_SMALLEST_NUMBER = 2.0**-126
_LARGEST_NUMBER = 2.0**127

# The memory of other tensor types may not be what it seems: a DTensor, for one, has none.
_TENSOR_TYPES = (Tensor, torch.nn.Parameter)

# The optimizers that the kernels can do, and the state tensors of each parameter. AdamW is a
# subclass of Adam: its step is Adam's, with decoupled weight decay.
_STATE_KEYS: dict[Any, tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
}

_KERNEL_MODULES = {
    "cpu": "lrd.optim.fused.cpu_step",
    "cuda": "lrd.optim.fused.cuda_step",
}


@dataclass(slots=True)
class Update:
    """One parameter's part in the optimizer's next step."""

    index: int  # the parameter's, counted through the optimizer's groups
    param: Tensor  # float32, has a gradient
    group: dict[str, Any]  # the entry of optimizer.param_groups that holds it


# Which steps are taken over


def find_updates(optimizer: Optimizer) -> list[Update]:
    """Decide whether the kernels take over the optimizer's next step, and list its updates.

    They take over all updates or none: what torch refuses in one group it must refuse before
    another group has moved.

    Args:
        optimizer: with the settings of `LRDropout` in its groups.

    Returns:
        One update for each parameter that has a gradient and elements. Empty if the step is not
        taken over.
    """
    user_choice = os.environ.get("LRD_FUSED")
    if user_choice == "0":
        return []

    optimizer_class = _torch_class(optimizer)
    if optimizer_class is None or _is_scaled(optimizer):
        return []

    updates = _list_updates(optimizer)
    if not updates:
        return []

    groups = list({id(update.group): update.group for update in updates}.values())
    if all(group["keep_prob"] == 1.0 for group in groups):
        return []

    device = updates[0].param.device
    if device.type not in _KERNEL_MODULES:
        return []
    if device.type == "cpu" and user_choice != "1" and _is_too_small(updates):
        return []
    if not all(_is_supported_group(group, device) for group in groups):
        return []

    for update in updates:
        states = _state_tensors(optimizer, optimizer_class, update.param)
        if not _is_dense(update.param, [update.param.grad, *states], device):
            return []

    if not _are_apart(updates) or not matches_torch(optimizer_class, device):
        return []
    return updates


def _list_updates(optimizer: Optimizer) -> list[Update]:
    """One update for each parameter that has a gradient and elements."""
    updates: list[Update] = []
    index = 0

    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.numel() > 0:
                updates.append(Update(index, param, group))
            index += 1

    return updates


def _torch_class(optimizer: Optimizer) -> Any:
    """torch.optim.SGD or torch.optim.Adam, if the optimizer's step is that class's; else None."""
    optimizer_class: Any = type(optimizer)
    step = inspect.unwrap(optimizer_class.step)

    for torch_class in _STATE_KEYS:
        if step is inspect.unwrap(torch_class.step):
            # Any torch.compile in the process wraps `_init_group` anew in each class.
            init_group = inspect.unwrap(optimizer_class._init_group)
            has_same_state = init_group is inspect.unwrap(torch_class._init_group)
            return torch_class if has_same_state else None
    return None


def _is_scaled(optimizer: Optimizer) -> bool:
    """Whether a GradScaler leaves unscaling, and the skipping of steps, to torch's kernel."""
    found_inf = getattr(optimizer, "found_inf", None)
    grad_scale = getattr(optimizer, "grad_scale", None)
    return found_inf is not None or grad_scale is not None


def _is_too_small(updates: list[Update]) -> bool:
    """Whether a step on a CPU is so small that loading the kernels takes longer than they save."""
    return sum(update.param.numel() for update in updates) < _MIN_ELEMENTS_ON_CPU


def _is_supported_group(group: dict[str, Any], device: torch.device) -> bool:
    """Whether the kernels can do a group's mask, if it has one, and its arithmetic."""
    if group_settings.is_zero_lr(group["lr"]):
        return False

    is_masked = group["keep_prob"] < 1.0
    is_usual_mask = group["masks"] == "update" and group["mask_granularity"] == "element"
    if is_masked and not is_usual_mask:
        return False

    if device.type == "cpu":
        return _is_supported_on_cpu(group)
    return _is_supported_on_cuda(group, device)


def _is_supported_on_cpu(group: dict[str, Any]) -> bool:
    """Whether the arithmetic is that of torch's for-loop.

    That of torch's `fused=True` depends on the number of threads.
    """
    if any(group.get(key) for key in ("fused", "capturable", "amsgrad", "differentiable")):
        return False

    numbers = [group["lr"], *_hyperparameters(group)]
    if any(isinstance(number, Tensor) for number in numbers):
        return False

    # torch's lerp has another formula for a weight of a half and above.
    if "betas" in group and np.float32(1 - group["betas"][0]) >= 0.5:
        return False

    # torch tests float64 numbers for zero and the kernels float32 numbers: they must agree.
    return all(
        number == 0 or _SMALLEST_NUMBER <= abs(number) <= _LARGEST_NUMBER for number in numbers
    )


def _is_supported_on_cuda(group: dict[str, Any], device: torch.device) -> bool:
    """Whether torch's fused step may be replaced: the user has asked for no other."""
    if group.get("fused") is False:
        return False
    if any(group.get(key) for key in ("foreach", "amsgrad", "differentiable")):
        return False
    if any(isinstance(number, Tensor) for number in _hyperparameters(group)):
        return False

    has_readable_lr = _is_readable(group["lr"], torch.float32, device)
    return has_readable_lr and _is_readable(group["mask_step"], torch.int64, device)


def _is_readable(number: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a launch can take a number: from the host, or from a tensor on the kernels' device.

    Args:
        number: a number or a tensor.
        dtype: what the kernels take a tensor's memory for.
        device: where the parameters lie.
    """
    if not isinstance(number, Tensor) or number.device.type == "cpu":
        return True
    return number.device == device and number.dtype is dtype and number.dim() == 0


def _hyperparameters(group: dict[str, Any]) -> list[Any]:
    """The numbers that a group has, but for its lr."""
    keys = ("weight_decay", "momentum", "dampening", "eps")
    numbers = [group[key] for key in keys if key in group]
    return [*numbers, *group.get("betas", ())]


def _state_tensors(optimizer: Optimizer, optimizer_class: Any, param: Tensor) -> list[Tensor]:
    """The parameter's state tensors of its own shape, as far as it has them."""
    state = optimizer.state.get(param)
    if not state:
        return []

    tensors = [state.get(key) for key in _STATE_KEYS[optimizer_class]]
    return [tensor for tensor in tensors if tensor is not None]


def _is_dense(param: Tensor, others: list[Any], device: torch.device) -> bool:
    """Whether a parameter, its gradient and its states lie in memory in the same, known order.

    Known are row-major and, on a CUDA device, channels_last. All must be float32 tensors of the
    parameter's shape on the device.
    """
    tensors = [param, *others]
    for tensor in tensors:
        # The type comes first: the others may not even be tensors.
        if type(tensor) not in _TENSOR_TYPES:
            return False
        if tensor.dtype is not torch.float32 or tensor.layout is not torch.strided:
            return False
        if tensor.device != device or tensor.shape != param.shape or tensor.is_neg():
            return False
        # A tensor whose storage was freed has no address: FSDP frees the parameters it gathers.
        if tensor.data_ptr() == 0 and tensor.numel() > 0:
            return False

    if all(tensor.is_contiguous() for tensor in tensors):
        return True

    # The CUDA kernels compute an element's place in channels_last with 32 bits.
    if device.type != "cuda" or param.dim() != 4 or param.numel() >= 1 << 31:
        return False
    return all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)


def _are_apart(updates: list[Update]) -> bool:
    """Whether no parameter shares memory with another or with a gradient.

    If one does, the result depends on the order of the updates.
    """
    spans = []  # (address, bytes)
    for update in updates:
        for tensor in (update.param, update.param.grad):
            assert tensor is not None
            spans.append((tensor.data_ptr(), tensor.numel() * tensor.element_size()))
    spans.sort()

    return all(start + size <= next_start for (start, size), (next_start, _) in pairwise(spans))


# The kernels


@cache
def _load_kernels(device_type: str) -> Any:
    """The module with `sgd` and `adam` for a device type; None if its compiler is missing."""
    try:
        return import_module(_KERNEL_MODULES[device_type])
    except ImportError:
        # No Numba or no Triton, or one that does not work with this NumPy or torch.
        return None


@cache
def matches_torch(optimizer_class: Any, device: torch.device) -> bool:
    """Whether the kernels do on this device what torch's optimizer does, tried on a few steps.

    On a CPU all bits must be torch's, on a CUDA device all values to within rounding. If the
    kernels do something else or fail, the user is warned.

    Args:
        optimizer_class: torch.optim.SGD or torch.optim.Adam.
        device: where the parameters lie.
    """

    def one_pass_step(optimizer: Optimizer) -> None:
        _STEPS[optimizer_class, device.type](optimizer, _list_updates(optimizer))

    try:
        if _load_kernels(device.type) is None:
            return False
        if selftest.matches(optimizer_class, device, one_pass_step):
            return True
        reason = f"its results are not those of torch.optim.{optimizer_class.__name__}"
    except Exception as error:
        # For example, the compiler does not support this device, or its library cannot be loaded.
        reason = f"{type(error).__name__}: {first_line(error)}"

    warnings.warn(
        f"the one-pass masked step does not work on {device} ({reason}); "
        "training goes on without it, more slowly",
        stacklevel=mask_targets.stacklevel_of_user(),
    )
    return False


# The step


def step_in_one_pass(optimizer: Optimizer, updates: list[Update]) -> None:
    """Update and mask parameters in one pass over the memory.

    Args:
        optimizer: its state is created and updated as its own step would do it.
        updates: what `find_updates` returned, not empty.
    """
    optimizer_class = _torch_class(optimizer)
    device = updates[0].param.device
    _STEPS[optimizer_class, device.type](optimizer, updates)

    # The kernels write through addresses. Without this, autograd would not notice a change of
    # tensors that a backward pass needs.
    changed = []
    for update in updates:
        changed.append(update.param)
        changed += _state_tensors(optimizer, optimizer_class, update.param)
    increment_version([tensor for tensor in changed if not tensor.is_inference()])


def _sgd_on_cpu(optimizer: Optimizer, updates: list[Update]) -> None:
    """One step of SGD by `cpu_step`: a row for each parameter."""
    rows = []

    for group, group_updates in _by_group(updates):
        group_fields = {
            **_group_fields_on_cpu(group),
            "minus_lr": -group["lr"],
            "momentum": group["momentum"],
            "one_minus_dampening": 1 - group["dampening"],
            "is_nesterov": group["nesterov"],
        }

        for update in group_updates:
            buffer, is_first_step = _momentum_buffer(optimizer, update)
            # Without momentum the kernel does not touch the buffer, but needs a valid address.
            buffer_address = update.param.data_ptr() if buffer is None else buffer.data_ptr()
            rows.append(
                {
                    **group_fields,
                    **_param_fields_on_cpu(update),
                    "momentum_buffer": buffer_address,
                    "is_first_step": is_first_step,
                }
            )

    _load_kernels("cpu").sgd(rows)


def _adam_on_cpu(optimizer: Optimizer, updates: list[Update]) -> None:
    """One step of Adam or AdamW by `cpu_step`: a row for each parameter."""
    rows = []

    for group, group_updates in _by_group(updates):
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        group_fields = {
            **_group_fields_on_cpu(group),
            "is_decoupled": group["decoupled_weight_decay"],
            "decay_factor": 1 - lr * group["weight_decay"],
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "eps": group["eps"],
        }

        for update in group_updates:
            state = _adam_state(optimizer, update)
            state["step"] += 1
            step = state["step"].item()
            rows.append(
                {
                    **group_fields,
                    **_param_fields_on_cpu(update),
                    "exp_avg": state["exp_avg"].data_ptr(),
                    "exp_avg_sq": state["exp_avg_sq"].data_ptr(),
                    # In float64, as torch computes them; the table rounds to float32.
                    "bias_correction2_sqrt": (1 - beta2**step) ** 0.5,
                    "minus_step_size": -(lr / (1 - beta1**step)),
                }
            )

    _load_kernels("cpu").adam(rows)


def _by_group(updates: list[Update]) -> list[tuple[dict[str, Any], list[Update]]]:
    """Each group with its updates, in the order of the updates."""
    group_lists = [list(run) for _, run in groupby(updates, key=lambda update: id(update.group))]
    return [(group_updates[0].group, group_updates) for group_updates in group_lists]


def _group_fields_on_cpu(group: dict[str, Any]) -> dict[str, Any]:
    """The fields of `cpu_kernels` that a group determines, for SGD and Adam."""
    return {
        "is_maximized": group["maximize"],
        "weight_decay": group["weight_decay"],
        "mask_step": int(group["mask_step"]),
        "seed": group["mask_seed"],
        "threshold": mask.threshold(group["keep_prob"]),
        "update_divisor": _update_divisor(group),
    }


def _param_fields_on_cpu(update: Update) -> dict[str, Any]:
    """The fields of `cpu_kernels` that a parameter determines, for SGD and Adam."""
    assert update.param.grad is not None
    return {
        "index": update.index,
        "numel": update.param.numel(),
        "param": update.param.data_ptr(),
        "grad": update.param.grad.data_ptr(),
    }


def _sgd_on_cuda(optimizer: Optimizer, updates: list[Update]) -> None:
    """One step of SGD by `cuda_step`.

    A launch takes a list of tensors that have all numbers in common. In general this is one launch
    for each group; a group whose parameters are not all at their first step needs two.
    """
    kernels = _load_kernels("cuda")
    table_cache = _table_cache_for_next_step(optimizer)

    launches: dict[tuple[int, bool], list[Update]] = {}
    for update in updates:
        _, is_first_step = _momentum_buffer(optimizer, update)
        launches.setdefault((id(update.group), is_first_step), []).append(update)

    for (_, is_first_step), launch in launches.items():
        group = launch[0].group

        momentum_buffers = []
        if group["momentum"]:
            states = [optimizer.state[update.param] for update in launch]
            momentum_buffers = [state["momentum_buffer"] for state in states]

        kernels.sgd(
            params=[update.param for update in launch],
            grads=[update.param.grad for update in launch],
            momentum_buffers=momentum_buffers,
            indices=[update.index for update in launch],
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            is_first_step=is_first_step,
            table_cache=table_cache,
            **_group_arguments_on_cuda(group),
        )


def _adam_on_cuda(optimizer: Optimizer, updates: list[Update]) -> None:
    """One step of Adam or AdamW by `cuda_step`: launches as in `_sgd_on_cuda`.

    Parameters of a group that differ in their number of updates go in launches of their own, except
    where torch keeps these numbers on the device: a launch reads them there.
    """
    kernels = _load_kernels("cuda")
    table_cache = _table_cache_for_next_step(optimizer)

    # One launch counts all parameters whose `step` lies on the device.
    all_states = [_adam_state(optimizer, update) for update in updates]
    torch._foreach_add_([state["step"] for state in all_states], 1)

    launches: dict[tuple[int, float | None], list[Update]] = {}
    for update, state in zip(updates, all_states, strict=True):
        step = None if _is_step_on_device(update.group) else state["step"].item()
        launches.setdefault((id(update.group), step), []).append(update)

    for (_, step), launch in launches.items():
        group = launch[0].group
        beta1, beta2 = group["betas"]
        states = [optimizer.state[update.param] for update in launch]

        kernels.adam(
            params=[update.param for update in launch],
            grads=[update.param.grad for update in launch],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            indices=[update.index for update in launch],
            step=[state["step"] for state in states] if step is None else step,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decoupled=group["decoupled_weight_decay"],
            table_cache=table_cache,
            **_group_arguments_on_cuda(group),
        )


# For each optimizer, the `cuda_step.TableCache` of its tensors. It is freed with the optimizer.
_table_caches: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()


def _table_cache_for_next_step(optimizer: Optimizer) -> Any:
    """The optimizer's `TableCache`, ready for the launches of one more step."""
    table_cache = _table_caches.get(optimizer)
    if table_cache is None:
        table_cache = _load_kernels("cuda").TableCache()
        _table_caches[optimizer] = table_cache

    table_cache.begin_step()
    return table_cache


def _group_arguments_on_cuda(group: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `cuda_step` that a group determines, for SGD and Adam."""
    # Kernels follow the addresses of tensors, so these must not be addresses on the host.
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = lr.item()

    mask_step = group["mask_step"]
    if isinstance(mask_step, Tensor) and mask_step.device.type == "cpu":
        mask_step = int(mask_step)

    return {
        "lr": lr,
        "weight_decay": group["weight_decay"],
        "maximize": group["maximize"],
        "seed": group["mask_seed"],
        "mask_step": mask_step,
        "threshold": mask.threshold(group["keep_prob"]),
        "update_divisor": _update_divisor(group),
    }


def _update_divisor(group: dict[str, Any]) -> float:
    """What a kept element's update is divided by; 0 if it is not divided."""
    keep_prob = group["keep_prob"]
    if not group["mask_rescale"] or keep_prob == 1.0:
        return 0.0
    return mask.effective_keep_prob(keep_prob)


# The optimizer's state


def _momentum_buffer(optimizer: Optimizer, update: Update) -> tuple[Tensor | None, bool]:
    """SGD's momentum buffer, created as torch does it.

    Returns:
        The buffer, None without momentum; and whether this is the parameter's first step, at which
        it does not matter what the buffer holds.
    """
    if update.group["momentum"] == 0:
        return None, False

    state = optimizer.state[update.param]
    buffer: Tensor | None = state.get("momentum_buffer")
    if buffer is not None:
        return buffer, False

    buffer = torch.empty_like(update.param)
    state["momentum_buffer"] = buffer
    return buffer, True


def _adam_state(optimizer: Optimizer, update: Update) -> dict[str, Any]:
    """Adam's state of a parameter, created as torch does it: step, exp_avg and exp_avg_sq."""
    state: dict[str, Any] = optimizer.state[update.param]
    if state:
        return state

    has_float64_step = torch.get_default_dtype() == torch.float64 and not update.group.get("fused")
    state["step"] = torch.zeros(
        (),
        dtype=torch.float64 if has_float64_step else torch.float32,
        device=update.param.device if _is_step_on_device(update.group) else "cpu",
    )
    state["exp_avg"] = torch.zeros_like(update.param)
    state["exp_avg_sq"] = torch.zeros_like(update.param)
    return state


def _is_step_on_device(group: dict[str, Any]) -> bool:
    """Whether Adam's `step` lies on the parameter's device.

    torch has it there for its fused steps and for those that a CUDA graph captures.
    """
    return bool(group.get("fused") or group["capturable"])


_STEPS: dict[tuple[Any, str], Callable[[Optimizer, list[Update]], None]] = {
    (torch.optim.SGD, "cpu"): _sgd_on_cpu,
    (torch.optim.Adam, "cpu"): _adam_on_cpu,
    (torch.optim.SGD, "cuda"): _sgd_on_cuda,
    (torch.optim.Adam, "cuda"): _adam_on_cuda,
}
