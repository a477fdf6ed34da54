"""Random bits as a pure function of (seed, position): Philox4x64-10 (Salmon et al., SC 2011).

A counter-based generator has no state that moves. The block at a counter is computed from the
counter and the key alone, on any rank and in any order.

NumPy's compiled Philox is this function. It adds one to the 256-bit counter before each block, so
a stream whose first block has counter `c` is started at `c - 1`. `tests/optim/test_mask.py`
compares it with the known-answer vectors of Random123.
"""

from __future__ import annotations

from enum import IntEnum

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

_NUM_COUNTERS = 1 << 256


class Domain(IntEnum):
    """What random bits are for: the second word of the key.

    Two purposes have different keys, so their bits are independent.
    """

    MASK = 0
    ORDER = 1
    AUGMENT = 2
    SYNTHETIC = 3


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
    key = seed | int(domain) << 64
    generator = np.random.Philox(counter=(counter - 1) % _NUM_COUNTERS, key=key)
    return generator.random_raw(n_blocks * WORDS_PER_BLOCK)
