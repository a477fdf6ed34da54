"""The keep mask of learning rate dropout: a pure function of (seed, update count, parameter's index, element's index).

Which bits decide about an element
    An element's uniform number is u in {0, ..., 2**16 - 1}; it is kept where u < T, T = round(keep_prob * 2**16).
    Bit j of u, counted from the most significant (j = 0), is bit `e % 64` (0 = least significant) of word
    `(e // 64) % 4` of the Philox4x64-10 block with

        counter = (e // 256, j, parameter's index, update count)        key = (seed, 0)

    where e is the element's index in the flattened (row-major) parameter. Counter and key words are 64 bits wide,
    so nothing wraps at 2**32 elements, parameters or steps.

Why bit planes
    64 elements are decided by one pass of AND/OR over whole words, and the planes below T's lowest set bit are never
    drawn: keep_prob = 0.5 costs one random bit an element, 0.75 two, any other value at most sixteen. The numbers u do
    not depend on keep_prob, so the elements kept at a smaller keep_prob are among those kept at a larger one.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrd import philox
from lrd.philox import Domain

Granularity = Literal["element", "row", "column", "tensor"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)

RESOLUTION_BITS = 16
_BLOCK = philox.WORDS_PER_BLOCK * philox.WORD_BITS  # elements decided by one Philox block of one plane


def check_keep_prob(keep_prob: Any) -> float:
    """Return `keep_prob` as a float, or raise ValueError where it is no number in (0, 1]."""
    is_number = isinstance(keep_prob, Real) and not isinstance(keep_prob, bool)
    if not is_number or not 0.0 < float(keep_prob) <= 1.0:
        raise ValueError(f"keep_prob must be in (0, 1], not {keep_prob!r}")
    return float(keep_prob)


def check_seed(seed: int) -> int:
    """Return `seed`, or raise ValueError where it is no integer in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer in [0, 2**64), not {seed!r}")
    return seed


def _check_position(**words: int) -> None:
    for name, value in words.items():
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name} must be in [0, 2**64), not {value}")


def check_granularity(granularity: str) -> str:
    """Return `granularity`, or raise ValueError where it names none."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
    return granularity


def threshold(keep_prob: float) -> int:
    """T of the module's text. Never 0, so a mask can always keep."""
    return max(1, round(check_keep_prob(keep_prob) * (1 << RESOLUTION_BITS)))


def effective_keep_prob(keep_prob: float) -> float:
    """The probability really used, T / 2**16: `keep_prob` to within 2**-17, and at least 2**-16."""
    return threshold(keep_prob) / (1 << RESOLUTION_BITS)


def draw(
    numel: int,
    *,
    seed: int,
    step: int,
    index: int,
    keep_prob: float,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask of elements `offset ... offset + numel - 1` of one flattened parameter.

    A slice drawn on its own equals that slice of the whole. The bits are drawn on the host and travel packed (one bit
    an element), so they are the same on every device.

    Args:
        numel: how many elements.
        seed: seed of the run, the same on all ranks; 0 <= seed < 2**64.
        step: update count, from 0.
        index: the parameter's index in the optimizer, counted through its groups.
        keep_prob: probability of keeping an element, in (0, 1].
        offset: index of the first element.
        device: where the result lies.

    Returns:
        bool tensor of shape (numel,), True where the element keeps its learning rate.

    Raises:
        ValueError: an argument out of its range.
    """
    limit = threshold(keep_prob)
    if limit == 1 << RESOLUTION_BITS or numel == 0:
        return torch.ones(numel, dtype=torch.bool, device=device)
    first = offset // _BLOCK
    packed = _keep_words(limit, seed, step, index, first, -(-(offset + numel) // _BLOCK) - first)
    start = offset - first * _BLOCK
    octets = packed.astype("<u8", copy=False).view(np.uint8)
    if torch.device(device).type == "cpu":
        bits = np.unpackbits(octets, count=start + numel, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)[start:]
    on_device = torch.from_numpy(octets).to(device)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return ((on_device[:, None] >> shifts) & 1).view(torch.bool).flatten()[start : start + numel]


def count_kept(numel: int, *, seed: int, step: int, index: int, keep_prob: float) -> int:
    """How many of a parameter's first `numel` draws keep: `draw(...).sum()` without unpacking the bits."""
    limit = threshold(keep_prob)
    if limit == 1 << RESOLUTION_BITS or numel == 0:
        return numel
    packed = _keep_words(limit, seed, step, index, 0, -(-numel // _BLOCK))
    whole, rest = divmod(numel, philox.WORD_BITS)
    last = (int(packed[whole]) & ((1 << rest) - 1)).bit_count() if rest else 0
    return int(np.bitwise_count(packed[:whole]).sum()) + last


def _keep_words(limit: int, seed: int, step: int, index: int, first_block: int, n_blocks: int) -> NDArray[np.uint64]:
    """Packed keep bits of whole blocks: u < limit for 64 elements a word, from the lowest plane that matters up."""
    check_seed(seed)
    _check_position(step=step, index=index, offset=first_block, numel=n_blocks)
    lowest = RESOLUTION_BITS - (limit & -limit).bit_length()
    kept: NDArray[np.uint64] | None = None
    for plane in range(lowest, -1, -1):
        plane_words = philox.words(seed, Domain.MASK, (plane, index, step), first_block, n_blocks)
        zeros = np.invert(plane_words, out=plane_words)
        if kept is None:  # the lowest set bit of T: smaller where u's bit is zero, else equal and not smaller
            kept = zeros
        elif limit >> (RESOLUTION_BITS - 1 - plane) & 1:  # T's bit is one: smaller where u's is zero, else undecided
            kept |= zeros
        else:  # T's bit is zero: larger where u's is one, else undecided
            kept &= zeros
    assert kept is not None
    return kept


def keep_mask(
    shape: torch.Size | tuple[int, ...],
    *,
    seed: int,
    step: int,
    index: int,
    keep_prob: float,
    granularity: str = "element",
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask of one whole parameter, in a shape that broadcasts to `shape`.

    Args:
        shape: the parameter's shape.
        granularity: `element` draws each element (the paper); `row` one draw for each index of dimension 0, `column`
            for each index of dimension 1, `tensor` one for the whole parameter (the blocks of SkipUpdate, Joo et al.,
            arXiv 2602.15322). A draw's index takes the element's place in the position.
        seed, step, index, keep_prob, device: as for `draw`.

    Returns:
        bool tensor; its shape is `shape` for `element`, else `shape` with size 1 in the dimensions that share a draw.
    """
    shape = tuple(shape)
    draws = draw_shape(shape, granularity)
    flat = draw(math.prod(draws), seed=seed, step=step, index=index, keep_prob=keep_prob, device=device)
    return flat.view(draws)


def draw_shape(shape: tuple[int, ...], granularity: str) -> tuple[int, ...]:
    """The shape of a parameter's independent draws. A vector is one column: its rows are its elements."""
    if check_granularity(granularity) == "element":
        return shape
    own_dim = {"row": 0, "column": 1}.get(granularity)
    return tuple(size if dim == own_dim or size == 0 else 1 for dim, size in enumerate(shape))
