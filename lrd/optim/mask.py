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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    # The usual case first: every step checks it, and `Real` takes long to look up.
    if type(keep_prob) is float and 0.0 < keep_prob <= 1.0:
        return keep_prob

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


@dataclass(slots=True)
class Draw:
    """What the mask of consecutive elements of one parameter is drawn with, as for `draw`."""

    numel: int
    seed: int
    step: int
    index: int
    keep_prob: float
    offset: int = 0


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
    return draw_many([Draw(numel, seed, step, index, keep_prob, offset)], device)[0]


def draw_many(
    draws: Sequence[Draw],
    device: torch.device | str = "cpu",
    fill_keep_words: Callable[[Sequence[Blocks], NDArray[np.uint64]], None] | None = None,
) -> list[Tensor]:
    """Draw several masks at once: the bits of `draw`, but much less work where they are many.

    Args:
        draws: what to draw.
        device: where the results lie. The bits of all masks travel there together.
        fill_keep_words: draws the bits, as the function of this name in this module does, which is
            taken if it is None.

    Returns:
        For each draw, a bool tensor of shape (numel,). They may share one storage.

    Raises:
        ValueError: an argument is out of its range.
    """
    # Only whole blocks can be drawn: from the block of the first element to that of the last.
    blocks: list[Blocks] = []
    first_bits: dict[int, int] = {}  # by the draw's number: its first bit among all that are drawn
    n_blocks = 0

    for number, item in enumerate(draws):
        check_seed(item.seed)
        _check_counter_words(step=item.step, index=item.index, offset=item.offset, numel=item.numel)
        limit = threshold(item.keep_prob)
        if limit == _KEEPS_ALL or item.numel == 0:
            continue

        first_block = item.offset // _BLOCK
        end_block = _ceil_div(item.offset + item.numel, _BLOCK)
        blocks.append(
            Blocks(limit, item.seed, item.step, item.index, first_block, end_block - first_block)
        )
        first_bits[number] = n_blocks * _BLOCK + item.offset - first_block * _BLOCK
        n_blocks += end_block - first_block

    words = np.empty(n_blocks * philox.WORDS_PER_BLOCK, np.uint64)
    if blocks:
        (fill_keep_words or _fill_keep_words)(blocks, words)
    bits = _unpack(words, torch.device(device))

    masks = []
    for number, item in enumerate(draws):
        if number in first_bits:
            start = first_bits[number]
            masks.append(bits[start : start + item.numel])
        else:
            masks.append(torch.ones(item.numel, dtype=torch.bool, device=device))

    return masks


def _unpack(words: NDArray[np.uint64], device: torch.device) -> Tensor:
    """The bits of words as a bool tensor of shape (64 * len(words),) on a device."""
    # Little-endian words make bit e of the stream element e, on any host.
    octets = words.astype("<u8", copy=False).view(np.uint8)

    if device.type == "cpu":
        bits = np.unpackbits(octets, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)

    octets_on_device = torch.from_numpy(octets).to(device)  # uint8 (octets,)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    bits_on_device = (octets_on_device[:, None] >> shifts) & 1  # uint8 (octets, 8)
    return bits_on_device.view(torch.bool).flatten()


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

    blocks = Blocks(threshold(keep_prob), seed, step, index, 0, _ceil_div(numel, _BLOCK))
    words = np.empty(blocks.n_blocks * philox.WORDS_PER_BLOCK, np.uint64)
    _fill_keep_words([blocks], words)

    # The last word may contain bits of elements beyond `numel`.
    n_whole_words, n_rest = divmod(numel, philox.WORD_BITS)
    kept = int(np.bitwise_count(words[:n_whole_words]).sum())
    if n_rest:
        rest_bits = int(words[n_whole_words]) & ((1 << n_rest) - 1)
        kept += rest_bits.bit_count()

    return kept


@dataclass(slots=True)
class Blocks:
    """Consecutive blocks of 256 elements of one parameter, and what their mask is drawn with."""

    limit: int  # the threshold, in 1 ... 65535
    seed: int
    step: int
    index: int
    first_block: int
    n_blocks: int

    @property
    def planes(self) -> range:
        """The bit planes that decide, from the lowest to the highest.

        Below the limit's lowest set bit, u's bits decide nothing.
        """
        lowest_plane = RESOLUTION_BITS - (self.limit & -self.limit).bit_length()
        return range(lowest_plane, -1, -1)


# Blocks that are drawn at a time: their words stay in the cache.
_CHUNK = 1 << 11

# To set up a generator takes as long as to compute about 50 blocks by array operations instead.
# Those cost a fixed time too, that of 64 generators.
_FEW_BLOCKS = 32
_MANY_STREAMS = 64


