"""Operations on the bits of tensors: their digest, and the selection of elements."""

from __future__ import annotations

import pytest
import torch

from lrd.optim import tensor_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_tensor_that_is_not_aligned_has_the_digest_of_its_copy(dtype, offset):
    tensor = (torch.arange(100) % 90).to(dtype)[offset:]
    assert tensor_bits.digest(tensor) == tensor_bits.digest(tensor.clone())


@pytest.mark.parametrize("numel", [300, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_select_takes_each_element_from_new_or_old(dtype, numel):
    """Few elements and many are selected in two ways."""
    new = torch.arange(numel).to(dtype)
    old = -new
    keep = torch.arange(numel) % 3 > 0
    expected = torch.where(keep, new, old)
    tensor_bits.select(new, old, keep)
    assert torch.equal(new, expected)
