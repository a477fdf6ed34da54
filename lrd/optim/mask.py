"""The mask of learning rate dropout: a pure function of a seed and a position.

The position is (update count, parameter's index, element's index).

**Which bits decide about an element.** An element's uniform number u is in [0, 2**16). The element
is kept where u < threshold, with ``threshold = max(1, round(keep_prob * 2**16))``. Bit j of u,
counted from the most significant (j = 0), is bit ``e % 64`` (0 = least significant) of word
``(e // 64) % 4`` of the Philox4x64-10 block with ::

    counter = (e // 256, j, parameter's index, update count)
    key = (seed, Domain.MASK)

where e is the element's index in the flattened (row-major) parameter and ``Domain.MASK`` is 0, see
:mod:`lrd.philox`. Counter and key words are 64 bits wide, so nothing wraps at 2**32 elements,
parameters or steps.

**Why bit planes.** Bit j of all elements' numbers is one plane, and one AND or OR over whole words
decides 64 elements. The planes below the threshold's lowest set bit are never drawn: keep_prob 0.5
costs one random bit an element, 0.75 two, any other value at most sixteen. The numbers u do not
depend on keep_prob, so the elements kept at a smaller keep_prob are among those kept at a larger
one.
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
_KEEPS_ALL = 1 << RESOLUTION_BITS  # the threshold that keeps every element

# Elements that one Philox block of one plane decides.
_BLOCK = philox.BLOCK_BITS


def check_keep_prob(keep_prob: Any) -> float:
    """Return ``keep_prob`` as a float.

    Raises:
        ValueError: it is not a number in (0, 1].
    """
    is_number = isinstance(keep_prob, Real) and not isinstance(keep_prob, bool)
    if not is_number or not 0.0 < float(keep_prob) <= 1.0:
        raise ValueError(f"keep_prob must be in (0, 1], not {keep_prob!r}")

    return float(keep_prob)


def check_seed(seed: int) -> int:
    """Return ``seed``.

    Raises:
        ValueError: it is not an integer in [0, 2**64).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer in [0, 2**64), not {seed!r}")

    return seed


def check_granularity(granularity: str) -> str:
    """Return ``granularity``.

    Raises:
        ValueError: it is not one of ``GRANULARITIES``.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}"
        )

    return granularity


def _check_counter_words(**words: int) -> None:
    for name, value in words.items():
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name} must be in [0, 2**64), not {value}")


def threshold(keep_prob: float) -> int:
    """The number that an element's u must stay below to be kept, in 1 ... 65536.

    It is never 0, so every mask can keep an element; 65536 keeps all of them.
    """
    return max(1, round(check_keep_prob(keep_prob) * (1 << RESOLUTION_BITS)))


def effective_keep_prob(keep_prob: float) -> float:
    """The probability that is really used, threshold / 2**16.

    It is ``keep_prob`` to within 2**-17, and at least 2**-16.
    """
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
    """Draw the mask of elements ``offset ... offset + numel - 1`` of one flattened parameter.

    A slice drawn alone equals that slice of the whole. The bits are drawn on the host and travel
    packed (one bit an element), so they are the same on every device.

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
        ValueError: an argument is out of its range.
    """
    check_seed(seed)
    _check_counter_words(step=step, index=index, offset=offset, numel=numel)
    if threshold(keep_prob) == _KEEPS_ALL or numel == 0:
        return torch.ones(numel, dtype=torch.bool, device=device)

    # Only whole blocks can be drawn: from the block of the first element to that of the last.
    first_block = offset // _BLOCK
    end_block = _ceil_div(offset + numel, _BLOCK)
    words = _keep_words(
        threshold(keep_prob), seed, step, index, first_block, end_block - first_block
    )
    start = offset - first_block * _BLOCK  # the first element's index in these blocks

    # Little-endian words make bit e of the stream element e, on any host.
    octets = words.astype("<u8", copy=False).view(np.uint8)

    if torch.device(device).type == "cpu":
        bits = np.unpackbits(octets, count=start + numel, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)[start:]

    octets_on_device = torch.from_numpy(octets).to(device)  # uint8 (octets,)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    bits_on_device = (octets_on_device[:, None] >> shifts) & 1  # uint8 (octets, 8)
    return bits_on_device.view(torch.bool).flatten()[start : start + numel]


def count_kept(numel: int, *, seed: int, step: int, index: int, keep_prob: float) -> int:
    """Count how many of a parameter's first ``numel`` draws keep.

    It equals ``draw(...).sum()``, but the bits are never unpacked.

    Args:
        numel: how many draws.
        seed: as for :func:`draw`.
        step: as for :func:`draw`.
        index: as for :func:`draw`.
        keep_prob: as for :func:`draw`.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_seed(seed)
    _check_counter_words(step=step, index=index, numel=numel)
    if threshold(keep_prob) == _KEEPS_ALL or numel == 0:
        return numel

    n_blocks = _ceil_div(numel, _BLOCK)
    words = _keep_words(threshold(keep_prob), seed, step, index, 0, n_blocks)

    # The last word may contain bits of elements beyond `numel`.
    n_whole_words, n_rest = divmod(numel, philox.WORD_BITS)
    kept = int(np.bitwise_count(words[:n_whole_words]).sum())
    if n_rest:
        rest_bits = int(words[n_whole_words]) & ((1 << n_rest) - 1)
        kept += rest_bits.bit_count()

    return kept


