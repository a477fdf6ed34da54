"""Decides which steps are taken over from torch and done in one pass, and does them.

`LRDropout` asks `find_updates` before each step. Where the kernels can do the whole step,
`step_in_one_pass` updates and masks the parameters in the optimizer's own state, and the optimizer
then finds no gradients. Otherwise the optimizer steps by itself, and `LRDropout` restores the
dropped elements. Taken over are SGD, Adam and AdamW on float32 tensors.

The choice affects speed alone. On a CPU the bits are those of torch's for-loop; on a CUDA device
those of torch's `fused=True`. `matches_torch` compares them before the first step. Where they
differ, nothing is taken over and a warning says so.

There is one exception. On a CPU, the rounding of torch's `fused=True` depends on the number of
threads, so the kernels cannot follow it. A user who asks for it asks for speed: such steps are
taken over too, with the for-loop's bits, which are torch's fused ones to within rounding.

`loading` decides from which step on small models are taken over. LRD_FUSED=0 switches it all off.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from lrd.errors import first_line, stacklevel_of_user
from lrd.optim import group_settings, mask, placement
from lrd.optim.fused import loading, selftest
from lrd.optim.placement import Placement

# Numbers between these are neither zero nor infinite in float32.
_SMALLEST_NUMBER = 2.0**-126
_LARGEST_NUMBER = 2.0**127

# The memory of other tensor types may not be what it seems.
_TENSOR_TYPES = (Tensor, torch.nn.Parameter)

# The optimizers that the kernels can do, and the state tensors of each parameter. AdamW is a
# subclass of Adam: its step is Adam's, with decoupled weight decay.
_STATE_KEYS: dict[Any, tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
}


@dataclass(slots=True)
class Update:
    """One parameter's part in the optimizer's next step."""

    index: int  # the parameter's, in the position of its masks
    param: Tensor  # has a gradient; may be a DTensor
    group: dict[str, Any]  # the entry of optimizer.param_groups that holds it
    placement: Placement | None  # of `tensor` in the whole parameter; None: it is the whole

    # Plain float32 tensors: the memory that the kernels read and write
    tensor: Tensor  # to be updated. Usually `param` itself
    grad: Tensor
    states: list[Tensor]  # in the order of `_STATE_KEYS`, as far as they exist
    addresses: list[int]  # of `tensor`, `grad` and `states`


# Which steps are taken over


def find_updates(optimizer: Optimizer, params: Iterable[Any] | None = None) -> list[Update]:
    """Decide whether the kernels take over the optimizer's next step, and list its updates.

    They take over all updates or none: what torch refuses in one group it must refuse before
    another group has moved. Call it without autograd, and do nothing between it and
    `step_in_one_pass`: it checks the memory that the kernels will read and write.

    Args:
        optimizer: with the settings of `LRDropout` in its groups.
        params: of each parameter that has elements, its `group_number`, `mask_index`, `param` and
            `placement`. None: they are taken from the groups.

    Returns:
        One update for each parameter that has a gradient and elements. Empty if the step is not
        taken over.
    """
    user_choice = loading.user_choice()
    if user_choice == "0":
        return []
    if not _has_mask(optimizer.param_groups):
        return []

    torch_class = stock_class(optimizer)
    if torch_class is None or _is_scaled(optimizer):
        return []

    updates = _list_updates(optimizer, torch_class, params)
    if not updates:
        return []

    device = updates[0].tensor.device
    if device.type not in ("cpu", "cuda") or not _are_apart(updates):
        return []

    groups = [updates[first].group for first, _ in _group_ranges(updates)]
    if not _has_mask(groups):
        return []
    for group in groups:
        if not _is_supported_group(torch_class, group, device):
            return []

    # What the user has marked as fused is taken over whatever its size.
    numels = (update.tensor.numel() for update in updates)
    is_due = loading.is_due(device.type, numels, user_choice)
    if not is_due and not any(group.get("fused") for group in groups):
        return []
    return updates if matches_torch(torch_class, device) else []


def _has_mask(groups: list[dict[str, Any]]) -> bool:
    """Whether any group drops elements."""
    return any(group["keep_prob"] != 1.0 for group in groups)


def _list_updates(
    optimizer: Optimizer, torch_class: Any, params: Iterable[Any] | None = None
) -> list[Update]:
    """One update for each parameter that has a gradient and elements.

    Returns:
        Empty if the kernels cannot do all of them.
    """
    groups = optimizer.param_groups
    if params is None:
        params = _list_params(groups)

    updates: list[Update] = []
    device = None
    for item in params:
        if item.param.grad is None:
            continue

        update = _find_update(item, groups[item.group_number], optimizer.state, torch_class)
        if update is None:
            return []
        if update.addresses:  # else all elements are on other ranks
            updates.append(update)

        device = update.tensor.device if device is None else device
        if update.tensor.device != device:
            return []

    return updates


def _group_ranges(updates: list[Update]) -> list[tuple[int, int]]:
    """For each group, the number of its first update, and of the update after its last."""
    # Updates come in the order of the groups.
    if updates[0].group is updates[-1].group:
        return [(0, len(updates))]

    firsts = [
        number
        for number, update in enumerate(updates)
        if number == 0 or update.group is not updates[number - 1].group
    ]
    return list(pairwise([*firsts, len(updates)]))


@dataclass(slots=True)
class _Param:
    group_number: int
    mask_index: int
    param: Tensor
    placement: Placement | None


def _list_params(groups: Sequence[dict[str, Any]]) -> list[_Param]:
    """The parameters that have elements."""
    params = []
    indices_by_group = group_settings.mask_indices(groups)

    for number, group in enumerate(groups):
        for index, param in zip(indices_by_group[number], group["params"], strict=True):
            if param.numel() > 0:
                params.append(_Param(number, index, param, placement.of_parameter(param)))

    return params


def stock_class(optimizer: Optimizer) -> Any:
    """torch.optim.SGD or torch.optim.Adam, if the optimizer's step is that class's; else None."""
    optimizer_class: Any = type(optimizer)
    return _torch_class_of(optimizer_class.step, getattr(optimizer_class, "_init_group", None))


@lru_cache(maxsize=64)
def _torch_class_of(step: Any, init_group: Any) -> Any:
    """The class of torch's whose methods these are; None if there is none."""
    for torch_class in _STATE_KEYS:
        if inspect.unwrap(step) is inspect.unwrap(torch_class.step):
            # Any torch.compile in the process wraps `_init_group` anew in each class.
            has_same_state = inspect.unwrap(init_group) is inspect.unwrap(torch_class._init_group)
            return torch_class if has_same_state else None
    return None


