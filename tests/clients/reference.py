"""A reference of the masks that shares no code with lrd, and optimizers that are masked by it.

The mask follows the docstring of lrd/optim/mask.py. It is computed with Python's integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD = (1 << 64) - 1
_MASK_DOMAIN = 0


@functools.lru_cache(maxsize=1 << 16)
def philox_block(counter: tuple[int, int, int, int], key: tuple[int, int]) -> int:
    """The 256 bits of Philox4x64-10, with the first word's in the lowest places."""
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key

    for _ in range(10):
        product_0 = _MULTIPLIERS[0] * word_0
        product_1 = _MULTIPLIERS[1] * word_2
        word_0 = product_1 >> 64 ^ word_1 ^ key_0
        word_1 = product_1 & _WORD
        word_2 = product_0 >> 64 ^ word_3 ^ key_1
        word_3 = product_0 & _WORD
        key_0 = key_0 + _WEYL[0] & _WORD
        key_1 = key_1 + _WEYL[1] & _WORD

    return word_0 | word_1 << 64 | word_2 << 128 | word_3 << 192


def keeps(numel: int, *, seed: int, step: int, index: int, keep_prob: float) -> Tensor:
    """Whether each element of a flattened parameter keeps its learning rate.

    Returns:
        bool tensor of shape (numel,).
    """
    threshold = max(1, round(keep_prob * 2**16))
    if threshold == 2**16:
        return torch.ones(numel, dtype=torch.bool)

    # Below the threshold's lowest set bit, u's bits decide nothing.
    n_planes = 16 - ((threshold & -threshold).bit_length() - 1)
    limit = threshold >> (16 - n_planes)

    kept: list[bool] = []
    for block in range(-(-numel // 256)):
        planes = [
            philox_block((block, plane, index, step), (seed, _MASK_DOMAIN))
            for plane in range(n_planes)
        ]
        for element in range(256):
            u = 0
            for plane_bits in planes:
                u = u << 1 | plane_bits >> element & 1
            kept.append(u < limit)

    return torch.tensor(kept[:numel], dtype=torch.bool)


def keep_mask(param: Tensor, **position: Any) -> Tensor:
    """The mask of one parameter, in its shape."""
    return keeps(param.numel(), **position).view(param.shape)


def all_params(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer in the order in which they are counted."""
    return [param for group in optimizer.param_groups for param in group["params"]]


@torch.no_grad()
def restore_dropped(
    params: list[Tensor], old_values: list[Tensor], *, first_index: int = 0, **position: Any
) -> None:
    """Give the dropped elements of parameters their old values."""
    for index, (param, old) in enumerate(zip(params, old_values, strict=True), first_index):
        param.copy_(torch.where(keep_mask(param, index=index, **position), param, old))


def values(params: list[Tensor]) -> list[Tensor]:
    """Copies of the values of parameters."""
    return [param.detach().clone() for param in params]


def step_by_hand(
    optimizer: Optimizer,
    *,
    step: int,
    keep_prob: float = 0.5,
    seed: int = 0,
    take_step: Callable[[], Any] | None = None,
) -> Any:
    """Learning rate dropout as one writes it by hand, for a stock optimizer.

    Args:
        optimizer: the stock optimizer.
        step: number of updates before this one.
        keep_prob: probability that an element moves.
        seed: seed of the masks.
        take_step: takes the stock optimizer's step, by default ``optimizer.step``.

    Returns:
        What the stock step returned.
    """
    params = all_params(optimizer)
    old_values = values(params)
    result = (take_step or optimizer.step)()
    restore_dropped(params, old_values, seed=seed, step=step, keep_prob=keep_prob)
    return result


def masked_by_hand(
    optimizer_class: type[Optimizer], *, keep_prob: float = 0.5, seed: int = 0
) -> type[Optimizer]:
    """A class of optimizers that are masked by hand, to be given to somebody's trainer.

    An update counts where its lr is not 0, as it does with ``LRDropout`` for these optimizers.
    """

    class MaskedByHand(optimizer_class):  # type: ignore[valid-type, misc]
        updates_done = 0

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            result = step_by_hand(
                self,
                step=self.updates_done,
                keep_prob=keep_prob,
                seed=seed,
                take_step=lambda: super(MaskedByHand, self).step(closure),
            )
            self.updates_done += any(group["lr"] != 0 for group in self.param_groups)
            return result

    MaskedByHand.__name__ = optimizer_class.__name__
    return MaskedByHand


def octets(tensor: Tensor) -> Tensor:
    """The memory of a tensor in row-major order, uint8 (octets,)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(params: list[Tensor], others: list[Tensor]) -> None:
    """Two lists of tensors are the same bit for bit; NaN equals itself, and -0.0 is not 0.0."""
    assert len(params) == len(others)
    for param, other in zip(params, others, strict=True):
        assert param.dtype == other.dtype
        assert param.shape == other.shape
        assert torch.equal(octets(param), octets(other))


def fraction_equal(params: list[Tensor], others: list[Tensor]) -> float:
    """The fraction of elements that two lists of tensors have in common."""
    equal = sum(int((param == other).sum()) for param, other in zip(params, others, strict=True))
    return equal / math.fsum(param.numel() for param in params)
