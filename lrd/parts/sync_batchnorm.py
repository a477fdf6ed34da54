"""Batch normalization over all ranks on a CPU, where torch's SyncBatchNorm does not work."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that takes its statistics in training over the global batch.

    See Ioffe and Szegedy, arXiv 1502.03167. Sums travel and are kept in float64, so that another
    number of ranks changes the last digits and nothing else. All ranks must have a batch of the
    same shape.

    Input and output: float (N, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)

        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None

        # Mean and variance of each channel over the global batch, both float64 (C,).
        count = dist.get_world_size() * x.numel() // x.shape[1]
        wide = x.double()
        local_sums = torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
        sums: Tensor = all_reduce(local_sums)  # type: ignore[no-untyped-call]
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp_min(0.0)

        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased_variance = variance * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased_variance.to(self.running_var), self.momentum)

        # (x - mean) / std * weight + bias, as one multiplication and one addition.
        scale = self.weight.double() * torch.rsqrt(variance + self.eps)
        shift = self.bias.double() - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def convert_sync_batchnorm(network: nn.Module, device: torch.device) -> nn.Module:
    """Make every nn.BatchNorm2d of a network take its statistics over all ranks.

    Parameters and buffers stay as they are.
    """
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-any-return, no-untyped-call]

    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # keeps parameters, buffers and their names
    return network