def calls_closure_first(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step calls its closure once, before anything else."""
    return stock_class(optimizer) is not None


def _is_scaled(optimizer: Optimizer) -> bool:
    """Whether a GradScaler leaves unscaling, and the skipping of steps, to torch's kernel."""
    found_inf = getattr(optimizer, "found_inf", None)
    grad_scale = getattr(optimizer, "grad_scale", None)
    return found_inf is not None or grad_scale is not None


def _is_supported_group(torch_class: Any, group: dict[str, Any], device: torch.device) -> bool:
    """Whether the kernels can do a group's mask, if it has one, and its arithmetic."""
    if device.type == "cpu":
        return _numbers_on_cpu(torch_class, group) is not None
    return _has_usual_mask(group) and _is_supported_on_cuda(group, device)


def _has_usual_mask(group: dict[str, Any]) -> bool:
    """Whether a group's lr is not zero, and its mask is one of elements, if it has one."""
    if group_settings.is_zero_lr(group["lr"]):
        return False

    is_masked = group["keep_prob"] < 1.0
    is_usual_mask = group["masks"] == "update" and group["mask_granularity"] == "element"
    return is_usual_mask or not is_masked


def _is_supported_on_cpu(group: dict[str, Any]) -> bool:
    """Whether the arithmetic is that of torch's for-loop, or of `fused=True`, see above."""
    if any(group.get(key) for key in ("capturable", "amsgrad", "differentiable")):
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


def _find_update(
    item: Any, group: dict[str, Any], all_states: dict[Tensor, Any], torch_class: Any
) -> Update | None:
    """Find the memory that the kernels read and write for a parameter, and check it.

    A parameter, its gradient and its states must lie in memory in the same, known order. Known are
    row-major and, on a CUDA device, channels_last. All must be float32 tensors of the parameter's
    shape on its device. Only the state tensors that exist are found.

    Args:
        item: the parameter, see `find_updates`. It has a gradient.
        group: the parameter's.
        all_states: of the optimizer.
        torch_class: torch.optim.SGD or torch.optim.Adam.

    Returns:
        None if the kernels cannot do this update.
    """
    param = item.param
    tensors: list[Any] = [param, param.grad]

    state = all_states.get(param)
    if state:
        for key in _STATE_KEYS[torch_class]:
            tensor = state.get(key)
            if tensor is not None:
                tensors.append(tensor)

        if torch_class is torch.optim.Adam:
            # The state is complete or, for torch too, an error.
            is_complete = len(tensors) == 4 and isinstance(state.get("step"), Tensor)
            if not is_complete:
                return None

    if placement.is_dtensor(param):
        if not all(placement.is_placed_alike(param, tensor) for tensor in tensors):
            return None
        tensors = [placement.local(tensor) for tensor in tensors]

    memory = tensors[0]
    device = memory.device
    shape = memory.shape
    is_row_major = True
    addresses = []

    for tensor in tensors:
        # The type comes first: the others may not even be tensors.
        if type(tensor) not in _TENSOR_TYPES:
            return None
        if tensor.dtype is not torch.float32 or tensor.layout is not torch.strided:
            return None
        if tensor.device != device or tensor.shape != shape or tensor.is_neg():
            return None
        if not tensor.is_contiguous():
            is_row_major = False
        addresses.append(tensor.data_ptr())

    if 0 in addresses:
        # A tensor without elements has no address, and neither has one whose storage was freed, as
        # FSDP frees the parameters that it gathers.
        if memory.numel() > 0:
            return None
        addresses = []

    # The CUDA kernels know nothing of parts of a parameter.
    if not memory.is_cpu:
        if item.placement is not None or not (is_row_major or _is_channels_last(tensors)):
            return None
    elif not is_row_major:
        return None

    return Update(
        index=item.mask_index,
        param=param,
        group=group,
        placement=item.placement,
        tensor=memory,
        grad=tensors[1],
        states=tensors[2:],
        addresses=addresses,
    )


def _is_channels_last(tensors: list[Tensor]) -> bool:
    """Whether all tensors are in channels_last, and small enough for the CUDA kernels.

    These compute an element's place with 32 bits.
    """
    if tensors[0].dim() != 4 or tensors[0].numel() >= 1 << 31:
        return False
    return all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)


