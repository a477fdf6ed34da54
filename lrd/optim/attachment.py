"""Which optimizers LRDropout can attach to, and which it refuses.

Everything is checked before anything of the optimizer is changed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrd.optim import mask_targets

# Wrappers whose step is that of the optimizer inside, with other things around it: LRDropout
# attaches to that one. (package, class) -> the attribute that holds it.
_TRANSPARENT_WRAPPERS = {
    ("accelerate", "AcceleratedOptimizer"): "optimizer",
    ("lightning", "LightningOptimizer"): "_optimizer",
    ("pytorch_lightning", "LightningOptimizer"): "_optimizer",
    ("lightning", "_FabricOptimizer"): "_optimizer",
    ("lightning_fabric", "_FabricOptimizer"): "_optimizer",
    ("pytorch_optimizer", "OrthoGrad"): "optimizer",
}

# What torch.optim.Optimizer.__init__ makes, and LRDropout uses.
_ATTRIBUTES = (
    "defaults",
    "param_groups",
    "state",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

# Schedule-free optimizers (Defazio et al., arXiv 2405.15682) keep a second copy of the parameters.
_SCHEDULE_FREE = (
    "SGDScheduleFree",
    "AdamWScheduleFree",
    "RAdamScheduleFree",
    "SGDScheduleFreeClosure",
    "AdamWScheduleFreeClosure",
    "RAdamScheduleFreeClosure",
    "SGDScheduleFreeReference",
    "AdamWScheduleFreeReference",
    "ScheduleFreeSGD",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
)

# The code of the function that torch puts around the step of each class. It runs the hooks.
_STEP_CODE = Optimizer.profile_hook_step(Optimizer.step).__code__

_LBFGS_REFUSAL = (
    "LBFGS cannot take learning rate dropout: its step evaluates the loss several times along a "
    "line and keeps differences of iterates, and neither has a meaning when dropped elements are "
    "restored afterwards"
)
_FSDP1_REFUSAL = (
    "parameters of FullyShardedDataParallel (FSDP1) cannot be masked: each rank holds a flat piece "
    "of several parameters, whose elements' positions are not known. "
    "Use FSDP2, torch.distributed.fsdp.fully_shard, whose masks are those of one process"
)
_ZERO_REFUSAL = (
    "ZeroRedundancyOptimizer gives each rank an optimizer of a part of the parameters, in which "
    "they are counted anew: the masks would not be those of DDP. Attach LRDropout to the "
    "ZeroRedundancyOptimizer itself: LRDropout(ZeroRedundancyOptimizer(..., "
    "optimizer_class=torch.optim.{name}))"
)


def find_stepping_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer whose step runs the hooks: the one given, or the one in a known wrapper.

    Raises:
        TypeError: it is no torch optimizer.
        ValueError: its step runs no hooks.
    """
    optimizer = inside_of_wrapper(optimizer)
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer) and not _inner_optimizers(optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {name}")

    # torch.optim.Optimizer.__init__ makes the class's step run the hooks.
    runs_hooks = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    has_hooks = all(hasattr(optimizer, attribute) for attribute in _ATTRIBUTES)
    if isinstance(optimizer, Optimizer) and runs_hooks and has_hooks:
        return optimizer

    where = ", ".join(f".{attribute}" for attribute, _ in _inner_optimizers(optimizer))
    advice = f"to the optimizer inside it ({where})" if where else "to an optimizer inside it"
    raise ValueError(
        f"{name} runs not all of torch's hooks, because it does not call "
        "torch.optim.Optimizer.__init__: LRDropout cannot mask its steps. "
        f"Attach LRDropout {advice}; what {name} itself moves is then not masked"
    )


def inside_of_wrapper(optimizer: Any) -> Any:
    """The optimizer inside a known wrapper, or in one inside it; any other object itself."""
    for cls in type(optimizer).__mro__:
        package = cls.__module__.partition(".")[0]
        attribute = _TRANSPARENT_WRAPPERS.get((package, cls.__name__))
        if attribute is not None:
            return inside_of_wrapper(getattr(optimizer, attribute))

    return optimizer


def _inner_optimizers(optimizer: Any) -> list[tuple[str, Optimizer]]:
    """(attribute, optimizer) of the optimizers that an object holds."""
    attributes = getattr(optimizer, "__dict__", {})
    return [(name, value) for name, value in attributes.items() if isinstance(value, Optimizer)]


def check_optimizer(optimizer: Optimizer, masks: str) -> None:
    """Check that an optimizer can take such masks, and warn if they are a known fault.

    Raises:
        ValueError: it cannot.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(_LBFGS_REFUSAL)
    if _is_made_by_zero():
        raise ValueError(_ZERO_REFUSAL.format(name=name))
    if hasattr(optimizer, "fused_backward"):
        raise ValueError(
            f"{name} cannot take learning rate dropout: its fused_backward moves the parameters "
            "during the backward pass, and not in step()"
        )
    if "ScheduleFree" in name and name not in _SCHEDULE_FREE:
        raise ValueError(
            f"{name} cannot take learning rate dropout: which of its states follow the parameters "
            f"is not known. Known are {', '.join(_SCHEDULE_FREE)}"
        )

    for group in optimizer.param_groups:
        mask_targets.check_target(optimizer, group, masks)
        for param in group["params"]:
            check_param(param)

    if masks == "momentum_buffer":
        mask_targets.warn_of_momentum_buffer()


def check_param(param: Tensor) -> None:
    """Check that the positions of a parameter's elements are known.

    Raises:
        ValueError: it belongs to FSDP1.
    """
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(_FSDP1_REFUSAL)


def is_inside_outer_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer's hooks are called once more in one and the same step.

    torch makes the step of each class run the hooks. So they run twice where a class's step calls
    its parent's, if there has been an optimizer of the parent class too.

    Raises:
        RuntimeError: it cannot be known, because the step was compiled.
    """
    n_steps = 0
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _STEP_CODE and frame.f_locals.get("self") is optimizer:
            n_steps += 1

    hooked_classes = [
        cls for cls in type(optimizer).__mro__ if getattr(vars(cls).get("step"), "hooked", False)
    ]
    if n_steps == 0 and len(hooked_classes) > 1:
        raise RuntimeError(
            f"the compiled step of {type(optimizer).__name__} runs the hooks of "
            f"{len(hooked_classes)} classes: LRDropout cannot tell how often. Do not compile it"
        )
    return n_steps > 1


def _is_made_by_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer is making its local optimizer."""
    zero_module = "torch.distributed.optim.zero_redundancy_optimizer"
    if zero_module not in sys.modules:
        return False

    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        is_zero = frame.f_globals.get("__name__") == zero_module
        if is_zero and frame.f_code.co_name == "_init_local_optimizer":
            return True
    return False


def states_that_follow(optimizer: Optimizer) -> tuple[str, ...]:
    """The states that are copies of the parameters: dropped elements are restored in them too.

    A schedule-free optimizer holds y = (1 - beta) z + beta x and z, and evaluates x. An element
    with learning rate zero makes no step of z and gives its average x no weight. So in dropped
    elements y and z stay, and with them x::

        kept:     (x, y, z) <- one step of the optimizer
        dropped:  (x, y, z) <- (x, y, z)
    """
    return ("z", "x", "y") if type(optimizer).__name__ in _SCHEDULE_FREE else ()


def inner_optimizers_of_same_parameters(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that an optimizer holds, and that move its parameters: SAM's, for one."""
    param_ids = {id(param) for group in optimizer.param_groups for param in group["params"]}

    return [
        inner
        for _, inner in _inner_optimizers(optimizer)
        if any(id(param) in param_ids for group in inner.param_groups for param in group["params"])
    ]