def _keep_words(
    limit: int, seed: int, step: int, index: int, first_block: int, n_blocks: int
) -> NDArray[np.uint64]:
    """Whether u < limit, for the elements of whole blocks: one bit an element, 64 a word.

    The comparison goes through the bit planes from the lowest that matters to the highest, so each
    plane overrules those before it.

    Args:
        limit: the threshold, in 1 ... 65535.
        seed: as for :func:`draw`.
        step: as for :func:`draw`.
        index: as for :func:`draw`.
        first_block: number of the first block.
        n_blocks: how many blocks.

    Returns:
        uint64 array of shape (4 * n_blocks,).
    """
    # Below the limit's lowest set bit, u's bits decide nothing.
    lowest_plane = RESOLUTION_BITS - (limit & -limit).bit_length()

    kept: NDArray[np.uint64] | None = None
    for plane in range(lowest_plane, -1, -1):
        plane_words = philox.words(seed, Domain.MASK, (plane, index, step), first_block, n_blocks)
        zeros = np.invert(plane_words, out=plane_words)  # ones where u's bit is zero
        limit_bit = limit >> (RESOLUTION_BITS - 1 - plane) & 1

        if kept is None:
            # The lowest set bit: u is smaller where its bit is zero, else equal and not smaller.
            kept = zeros
        elif limit_bit == 1:
            # u is smaller where its bit is zero; elsewhere the planes before decide.
            kept |= zeros
        else:
            # u is larger where its bit is one; elsewhere the planes before decide.
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
    """Draw the mask of one whole parameter, in a shape that broadcasts to ``shape``.

    Args:
        shape: the parameter's shape.
        seed: as for :func:`draw`.
        step: as for :func:`draw`.
        index: as for :func:`draw`.
        keep_prob: as for :func:`draw`.
        granularity: which elements share one draw. ``element``: none (the paper); ``row``: those of
            one index of dimension 0; ``column``: those of one index of dimension 1; ``tensor``: all
            of them (the blocks of SkipUpdate, Joo et al., arXiv 2602.15322). The draw's index then
            stands for the element's index in the position.
        device: as for :func:`draw`.

    Returns:
        bool tensor. Its shape is ``shape`` for ``element``, else ``shape`` with size 1 in the
        dimensions that share a draw.

    Raises:
        ValueError: an argument is out of its range.
    """
    drawn_shape = draw_shape(tuple(shape), granularity)
    flat = draw(
        math.prod(drawn_shape),
        seed=seed,
        step=step,
        index=index,
        keep_prob=keep_prob,
        device=device,
    )
    return flat.view(drawn_shape)


def draw_shape(shape: tuple[int, ...], granularity: str) -> tuple[int, ...]:
    """The shape of a parameter's independent draws.

    A vector counts as one column: its rows are its elements.
    """
    if check_granularity(granularity) == "element":
        return shape

    # The only dimension whose indices have draws of their own; a tensor has none.
    drawn_dim = {"row": 0, "column": 1}.get(granularity)
    return tuple(size if dim == drawn_dim or size == 0 else 1 for dim, size in enumerate(shape))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
