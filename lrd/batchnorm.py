"""Batch normalization over the batches of all ranks on a CPU, where torch's SyncBatchNorm does not work."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics in training are those of the global batch (Ioffe and Szegedy, arXiv 1502.03167).

    Sums travel and are kept in float64, so that another number of ranks changes nothing but the last digits. Every rank
    must have a batch of the same shape. Input and output: float (N, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        count = dist.get_world_size() * x.numel() // x.shape[1]
        wide = x.double()
        sums: Tensor = all_reduce(torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]))  # type: ignore[no-untyped-call]
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp_min(0.0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), momentum)
        scale = self.weight.double() * torch.rsqrt(variance + self.eps)
        shift = self.bias.double() - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def synchronized(network: nn.Module, device: torch.device) -> nn.Module:
    """Have every nn.BatchNorm2d of a network take its statistics over all ranks; parameters and buffers stay."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-any-return, no-untyped-call]
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return network