def _are_apart(updates: list[Update]) -> bool:
    """Whether no parameter shares memory with another or with a gradient.

    If one does, the result depends on the order of the updates.
    """
    spans = []  # (address, address after the end)
    for update in updates:
        n_bytes = update.tensor.numel() * 4
        param_address, grad_address = update.addresses[:2]
        spans.append((param_address, param_address + n_bytes))
        spans.append((grad_address, grad_address + n_bytes))
    spans.sort()

    end_of_last = 0
    for start, stop in spans:
        if start < end_of_last:
            return False
        end_of_last = stop
    return True


# The kernels

_load_kernels = loading.load_kernels


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
        updates = _list_updates(optimizer, optimizer_class)
        _STEPS[optimizer_class, device.type](optimizer, updates)

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
        stacklevel=stacklevel_of_user(),
    )
    return False


# The step


def step_in_one_pass(optimizer: Optimizer, updates: list[Update]) -> None:
    """Update and mask parameters in one pass over the memory.

    Args:
        optimizer: its state is created and updated as its own step would do it.
        updates: what `find_updates` has just returned, not empty.
    """
    device = updates[0].tensor.device
    _STEPS[stock_class(optimizer), device.type](optimizer, updates)

    # The kernels write through addresses. Without this, autograd would not notice a change of
    # tensors that a backward pass needs. States that are new cannot be part of any.
    changed = []
    for update in updates:
        changed += [update.tensor, *update.states]
        if update.tensor is not update.param:
            changed.append(update.param)  # a DTensor has a version of its own
    increment_version([tensor for tensor in changed if not tensor.is_inference()])