def _fill_keep_words(all_blocks: Sequence[Blocks], words: NDArray[np.uint64]) -> None:
    """Draw whether u < limit, for the elements of whole blocks: one bit an element, 64 a word.

    Args:
        all_blocks: what to draw.
        words: uint64 (4 * n_blocks,) for the n_blocks of all together, in their order; overwritten.
    """
    block_words = words.reshape(-1, philox.WORDS_PER_BLOCK)
    stops = np.cumsum([blocks.n_blocks for blocks in all_blocks]).tolist()
    starts = [0, *stops[:-1]]

    # Few blocks of one parameter are drawn together with those of others.
    few = [number for number, blocks in enumerate(all_blocks) if blocks.n_blocks <= _FEW_BLOCKS]
    if sum(len(all_blocks[number].planes) for number in few) < _MANY_STREAMS:
        few = []

    by_limit: dict[int, list[int]] = {}
    for number in few:
        by_limit.setdefault(all_blocks[number].limit, []).append(number)
    for numbers in by_limit.values():
        drawn = _draw_together([all_blocks[number] for number in numbers])
        places = np.concatenate([np.arange(starts[number], stops[number]) for number in numbers])
        block_words[places] = drawn

    # The others one after the other. Threads of Python would not help: they find the cores taken by
    # torch's, which stay awake while they wait for work.
    is_drawn = set(few)
    for number, blocks in enumerate(all_blocks):
        if number in is_drawn:
            continue

        for first in range(0, blocks.n_blocks, _CHUNK):
            n_blocks = min(_CHUNK, blocks.n_blocks - first)
            chunk = replace(blocks, first_block=blocks.first_block + first, n_blocks=n_blocks)
            start = starts[number] + first
            _draw_chunk(chunk, words[start * 4 : (start + n_blocks) * 4])


def _draw_chunk(blocks: Blocks, words: NDArray[np.uint64]) -> None:
    """Draw the bits of `_fill_keep_words` for consecutive blocks.

    The comparison goes through the bit planes from the lowest that matters to the highest, so each
    plane overrules those before it.
    """
    position = (blocks.index, blocks.step)
    for plane in blocks.planes:
        plane_words = philox.words(
            blocks.seed, Domain.MASK, (plane, *position), blocks.first_block, blocks.n_blocks
        )
        _compare_plane(words, plane_words, plane, blocks)


def _draw_together(all_blocks: Sequence[Blocks]) -> NDArray[np.uint64]:
    """Draw the bits of `_fill_keep_words` for blocks that have the limit in common.

    Returns:
        uint64 (n_blocks, 4)
    """
    n_blocks = [blocks.n_blocks for blocks in all_blocks]
    first_blocks = np.array([blocks.first_block for blocks in all_blocks], np.uint64)
    seeds = np.array([blocks.seed for blocks in all_blocks], np.uint64).repeat(n_blocks)
    steps = np.array([blocks.step for blocks in all_blocks], np.uint64).repeat(n_blocks)
    indices = np.array([blocks.index for blocks in all_blocks], np.uint64).repeat(n_blocks)

    # Each block's number in its parameter
    places = np.arange(len(seeds)) - (np.cumsum(n_blocks) - n_blocks).repeat(n_blocks)
    numbers = first_blocks.repeat(n_blocks) + places.astype(np.uint64)

    words = np.empty((len(seeds), philox.WORDS_PER_BLOCK), np.uint64)
    planes = all_blocks[0].planes
    chunk_size = max(1, 4 * _CHUNK // len(planes))

    for start in range(0, len(seeds), chunk_size):
        chunk = slice(start, start + chunk_size)
        counters = (numbers[chunk], indices[chunk], steps[chunk], seeds[chunk])
        block, index, step, seed = [np.tile(values, len(planes)) for values in counters]
        plane = np.array(planes, np.uint64).repeat(len(numbers[chunk]))

        drawn = philox.words_at(seed, Domain.MASK, (block, plane, index, step))
        drawn_planes = drawn.reshape(len(planes), -1, philox.WORDS_PER_BLOCK)
        for number, plane_words in zip(planes, drawn_planes, strict=True):
            _compare_plane(words[chunk], plane_words, number, all_blocks[0])

    return words


def _compare_plane(
    kept: NDArray[np.uint64], plane_words: NDArray[np.uint64], plane: int, blocks: Blocks
) -> None:
    """Go on with the comparison u < limit by one plane, in `kept`. `plane_words` is overwritten.

    Args:
        kept: whether u < limit by the planes below; not read at the first plane.
        plane_words: u's bits in this plane.
        plane: its number, from the most significant.
        blocks: with the limit.
    """
    zeros = np.invert(plane_words, out=plane_words)  # ones where u's bit is zero

    if plane == blocks.planes[0]:
        # The lowest set bit: u is smaller where its bit is zero, else equal and not smaller.
        kept[...] = zeros
    elif blocks.limit >> (RESOLUTION_BITS - 1 - plane) & 1:
        # u is smaller where its bit is zero; elsewhere the planes before decide.
        kept |= zeros
    else:
        # u is larger where its bit is one; elsewhere the planes before decide.
        kept &= zeros


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
