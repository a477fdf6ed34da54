"""The mask settings of a parameter group: their checks, and the masks that they define."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lrd.optim import mask, mask_targets

INDEX_BY = ("order", "name")

# Module wrappers put these before the names of what they wrap: DDP, torch.compile, FSDP and
# activation checkpointing.
_WRAPPER_PREFIXES = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
)


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


def mask_indices(groups: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The index that each parameter has in the position of its masks.

    It is the parameter's place among all parameters of the optimizer, counted through its groups,
    plus the group's ``mask_first_index``. In a group whose ``mask_index_by`` is ``name`` it is a
    hash of the parameter's name, and so independent of all other parameters.

    Args:
        groups: the optimizer's ``param_groups``.

    Returns:
        For each group, a list with the index of each of its parameters.

    Raises:
        ValueError: a setting is out of its range, a group has no names, or two parameters have the
            same index.
    """
    indices_by_group = []
    n_params_before = 0

    for group in groups:
        n_params = len(group["params"])
        if group.get("mask_index_by", "order") == "name":
            indices = [index_of_name(name) for name in _param_names(group)]
        else:
            first = check_first_index(group.get("mask_first_index", 0)) + n_params_before
            indices = list(range(first, first + n_params))

        indices_by_group.append(indices)
        n_params_before += n_params

    # Counted from zero they are all different.
    if any("mask_first_index" in group or "mask_index_by" in group for group in groups):
        _check_all_different(indices_by_group)
    return indices_by_group


def _check_all_different(indices_by_group: list[list[int]]) -> None:
    all_indices = [index for indices in indices_by_group for index in indices]
    if len(set(all_indices)) < len(all_indices):
        raise ValueError(
            "two parameters of the optimizer have the same index, so they would have the same "
            "masks: groups whose first_index overlap, or names that differ only in a wrapper's "
            "prefix such as 'module.'"
        )


@lru_cache(maxsize=1 << 16)
def index_of_name(name: str) -> int:
    """The index of a parameter whose masks are found by its name, in [0, 2**64).

    It is the first eight bytes, little-endian, of the SHA-256 of the name in UTF-8. What wrappers
    put before names does not count: DDP's ``module.``, for one. Two of a million names have the
    same index with a probability of 3e-8.
    """
    plain_name = name
    for prefix in _WRAPPER_PREFIXES:
        if prefix != "module.":  # a network may have a submodule of this name
            plain_name = plain_name.replace(prefix, "")

    while plain_name.startswith("module."):
        plain_name = plain_name.removeprefix("module.")

    return int.from_bytes(hashlib.sha256(plain_name.encode()).digest()[:8], "little")


def check_index_by(index_by: str) -> str:
    """Return ``index_by``.

    Raises:
        ValueError: it is not one of ``INDEX_BY``.
    """
    if index_by not in INDEX_BY:
        raise ValueError(f"index_by must be one of {', '.join(INDEX_BY)}, not {index_by!r}")

    return index_by


def check_first_index(first_index: int) -> int:
    """Return ``first_index``.

    Raises:
        ValueError: it is not an integer in [0, 2**63).
    """
    is_integer = isinstance(first_index, int) and not isinstance(first_index, bool)
    if not is_integer or not 0 <= first_index < 1 << 63:
        raise ValueError(f"first_index must be an integer in [0, 2**63), not {first_index!r}")

    return first_index


def _param_names(group: dict[str, Any]) -> list[str]:
    names: list[str] | None = group.get("param_names")
    if names is None:
        raise ValueError(
            "index_by='name' needs the names of the parameters: "
            "make the optimizer from model.named_parameters()"
        )
    if len(names) != len(group["params"]):
        raise ValueError("index_by='name': a group has another number of names than of parameters")

    return names


def draw_arguments(group: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`lrd.optim.mask.draw` that a group determines, for its next update.

    Returns:
        ``seed``, ``step`` and ``keep_prob``. The step is a copy where the group counts in a tensor.
    """
    step = group["mask_step"]
    if isinstance(step, Tensor):
        step = step.clone()  # the group's tensor is incremented in place

    return {"seed": group["mask_seed"], "step": step, "keep_prob": group["keep_prob"]}


def is_zero_lr(lr: float | Tensor | None) -> bool:
    """Whether a learning rate is zero.

    An lr tensor on a device is taken for non-zero: to look would be a CPU-GPU sync point each step.
    """
    if lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        return False

    return bool(lr == 0)
