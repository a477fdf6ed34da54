"""What a parameter group says of its masks: checks, and the place that it gives them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lrd import controls, mask


def check(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Before anything moves: a group's settings may have been changed since the last step."""
    mask.check_keep_prob(group["keep_prob"])
    mask.check_seed(group["mask_seed"])
    mask.check_granularity(group["mask_granularity"])
    controls.check_group(optimizer, group, group["masks"])
    if group.get("differentiable"):
        raise ValueError("differentiable must be False: a dropped element is put back behind autograd's back")
    step = group["mask_step"]
    if not isinstance(step, Tensor) and not 0 <= step < 1 << 64:  # to look at a tensor's value would be a sync point
        raise ValueError(f"mask_step must be in [0, 2**64), not {step}")


def position(group: dict[str, Any]) -> dict[str, Any]:
    """Where the masks of a group's next update stand: arguments of `lrd.mask`, all but the parameter's index."""
    step = group["mask_step"].clone() if isinstance(group["mask_step"], Tensor) else group["mask_step"]
    return {"seed": group["mask_seed"], "step": step, "keep_prob": group["keep_prob"]}


def draw(index: int, like: Tensor, group: dict[str, Any]) -> Tensor:
    """The mask of the next update of a parameter, in a shape that broadcasts to `like` and on its device."""
    place, granularity = {**position(group), "step": int(group["mask_step"])}, group["mask_granularity"]
    return mask.keep_mask(tuple(like.shape), index=index, granularity=granularity, device=like.device, **place)


def is_zero(lr: float | Tensor | None) -> bool:
    """An lr tensor on a device is taken for non-zero: to look would be a CPU-GPU sync point each step."""
    if lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        return False
    return bool(lr == 0)
