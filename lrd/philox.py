"""Random bits as a pure function of (seed, position): Philox4x64-10 (Salmon et al., SC 2011).

A counter-based generator has no state that moves. The block at a counter is computed from the
counter and the key alone, on any rank and in any order.

NumPy's compiled Philox is this function. It adds one to the 256-bit counter before each block, so
a stream whose first block has counter `c` is started at `c - 1`. `tests/optim/test_mask.py`
compares it with the known-answer vectors of Random123.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORDS_PER_BLOCK = 4
WORD_BITS = 64
BLOCK_BITS = WORDS_PER_BLOCK * WORD_BITS

# The constants of Philox4x64, for the compiled kernels that compute it themselves.
MULTIPLIER_0 = 0xD2E7470EE14C6C93
MULTIPLIER_1 = 0xCA5A826395121157
WEYL_0 = 0x9E3779B97F4A7C15
WEYL_1 = 0xBB67AE8584CAA73B

_N_ROUNDS = 10
_NUM_COUNTERS = 1 << 256
_WORD_MASK = (1 << WORD_BITS) - 1


class Domain(IntEnum):
    """What random bits are for: the second word of the key.

    Two purposes have different keys, so their bits are independent.
    """

    MASK = 0
    ORDER = 1
    AUGMENT = 2
    SYNTHETIC = 3
    VALIDATION = 4
    LAYERS = 5
    SAMPLE = 6
    MIXING = 7


def words(
    seed: int, domain: Domain, position: tuple[int, int, int], first_block: int, n_blocks: int
) -> NDArray[np.uint64]:
    """Compute the random words of consecutive blocks.

    Args:
        seed: first word of the key, in [0, 2**64).
        domain: second word of the key.
        position: words 1, 2 and 3 of the counter, each in [0, 2**64).
        first_block: word 0 of the first block's counter.
        n_blocks: number of blocks; word 0 of the counter goes up by one from block to block.

    Returns:
        uint64 (4 * n_blocks,): the four output words of each block in order.
    """
    word_1, word_2, word_3 = position
    counter = first_block | word_1 << 64 | word_2 << 128 | word_3 << 192
    before_first = (counter - 1) % _NUM_COUNTERS

    state = _stream.state
    for i in range(4):
        state["state"]["counter"][i] = before_first >> WORD_BITS * i & _WORD_MASK
    state["state"]["key"][0] = seed
    state["state"]["key"][1] = int(domain)

    _stream.generator.state = state
    return _stream.generator.random_raw(n_blocks * WORDS_PER_BLOCK)


class _Stream(threading.local):
    """NumPy's generator, one for each thread. To make it takes ten times as long as to set it."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(0)
        self.state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": np.zeros(4, np.uint64), "key": np.zeros(2, np.uint64)},
            "buffer": np.zeros(WORDS_PER_BLOCK, np.uint64),
            "buffer_pos": WORDS_PER_BLOCK,  # the buffer is empty
            "has_uint32": 0,
            "uinteger": 0,
        }


_stream = _Stream()


def words_at(
    seed: NDArray[np.uint64], domain: Domain, counter: tuple[NDArray[np.uint64], ...]
) -> NDArray[np.uint64]:
    """Compute the random words of blocks at any counters, by array operations.

    They are those of `words`. For many short runs of blocks this is faster, for long ones slower.

    Args:
        seed: first word of each block's key, uint64 (n_blocks,).
        domain: second word of the key.
        counter: the four words of each block's counter, each uint64 (n_blocks,).

    Returns:
        uint64 (n_blocks, 4): the four output words of each block.
    """
    c0, c1, c2, c3 = counter
    k0 = seed.copy()
    k1 = int(domain)

    # Arithmetic of arrays wraps at 2**64 without a warning.
    for _ in range(_N_ROUNDS):
        high_0 = _multiply_high(c0, MULTIPLIER_0)
        low_0 = c0 * np.uint64(MULTIPLIER_0)
        high_1 = _multiply_high(c2, MULTIPLIER_1)
        low_1 = c2 * np.uint64(MULTIPLIER_1)

        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ np.uint64(k1)
        c3 = low_0

        k0 += np.uint64(WEYL_0)
        k1 = (k1 + WEYL_1) & _WORD_MASK

    return np.stack([c0, c1, c2, c3], axis=1)


def _multiply_high(x: NDArray[np.uint64], constant: int) -> NDArray[np.uint64]:
    """The upper 64 of the 128 bits of the products with a constant, from products of 32 bits."""
    half = np.uint64(32)
    low_mask = np.uint64(0xFFFFFFFF)
    constant_low = np.uint64(constant & 0xFFFFFFFF)
    constant_high = np.uint64(constant >> 32)
    x_low = x & low_mask
    x_high = x >> half

    middle = x_high * constant_low + (x_low * constant_low >> half)
    other_middle = x_low * constant_high + (middle & low_mask)
    high: NDArray[np.uint64] = x_high * constant_high + (middle >> half) + (other_middle >> half)
    return high