# For each optimizer, the `cpu_step.Table` of its latest step. It is freed with the optimizer.
_tables_on_cpu: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()


def _table_on_cpu(optimizer: Optimizer, torch_class: Any, updates: list[Update]) -> Any:
    """The table of an optimizer's next step on a CPU, with the numbers of its groups.

    It is that of the latest step where tensors of the same sizes are updated in the same groups.
    """
    parts = [(update.index, update.tensor.numel(), update.placement) for update in updates]
    group_ranges = _group_ranges(updates)

    table = _tables_on_cpu.get(optimizer)
    if table is None or not table.fits(parts, group_ranges):
        kernels = _load_kernels("cpu")
        kernel = kernels.SGD if torch_class is torch.optim.SGD else kernels.ADAM
        table = kernels.Table(kernel, parts, group_ranges)
        _tables_on_cpu[optimizer] = table

    for number, (first, _) in enumerate(group_ranges):
        group = updates[first].group
        numbers = _numbers_on_cpu(torch_class, group)
        table.set_group_numbers(number, numbers, int(group["mask_step"]))

    return table


def _sgd_on_cpu(optimizer: Optimizer, updates: list[Update]) -> None:
    """One step of SGD by `cpu_step`."""
    table = _table_on_cpu(optimizer, torch.optim.SGD, updates)

    are_first_steps = []
    for update in updates:
        is_first_step = False

        if update.group["momentum"] == 0:
            # The kernel does not touch the buffer, but needs a valid address.
            update.addresses[2:] = update.addresses[:1]
        elif not update.states:
            buffer, is_first_step = _momentum_buffer(optimizer, update)
            assert buffer is not None
            update.addresses.append(buffer.data_ptr())

        are_first_steps.append(is_first_step)

    table.set_tensor_numbers("is_first_step", are_first_steps)
    table.run([update.addresses for update in updates])


def _adam_on_cpu(optimizer: Optimizer, updates: list[Update]) -> None:
    """One step of Adam or AdamW by `cpu_step`."""
    table = _table_on_cpu(optimizer, torch.optim.Adam, updates)

    states = [_adam_state(optimizer, update) for update in updates]
    step_tensors = [state["step"] for state in states]
    torch._foreach_add_(step_tensors, 1)
    steps = [step.item() for step in step_tensors]

    bias_corrections2_sqrt = []
    minus_step_sizes = []
    for first, stop in _group_ranges(updates):
        group = updates[first].group
        lr = group["lr"]
        beta1, beta2 = group["betas"]

        # In float64, as torch computes them; the table rounds to float32.
        for number in range(first, stop):
            step = steps[number]
            if number == first or step != steps[number - 1]:
                bias_correction2_sqrt = (1 - beta2**step) ** 0.5
                minus_step_size = -(lr / (1 - beta1**step))
            bias_corrections2_sqrt.append(bias_correction2_sqrt)
            minus_step_sizes.append(minus_step_size)

    table.set_tensor_numbers("bias_correction2_sqrt", bias_corrections2_sqrt)
    table.set_tensor_numbers("minus_step_size", minus_step_sizes)
    for update, state in zip(updates, states, strict=True):
        if not update.states:  # they have just been created
            for key in _STATE_KEYS[torch.optim.Adam]:
                update.addresses.append(placement.local(state[key]).data_ptr())

    table.run([update.addresses for update in updates])


_SETTINGS_OF_BOTH = (
    "lr",
    "weight_decay",
    "maximize",
    "differentiable",
    "keep_prob",
    "mask_seed",
    "mask_rescale",
    "mask_granularity",
    "masks",
)

