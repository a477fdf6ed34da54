"""A copy of a network's buffers, taken before each step: BatchNorm's running statistics.

The forward pass changes them before it is known whether the step can be completed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BufferSnapshot:
    """Copies a network's buffers and puts the copies back.

    Args:
        network: its buffers stay the same tensors.

    Attributes:
        step: the steps that were done when the copy was taken; None: none was taken.
    """

    def __init__(self, network: nn.Module) -> None:
        self.step: int | None = None
        self._network = network
        # A call for all tensors of one dtype costs far less than one for each of them.
        self._copies: dict[torch.dtype, list[Tensor]] = {
            dtype: [torch.empty_like(buffer) for buffer in buffers]
            for dtype, buffers in self._by_dtype().items()
        }

    def take(self, step: int) -> None:
        """Copy the buffers as they are after so many steps."""
        self.step = step
        for dtype, buffers in self._by_dtype().items():
            torch._foreach_copy_(self._copies[dtype], buffers)

    def restore(self) -> None:
        """Put the copies back."""
        for dtype, buffers in self._by_dtype().items():
            torch._foreach_copy_(buffers, self._copies[dtype])

    def _by_dtype(self) -> dict[torch.dtype, list[Tensor]]:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._network.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer.detach())
        return by_dtype
