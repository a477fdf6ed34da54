"""The reference of the masks is right, and lrd agrees with it."""

import pytest
import torch

import lrd
from tests.clients import reference


def test_philox_has_the_published_known_answers():
    """The vectors of Random123 for Philox4x64-10."""
    ones = (1 << 64) - 1
    zeros_block = reference.philox_block((0, 0, 0, 0), (0, 0))
    ones_block = reference.philox_block((ones, ones, ones, ones), (ones, ones))
    assert [zeros_block >> shift & ones for shift in (0, 64, 128, 192)] == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert [ones_block >> shift & ones for shift in (0, 64, 128, 192)] == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("keep_prob", [1e-9, 0.1, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize(("seed", "step", "index"), [(0, 0, 0), (7, 3, 2), (2**64 - 1, 2**33, 5)])
def test_lrd_draws_the_masks_of_the_reference(keep_prob, seed, step, index):
    position = {"seed": seed, "step": step, "index": index, "keep_prob": keep_prob}
    assert torch.equal(lrd.mask.draw(700, **position), reference.keeps(700, **position))


def test_the_reference_notices_a_wrong_mask():
    """Masks of other seeds, steps and indices differ."""
    position = {"seed": 0, "step": 0, "index": 0, "keep_prob": 0.5}
    mask = reference.keeps(300, **position)
    for key in ("seed", "step", "index"):
        assert not torch.equal(mask, reference.keeps(300, **{**position, key: 1}))