# What the kernels need to know of a group, besides its mask step.
_SETTINGS: dict[Any, tuple[str, ...]] = {
    torch.optim.SGD: (*_SETTINGS_OF_BOTH, "momentum", "dampening", "nesterov"),
    torch.optim.Adam: (
        *_SETTINGS_OF_BOTH,
        "betas",
        "eps",
        "amsgrad",
        "capturable",
        "decoupled_weight_decay",
    ),
}
_get_settings = {key: itemgetter(*names) for key, names in _SETTINGS.items()}


def _numbers_on_cpu(torch_class: Any, group: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of `cpu_kernels` that a group determines, but for its mask step.

    Returns:
        The same dictionary as long as the settings are the same. None if the kernels do not support
        the group.
    """
    settings = _get_settings[torch_class](group)
    try:
        return _numbers_of_settings(torch_class, settings)
    except TypeError:  # a list cannot be hashed: betas, for one
        return _numbers_of_settings.__wrapped__(torch_class, settings)


@lru_cache(maxsize=1024)
def _numbers_of_settings(torch_class: Any, settings: tuple[Any, ...]) -> dict[str, Any] | None:
    """The numbers of `_numbers_on_cpu`, for settings in the order of `_SETTINGS`."""
    group = dict(zip(_SETTINGS[torch_class], settings, strict=True))
    if not _is_supported_on_cpu(group) or not _has_usual_mask(group):
        return None

    numbers = {
        "is_maximized": group["maximize"],
        "weight_decay": group["weight_decay"],
        "seed": group["mask_seed"],
        "threshold": mask.threshold(group["keep_prob"]),
        "update_divisor": _update_divisor(group),
    }
    if torch_class is torch.optim.SGD:
        return numbers | {
            "minus_lr": -group["lr"],
            "momentum": group["momentum"],
            "one_minus_dampening": 1 - group["dampening"],
            "is_nesterov": group["nesterov"],
        }

    beta1, beta2 = group["betas"]
    return numbers | {
        "is_decoupled": group["decoupled_weight_decay"],
        "decay_factor": 1 - group["lr"] * group["weight_decay"],
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "eps": group["eps"],
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
            momentum_buffers = _local_states(optimizer, launch, "momentum_buffer")

        kernels.sgd(
            params=[update.tensor for update in launch],
            grads=[update.grad for update in launch],
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
        steps_on_device = [optimizer.state[update.param]["step"] for update in launch]

        kernels.adam(
            params=[update.tensor for update in launch],
            grads=[update.grad for update in launch],
            exp_avgs=_local_states(optimizer, launch, "exp_avg"),
            exp_avg_sqs=_local_states(optimizer, launch, "exp_avg_sq"),
            indices=[update.index for update in launch],
            step=steps_on_device if step is None else step,
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
        The buffer's memory, None without momentum; and whether this is the parameter's first step,
        at which it does not matter what the buffer holds.
    """
    if update.group["momentum"] == 0:
        return None, False

    state = optimizer.state[update.param]
    buffer: Tensor | None = state.get("momentum_buffer")
    is_first_step = buffer is None
    if buffer is None:
        buffer = torch.empty_like(update.param)
        state["momentum_buffer"] = buffer

    return placement.local(buffer), is_first_step


def _adam_state(optimizer: Optimizer, update: Update) -> dict[str, Any]:
    """Adam's state of a parameter, created as torch does it: step, exp_avg and exp_avg_sq."""
    state: dict[str, Any] = optimizer.state[update.param]
    if state:
        return state

    has_float64_step = torch.get_default_dtype() == torch.float64 and not update.group.get("fused")
    state["step"] = torch.zeros(
        (),
        dtype=torch.float64 if has_float64_step else torch.float32,
        device=update.tensor.device if _is_step_on_device(update.group) else "cpu",
    )
    state["exp_avg"] = torch.zeros_like(update.param)
    state["exp_avg_sq"] = torch.zeros_like(update.param)
    return state


def _local_states(optimizer: Optimizer, updates: list[Update], key: str) -> list[Tensor]:
    """The memory of a state tensor of each parameter."""
    return [placement.local(optimizer.state[update.param][key]) for update in updates]


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
