"""The mask is a pure function of its position, drawn by Philox4x64-10, and its bits are fair."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lrd import philox
from lrd.optim import mask

FULL = 2**64 - 1


@cache
def reference_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x64-10 of Salmon et al. (SC 2011) in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = right >> 64 ^ c1 ^ k0, right & FULL, left >> 64 ^ c3 ^ k1, left & FULL
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & FULL, (k1 + 0xBB67AE8584CAA73B) & FULL
    return c0, c1, c2, c3


def reference_mask(
    numel: int, seed: int, step: int, index: int, keep_prob: float, offset: int = 0
) -> list[bool]:
    """Element by element, as `lrd.optim.mask` defines it; all sixteen bit planes are drawn."""
    threshold = round(keep_prob * 2**16)
    kept = []
    for e in range(offset, offset + numel):
        u = 0
        for j in range(16):
            block = reference_philox((e // 256, j, index, step), (seed, 0))
            u = 2 * u + (block[e // 64 % 4] >> e % 64 & 1)
        kept.append(u < threshold)
    return kept


# Random123, tests/kat_vectors at commit 9545ff6413f258be2f04c1d319d99aaef7521150, the lines
# `philox4x64 10`.
KNOWN_ANSWERS = [
    pytest.param(
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        id="zeros",
    ),
    pytest.param(
        (FULL, FULL, FULL, FULL),
        (FULL, FULL),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        id="ones",
    ),
    pytest.param(
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        id="pi",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    drawn = philox.words(key[0], key[1], counter[1:], counter[0], 1)
    assert tuple(map(int, drawn)) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_reference_gives_the_known_answers(counter, key, answer):
    assert reference_philox(counter, key) == answer


@pytest.mark.parametrize("first_block", [0, 1, 2**32 - 1, 2**64 - 3])
def test_consecutive_blocks_follow_the_first_counter_word(first_block):
    position = (2, 3, 2**40)
    expected = [
        word
        for block in range(first_block, first_block + 3)
        for word in reference_philox((block, *position), (7, 1))
    ]
    assert philox.words(7, philox.Domain.ORDER, position, first_block, 3).tolist() == expected


def test_domains_draw_different_bits():
    drawn = {philox.words(5, domain, (0, 0, 0), 0, 4).tobytes() for domain in philox.Domain}
    assert len(drawn) == len(philox.Domain)


KEEP_PROBS = [0.5, 0.25, 0.75, 0.9, 1 / 3, 2**-16, 1 - 2**-16, 1.0]
POSITIONS = [
    pytest.param({"seed": 0, "step": 0, "index": 0}, 0, id="origin"),
    pytest.param({"seed": 1, "step": 2, "index": 3}, 250, id="across a block's end"),
    pytest.param({"seed": 12, "step": 2**40, "index": 5}, 64, id="step 2**40"),
    pytest.param(
        {"seed": FULL, "step": 7, "index": 2**33}, 2**35 + 13, id="largest seed, beyond 32 bits"
    ),
]


@pytest.mark.parametrize("keep_prob", KEEP_PROBS)
@pytest.mark.parametrize(("position", "offset"), POSITIONS)
def test_draw_equals_the_element_by_element_reference(keep_prob, position, offset):
    drawn = mask.draw(300, **position, keep_prob=keep_prob, offset=offset)
    assert drawn.dtype == torch.bool
    assert drawn.tolist() == reference_mask(300, **position, keep_prob=keep_prob, offset=offset)


def first_bits(drawn: Tensor) -> int:
    return sum(bit << e for e, bit in enumerate(drawn.tolist()))


@pytest.mark.parametrize(
    ("seed", "step", "index", "keep_prob", "bits"),
    [
        (0, 0, 0, 0.5, 0xE9AAB26135C9CEB3),
        (0, 1, 0, 0.5, 0xF43142A7E982F0CE),
        (0, 0, 1, 0.5, 0xE64094198DA820F4),
        (42, 1000, 17, 0.5, 0x18181AEC3B55D8EF),
        (42, 1000, 17, 0.25, 0x18080A8C301408EE),
        (42, 1000, 17, 0.9, 0xFB7EDEFCBFFFDFFF),
        (FULL, 2**40, 61, 0.1, 0x2401004020400010),
    ],
)
def test_the_first_64_bits_never_change(seed, step, index, keep_prob, bits):
    assert first_bits(mask.draw(64, seed=seed, step=step, index=index, keep_prob=keep_prob)) == bits


@pytest.mark.parametrize("keep_prob", [0.5, 0.3])
def test_a_slice_drawn_alone_equals_the_slice_of_the_whole(keep_prob):
    position = {"seed": 3, "step": 4, "index": 5, "keep_prob": keep_prob}
    whole = mask.draw(1100, **position)
    for offset in (0, 1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000):
        for numel in (0, 1, 2, 64, 99, 1100 - offset):
            numel = min(numel, 1100 - offset)
            assert torch.equal(
                mask.draw(numel, offset=offset, **position), whole[offset : offset + numel]
            )


@pytest.mark.parametrize("keep_prob", [0.5, 0.9, 2**-16, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 255, 256, 257, 5000])
def test_count_kept_equals_the_sum_of_the_mask(keep_prob, numel):
    position = {"seed": 3, "step": 4, "index": 5, "keep_prob": keep_prob}
    assert mask.count_kept(numel, **position) == int(mask.draw(numel, **position).sum())


def test_what_a_smaller_keep_prob_keeps_a_larger_one_keeps_too():
    masks = [
        mask.draw(4096, seed=1, step=2, index=3, keep_prob=k)
        for k in (0.01, 0.3, 0.5, 0.6, 0.99, 1.0)
    ]
    for smaller, larger in pairwise(masks):
        assert not (smaller & ~larger).any()
        assert (larger & ~smaller).any()


@pytest.mark.parametrize(
    ("keep_prob", "threshold"),
    [(0.5, 32768), (1 / 3, 21845), (2 / 3, 43691), (0.9, 58982), (1.0, 65536)],
)
def test_keep_prob_is_rounded_to_the_nearest_multiple_of_the_resolution(keep_prob, threshold):
    assert mask.threshold(keep_prob) == threshold


@pytest.mark.parametrize("keep_prob", [1e-9, 2**-17])
def test_the_smallest_keep_prob_is_the_resolution(keep_prob):
    assert mask.threshold(keep_prob) == 1
    position = {"seed": 0, "step": 0, "index": 0}
    smallest = mask.draw(1 << 18, **position, keep_prob=2**-16)
    assert torch.equal(mask.draw(1 << 18, **position, keep_prob=keep_prob), smallest)
    assert smallest.any()


@pytest.mark.parametrize(
    ("shape", "granularity", "draws"),
    [
        ((4, 3, 2, 2), "element", (4, 3, 2, 2)),
        ((4, 3, 2, 2), "row", (4, 1, 1, 1)),
        ((4, 3, 2, 2), "column", (1, 3, 1, 1)),
        ((4, 3, 2, 2), "tensor", (1, 1, 1, 1)),
        ((5,), "row", (5,)),
        ((5,), "column", (1,)),
        ((5,), "tensor", (1,)),
        ((), "element", ()),
        ((), "row", ()),
        ((), "tensor", ()),
        ((0, 3), "row", (0, 1)),
        ((3, 0), "row", (3, 0)),
    ],
)
def test_rows_columns_and_tensors_share_one_draw(shape, granularity, draws):
    position = {"seed": 3, "step": 4, "index": 5, "keep_prob": 0.5}
    drawn = mask.keep_mask(shape, granularity=granularity, **position)
    assert tuple(drawn.shape) == draws
    assert torch.broadcast_shapes(drawn.shape, shape) == shape
    assert torch.equal(drawn.flatten(), mask.draw(math.prod(draws), **position))


# Statistics. Seeds are fixed, so a result never changes; fair and independent bits would break each
# bound with a probability of about 1e-4.


def correlation(a: Tensor, b: Tensor, keep_prob: float) -> float:
    """In standard deviations of what independent draws give."""
    a, b = a.double() - keep_prob, b.double() - keep_prob
    return float((a * b).sum()) / (keep_prob * (1 - keep_prob) * math.sqrt(a.numel()))


@pytest.mark.parametrize("keep_prob", [0.5, 0.25, 0.9, 1 / 3, 0.01])
def test_the_kept_fraction_is_keep_prob_within_4_sigma(keep_prob):
    numel = 1 << 20
    kept = mask.count_kept(numel, seed=11, step=3, index=1, keep_prob=keep_prob)
    assert abs(kept - numel * keep_prob) < 4 * math.sqrt(numel * keep_prob * (1 - keep_prob))


NUMEL = 1 << 18
HERE = {"seed": 11, "step": 5, "index": 2}
ELSEWHERE = [
    pytest.param({"step": 6}, 0, id="next step"),
    pytest.param({"index": 3}, 0, id="next parameter"),
    pytest.param({"step": 2, "index": 5}, 0, id="step and parameter exchanged"),
    pytest.param({"step": 5 + 2**32}, 0, id="step 2**32 later"),
    *(
        pytest.param({"seed": 11 ^ 1 << bit}, 0, id=f"seed's bit {bit}")
        for bit in (0, 1, 31, 32, 63)
    ),
    *(pytest.param({}, lag, id=f"{lag} elements on") for lag in (1, 2, 64, 256, 2**40)),
]


@pytest.mark.parametrize("keep_prob", [0.5, 0.3])
@pytest.mark.parametrize(("change", "offset"), ELSEWHERE)
def test_masks_of_different_positions_are_uncorrelated_within_4_sigma(keep_prob, change, offset):
    here = mask.draw(NUMEL, **HERE, keep_prob=keep_prob)
    there = mask.draw(NUMEL, **{**HERE, **change}, keep_prob=keep_prob, offset=offset)
    assert abs(correlation(here, there, keep_prob)) < 4


@pytest.mark.parametrize(("keep_prob", "longest"), [(0.5, 10), (0.25, 20), (0.9, 3)])
def test_the_steps_until_an_element_is_first_kept_are_geometric(keep_prob, longest):
    numel = 20000
    waited = torch.full((numel,), longest + 1)
    for step in range(longest, 0, -1):
        waited[mask.draw(numel, seed=8, step=step - 1, index=0, keep_prob=keep_prob)] = step
    observed = waited.bincount(minlength=longest + 2)[1:].double()
    chances = [keep_prob * (1 - keep_prob) ** step for step in range(longest)]
    expected = numel * torch.tensor([*chances, (1 - keep_prob) ** longest], dtype=torch.float64)
    chi_square = ((observed - expected) ** 2 / expected).sum()
    p_value = torch.special.gammaincc(
        torch.tensor(longest / 2, dtype=torch.float64), chi_square / 2
    )
    assert p_value > 1e-4


def test_every_element_is_kept_equally_often():
    numel, steps = 2048, 200
    kept = sum(
        mask.draw(numel, seed=8, step=step, index=4, keep_prob=0.5).double()
        for step in range(steps)
    )
    chi_square = ((kept - steps / 2) ** 2 / (steps / 4)).sum()
    assert abs(float(chi_square) - numel) < 4 * math.sqrt(2 * numel)


# Code paths


def test_the_number_of_threads_does_not_matter():
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append(mask.draw(100_000, seed=1, step=2, index=3, keep_prob=0.3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("keep_prob", [0.5, 0.3, 1.0])
@pytest.mark.parametrize(("numel", "offset"), [(0, 0), (1, 0), (1000, 0), (1000, 257)])
def test_a_cuda_device_gets_the_bits_of_the_cpu(keep_prob, numel, offset):
    position = {"seed": 1, "step": 2, "index": 3, "keep_prob": keep_prob, "offset": offset}
    on_device = mask.draw(numel, **position, device="cuda")
    assert on_device.device.type == "cuda"
    assert on_device.dtype == torch.bool
    assert torch.equal(on_device.cpu(), mask.draw(numel, **position))


def test_drawing_does_not_change_the_global_generators():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    mask.draw(1000, seed=1, step=2, index=3, keep_prob=0.3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


# Arguments


@pytest.mark.parametrize("keep_prob", [0, 0.0, -0.5, 1.0001, math.inf, math.nan])
def test_a_keep_prob_outside_its_range_is_refused(keep_prob):
    with pytest.raises(ValueError, match="keep_prob"):
        mask.draw(4, seed=0, step=0, index=0, keep_prob=keep_prob)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, "1", True, None])
def test_a_seed_outside_its_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        mask.check_seed(seed)


@pytest.mark.parametrize(
    "position",
    [
        {"seed": 2**64},
        {"seed": -1},
        {"step": 2**64},
        {"step": -1},
        {"index": 2**64},
        {"index": -1},
        {"offset": -1},
    ],
    ids=str,
)
def test_a_position_that_would_wrap_into_another_is_refused(position):
    (name,) = position
    with pytest.raises(ValueError, match=name):
        mask.draw(4, **{"seed": 0, "step": 0, "index": 0, "keep_prob": 0.5, **position})


@pytest.mark.parametrize("keep_prob", [0.5, 1.0])
@pytest.mark.parametrize(
    ("numel", "position", "message"),
    [
        (4, {"offset": -300}, r"offset must be in \[0, 2\*\*64\), not -300"),
        (-5, {}, r"numel must be in \[0, 2\*\*64\), not -5"),
    ],
)
def test_an_error_names_the_argument_and_its_value(numel, position, message, keep_prob):
    with pytest.raises(ValueError, match=message):
        mask.draw(numel, seed=0, step=0, index=0, keep_prob=keep_prob, **position)


def test_a_negative_number_of_elements_cannot_be_counted():
    with pytest.raises(ValueError, match="numel must be"):
        mask.count_kept(-5, seed=0, step=0, index=0, keep_prob=0.5)


@pytest.mark.parametrize("granularity", ["elements", "", None])
def test_an_unknown_granularity_is_refused(granularity):
    with pytest.raises(ValueError, match="granularity"):
        mask.keep_mask((2, 2), seed=0, step=0, index=0, keep_prob=0.5, granularity=granularity)


# Many masks at once


def few_and_many_draws() -> list[mask.Draw]:
    """Enough small draws to be drawn together, some large ones between them, two limits."""
    draws = []
    for number in range(70):
        draws.append(
            mask.Draw(
                numel=(1, 255, 256, 300, 9000)[number % 5],
                seed=FULL - number % 2,
                step=number // 7,
                index=FULL if number == 3 else number,
                keep_prob=(0.5, 0.9)[number % 3 % 2],
                offset=(0, 100, 1 << 41)[number % 3],
            )
        )
    draws.append(mask.Draw(3 * 2048 * 256 + 5, seed=1, step=2, index=3, keep_prob=0.75, offset=9))
    draws.append(mask.Draw(0, seed=1, step=2, index=3, keep_prob=0.75))
    draws.append(mask.Draw(40, seed=1, step=2, index=3, keep_prob=1.0))
    return draws


def test_masks_drawn_together_are_those_drawn_alone():
    draws = few_and_many_draws()
    for item, drawn in zip(draws, mask.draw_many(draws), strict=True):
        assert drawn.dtype is torch.bool
        assert torch.equal(drawn, mask.draw(**dataclasses.asdict(item))), item


def test_small_masks_drawn_together_are_those_of_the_definition():
    draws = [mask.Draw(40, 5, number, 2, 0.9, offset=250) for number in range(20)]
    for item, drawn in zip(draws, mask.draw_many(draws), strict=True):
        assert drawn.tolist() == reference_mask(**dataclasses.asdict(item))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_array_operations_give_the_known_answers(counter, key, words):
    seed = np.array([key[0]], np.uint64)
    counters = tuple(np.array([word], np.uint64) for word in counter)
    assert philox.words_at(seed, key[1], counters).tolist() == [list(words)]
