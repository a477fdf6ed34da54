"""The digest of a tensor depends on its values and memory format, not on where it lies."""

from __future__ import annotations

import pytest
import torch

from lrd.optim import tensor_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_tensor_that_is_not_aligned_has_the_digest_of_its_copy(dtype, offset):
    tensor = (torch.arange(100) % 90).to(dtype)[offset:]
    assert tensor_bits.digest(tensor) == tensor_bits.digest(tensor.clone())
