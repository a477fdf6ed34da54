"""Random bits as a pure function of (seed, position): Philox4x64-10 (Salmon et al., SC 2011).

A counter-based generator has no state that moves: the block at a counter is computed from the counter and the key
alone, on any rank, in any order. NumPy's compiled Philox is this very function; it adds one to the 256-bit counter
before each block, so a stream that is to begin at counter `c` starts it at `c - 1`.
Held to the known-answer vectors of Random123 in `tests/test_mask.py`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

WORDS_PER_BLOCK = 4
WORD_BITS = 64
_COUNTER = 1 << 256


class Domain(IntEnum):
    """The second word of the key: what the bits are for. Draws of two domains never share a position."""

    MASK = 0
    ORDER = 1
    AUGMENT = 2
    SYNTHETIC = 3


def words(
    seed: int, domain: Domain, position: tuple[int, int, int], first_block: int, n_blocks: int
) -> NDArray[np.uint64]:
    """The random words of consecutive blocks.

    Args:
        seed: first word of the key, 0 <= seed < 2**64.
        domain: second word of the key.
        position: counter words 1, 2 and 3, each in [0, 2**64).
        first_block: counter word 0 of the first block.
        n_blocks: how many blocks, with consecutive counter word 0.

    Returns:
        uint64 array of shape (4 * n_blocks,): the four output words of each block in order.
    """
    c1, c2, c3 = position
    counter = first_block | c1 << 64 | c2 << 128 | c3 << 192
    generator = np.random.Philox(counter=(counter - 1) % _COUNTER, key=seed | int(domain) << 64)
    return generator.random_raw(n_blocks * WORDS_PER_BLOCK)
