"""A copy of a network's buffers, taken before each step: BatchNorm's running statistics.

The forward pass changes them before it is known whether the step can be completed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrd.distributed.communication import buffers_by_dtype


class BufferSnapshot:
    """Copies a network's buffers and puts the copies back.

    Args:
        network: the network.

    Attributes:
        step: the steps that were done when the copy was taken; None: none was taken.
    """

    def __init__(self, network: nn.Module) -> None:
        self.step: int | None = None
        self._network = network
        self._copies: dict[torch.dtype, list[Tensor]] = {}

    def take(self, step: int) -> None:
        """Copy the buffers as they are after so many steps."""
        self.step = step
        for dtype, buffers in buffers_by_dtype(self._network).items():
            copies = self._copies.get(dtype, [])
            # A network of the user's own may put another buffer in the place of one.
            if [copy.shape for copy in copies] != [buffer.shape for buffer in buffers]:
                self._copies[dtype] = [buffer.clone() for buffer in buffers]
            else:
                # A call for all tensors of one dtype costs far less than one for each of them.
                torch._foreach_copy_(copies, buffers)

    def restore(self) -> None:
        """Put the copies back."""
        for dtype, buffers in buffers_by_dtype(self._network).items():
            torch._foreach_copy_(buffers, self._copies[dtype])
