"""The mask settings of a parameter group: their checks, and the masks that they define."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lrd.optim import mask, mask_targets


def check_settings(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Check a group's settings, which may have been changed since the last step.

    Called before anything moves.

    Raises:
        ValueError: a setting is out of its range, or the optimizer cannot take it.
    """
    mask.check_keep_prob(group["keep_prob"])
    mask.check_seed(group["mask_seed"])
    mask.check_granularity(group["mask_granularity"])
    mask_targets.check_target(optimizer, group, group["masks"])

    if group.get("differentiable"):
        raise ValueError(
            "differentiable must be False: autograd does not see that dropped elements are restored"
        )

    # To look at a tensor's value would be a sync point.
    step = group["mask_step"]
    if not isinstance(step, Tensor) and not 0 <= step < 1 << 64:
        raise ValueError(f"mask_step must be in [0, 2**64), not {step}")


def draw_arguments(group: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`lrd.optim.mask.draw` that a group determines, for its next update.

    Returns:
        ``seed``, ``step`` and ``keep_prob``. The step is a copy where the group counts in a tensor.
    """
    step = group["mask_step"]
    if isinstance(step, Tensor):
        step = step.clone()  # the group's tensor is incremented in place

    return {"seed": group["mask_seed"], "step": step, "keep_prob": group["keep_prob"]}


def draw_mask(index: int, like: Tensor, group: dict[str, Any]) -> Tensor:
    """Draw the mask of a parameter's next update.

    Args:
        index: the parameter's index in the optimizer, counted through its groups.
        like: a tensor of the parameter's shape on its device.
        group: the parameter's group.

    Returns:
        bool tensor on that device, in a shape that broadcasts to ``like``.
    """
    return mask.keep_mask(
        tuple(like.shape),
        seed=group["mask_seed"],
        step=int(group["mask_step"]),
        index=index,
        keep_prob=group["keep_prob"],
        granularity=group["mask_granularity"],
        device=like.device,
    )


def is_zero_lr(lr: float | Tensor | None) -> bool:
    """Whether a learning rate is zero.

    An lr tensor on a device is taken for non-zero: to look would be a CPU-GPU sync point each step.
    """
    if lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        return False

    return bool(lr == 0)
